"""A corpus of real, mixed text from files that any machine has, as parquet, jsonl and txt.

Source code, documentation and data files of the interpreter, the installed packages and the system:
one document per file, each content once, ordered by hash. Written once and kept in the cache.
"""

import hashlib
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = {
    ".c", ".css", ".csv", ".h", ".hpp", ".htm", ".html", ".js", ".json", ".md", ".pl", ".po",
    ".pod", ".py", ".pyi", ".rst", ".tex", ".txt", ".xml",
}  # fmt: skip
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


def build(megabytes: float) -> Corpus:
    """Return the corpus of so many million bytes of text, or of as many as this machine has."""
    folder = cache_folder() / f"corpus-{megabytes:g}MB"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            _write(Path(temporary, "new"), int(megabytes * 1e6))
            shutil.move(Path(temporary, "new"), folder)
    return Corpus(folder, **orjson.loads((folder / "corpus.json").read_bytes()))


def cache_folder() -> Path:
    """Folder of files that benchmarks reuse."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mygpt" / "bench"


def _write(folder: Path, size: int) -> None:
    """Write every form of a corpus of `size` bytes."""
    documents, total = [], 0
    for path in _mixed():
        text = _text(path)
        if text and total < size:
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
    for path, texts, rows in (
        (corpus.parquet, documents, ROW_GROUP),
        (corpus.sample, sample, ROW_GROUP // SAMPLED_ONE_IN),
    ):
        pq.write_table(pa.table({"text": texts}), path, row_group_size=rows, compression="zstd")
    with open(corpus.jsonl, "wb") as lines, open(corpus.txt, "wb") as text_file:
        for number, text in enumerate(documents):
            lines.write(orjson.dumps({"id": number, "text": text}) + b"\n")
            text_file.write(text.encode() + b"\n")
    (folder / "corpus.json").write_bytes(orjson.dumps(sizes))


def _mixed() -> Iterator[Path]:
    """One file for each distinct content, ordered by its hash."""
    by_hash: dict[bytes, Path] = {}
    for root in _roots():
        for path in sorted(root.rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and not path.is_symlink():
                by_hash.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)
    return (by_hash[key] for key in sorted(by_hash))


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
