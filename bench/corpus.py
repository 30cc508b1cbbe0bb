"""A corpus as parquet, jsonl and txt: of files that any machine has, or made. Kept in a cache.

Mixed: source code, documentation and data files of the interpreter, the installed packages and the
system; code: the source code alone. One document per file, each content once, ordered by hash.
CJK and long-tail are made, for a machine has little of them: Chinese characters, and words of which
one in ten was never met before, both by Zipf's law.
"""

import hashlib
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = {
    ".c", ".css", ".csv", ".h", ".hpp", ".htm", ".html", ".js", ".json", ".md", ".pl", ".po",
    ".pod", ".py", ".pyi", ".rst", ".tex", ".txt", ".xml",
}  # fmt: skip
CODE = {".c", ".css", ".h", ".hpp", ".js", ".pl", ".py", ".pyi"}
Kind = Literal["mixed", "code", "cjk", "long-tail"]
LARGEST_DOCUMENT = 200_000
ROW_GROUP = 400  # documents: about 4 MB
SAMPLED_ONE_IN = 8


@dataclass(frozen=True)
class Corpus:
    """The corpus in `folder`; `sample` is every eighth of its documents, for slow contenders.

    Sizes are UTF-8 bytes of text, without the line ends between the documents of the text file.
    """

    folder: Path
    documents: int
    text_bytes: int
    sample_bytes: int

    # A column `text` in row groups of about 4 MB, zstd: of all documents, and of an eighth of them.
    parquet = property(lambda self: self.folder / "corpus.parquet")
    sample = property(lambda self: self.folder / "sample.parquet")
    jsonl = property(lambda self: self.folder / "corpus.jsonl")  # one line of JSON per document
    txt = property(lambda self: self.folder / "corpus.txt")  # all documents, concatenated


def build(megabytes: float, kind: Kind = "mixed") -> Corpus:
    """Return a corpus of so many million bytes of text, or of as many as this machine has."""
    folder = cache_folder() / f"{kind}-{megabytes:g}MB"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            documents = _made(kind) if kind in ("cjk", "long-tail") else _files(kind)
            _write(Path(temporary, "new"), int(megabytes * 1e6), documents)
            shutil.move(Path(temporary, "new"), folder)
    return Corpus(folder, **orjson.loads((folder / "corpus.json").read_bytes()))


def cache_folder() -> Path:
    """Folder of files that benchmarks reuse."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mygpt" / "bench"


def _write(folder: Path, size: int, texts: Iterator[str]) -> None:
    """Write every form of a corpus of `size` bytes."""
    documents, total = [], 0
    for text in texts:
        if total >= size:
            break
        documents.append(text)
        total += len(text.encode())
    sample = documents[::SAMPLED_ONE_IN]
    sizes = {
        "documents": len(documents),
        "text_bytes": total,
        "sample_bytes": sum(len(text.encode()) for text in sample),
    }
    folder.mkdir()
    corpus = Corpus(folder, **sizes)
    for path, column, rows in (
        (corpus.parquet, documents, ROW_GROUP),
        (corpus.sample, sample, ROW_GROUP // SAMPLED_ONE_IN),
    ):
        pq.write_table(pa.table({"text": column}), path, row_group_size=rows, compression="zstd")
    with open(corpus.jsonl, "wb") as lines, open(corpus.txt, "wb") as text_file:
        for number, text in enumerate(documents):
            lines.write(orjson.dumps({"id": number, "text": text}) + b"\n")
            text_file.write(text.encode() + b"\n")
    (folder / "corpus.json").write_bytes(orjson.dumps(sizes))


def _made(kind: Kind) -> Iterator[str]:
    """Documents of some 6 KB, without end, the same ones each time."""
    chance = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))

    def words(count: int) -> list[str]:
        return ["".join(word) for word in letters[chance.integers(0, 26, (count, 8))].tolist()]

    known = words(6000)
    while True:
        ranks = chance.zipf(1.2, 2000) % 6000
        if kind == "cjk":
            ranks[::15] = ord("，") - 0x4E00
            yield "".join(map(chr, (0x4E00 + ranks).tolist()))
        else:
            mostly_known = [known[rank] for rank in ranks[:600].tolist()]
            mostly_known[::10] = words(60)
            yield " ".join(mostly_known)


def _files(kind: Kind) -> Iterator[str]:
    """The text of one file for each distinct content, ordered by its hash."""
    by_hash: dict[bytes, Path] = {}
    for root in _roots():
        for path in sorted(root.rglob("*")):
            suffixes = CODE if kind == "code" else SUFFIXES
            if path.suffix in suffixes and path.is_file() and not path.is_symlink():
                by_hash.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)
    return filter(None, (_text(by_hash[key]) for key in sorted(by_hash)))


def _roots() -> list[Path]:
    """Those of the folders with text files that this machine has."""
    names = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    paths = [Path(name) for name in [*names, "/usr/share", "/usr/include"] if name]
    return [path for path in paths if path.is_dir()]


def _text(path: Path) -> str:
    """The text of a file; empty if it is not UTF-8 or too long."""
    content = path.read_bytes()
    try:
        return content.decode() if len(content) <= LARGEST_DOCUMENT else ""
    except UnicodeDecodeError:
        return ""
