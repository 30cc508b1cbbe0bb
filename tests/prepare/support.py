"""What the tests of prepare share: the command in this process, texts, and datasets read back."""

import bz2
import gzip
import hashlib
import importlib
import io
import json
import pkgutil
import random
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

import prepare
import prepare.__main__ as command
from shards import tokenizer

EOT = 50256
# tiktoken's own encoding: the law.
LAW = tokenizer.load()._reference
ROOT = Path(__file__).parents[2]


def _zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".zst": _zstd, ".bz2": bz2.compress}
WORDS = ["the", "quick", "brown", "fox", "and", "then", "12", "345", "it's", "don't", "said", "a"]
ODDITIES = (
    "<|endoftext|>", "naïve café", "日本語のテキスト。", "привет, мир", "🙂🏽", "e\u0301", "\u00a0",
    "\u3000\u3000", "\u088f", "\ua7ce", "½ ⅷ ٣", "\r\n", "\t\t", "  \n \n  ", "\x00\x7f", "'ll'S",
    "aaaaaaaaaaaaaaaaaaaaaaaa", "\ufeff",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a refusal says."""
        assert self.code == 2, (self.code, self.err)
        last = self.err.split("\r")[-1].splitlines()[-1]
        assert last.startswith("error: ")
        assert "Traceback" not in self.err
        return last


@dataclass(frozen=True)
class Document:
    """A document as shards and index tell of it; `tokens` begin with <|endoftext|>."""

    source: str
    row: int
    text_bytes: int
    tokens: tuple[int, ...]


def run(*arguments: object) -> Outcome:
    """`python -m prepare ARGUMENTS`, in this process; with one worker unless they say otherwise."""
    given = [str(argument) for argument in arguments]
    given += [] if "--workers" in " ".join(given) else ["--workers", "1"]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch.object(sys, "argv", ["prepare", *given]),
    ):
        try:
            command.main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def make(out: Path, *arguments: object) -> Path:
    """Prepare the dataset `out`, which must succeed; returns it."""
    outcome = run(*arguments, "--out", out)
    assert outcome.code == 0, outcome.err
    return out


def shrink(patch: pytest.MonkeyPatch, **constants: int) -> None:
    """Set size constants in whichever modules of prepare hold them."""
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(prepare.__path__, "prepare.")
        if info.name != "prepare.__main__"
    ]
    for name, value in constants.items():
        holders = [module for module in modules if hasattr(module, name)]
        assert holders, f"no module of prepare has {name}"
        for module in holders:
            patch.setattr(module, name, value)


def texts(count: int, seed: int = 0, words: int = 30) -> list[str]:
    """Documents, no two alike, of common words with oddities among them."""
    source = random.Random(seed)
    return [
        f"{seed}/{number} "
        + "".join(
            source.choice(ODDITIES) if source.random() < 0.1 else " " + source.choice(WORDS)
            for _ in range(source.randrange(words))
        )
        for number in range(count)
    ]


def write_jsonl(path: Path, documents: Iterable[str], field: str = "text") -> list[int]:
    """A line of JSON for each document; returns where each line begins."""
    lines = [json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(documents)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), "utf-8")
    ends = np.cumsum([0, *map(len, lines)])
    return ends[:-1].tolist()


def repaired(text: str) -> str:
    """A text as tiktoken takes it: lone surrogates are U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_val(content: bytes, fraction: float = 0.1) -> bool:
    """Whether a document is validation text, worked out anew from the rule as documented."""
    return int.from_bytes(xxhash.xxh3_128_digest(content)[:8], "big") < fraction * 2**64


def text_of(side: str, fraction: float = 0.1) -> str:
    """A short document that lies on the given side."""
    candidates = (f"filler {number}" for number in count())
    return next(t for t in candidates if is_val(t.encode(), fraction) == (side == "val"))


def law(text: str) -> tuple[int, ...]:
    """What the tokens of a document must be."""
    return (EOT, *LAW.encode_ordinary(text))


def expected(
    documents: Iterable[tuple[str, int, str]], fraction: float = 0.1
) -> dict[str, list[Document]]:
    """What a dataset of (source, row, text), in plan order, must hold on either side."""
    sides: dict[str, list[Document]] = {"train": [], "val": []}
    for source, row, text in documents:
        content = repaired(text).encode()
        side = "val" if is_val(content, fraction) else "train"
        sides[side].append(Document(source, row, len(content), law(text)))
    return sides


def held(folder: Path) -> dict[str, list[Document]]:
    """What a dataset holds, read with NumPy and Arrow alone; checks every claim of its manifest."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    names = {"manifest.json", "quarantine.jsonl", "prepare.log", ".prepare"}
    sides: dict[str, list[Document]] = {}
    for side, split in manifest["splits"].items():
        sides[side] = []
        for shard in split["shards"]:
            names |= {shard["file"], shard["index"]}
            _read_shard(folder, shard, [s["name"] for s in manifest["sources"]], sides[side])
        for total in ("tokens", "documents", "text_bytes"):
            assert split[total] == sum(shard[total] for shard in split["shards"])
        assert split["documents"] == len(sides[side])
        assert split["tokens"] == sum(len(document.tokens) for document in sides[side])
    counts = manifest["counts"]
    assert counts["written"] == len(sides["train"]) + len(sides["val"])
    left_out = sum(entry["documents"] for entry in quarantine(folder))
    assert counts["quarantined"] == left_out
    assert counts["read"] == sum(n for name, n in counts.items() if name != "read")
    assert {path.name for path in folder.iterdir()} == names
    return sides


def _read_shard(folder: Path, shard: dict, sources: list[str], documents: list[Document]) -> None:
    for kind, name in (("sha256", shard["file"]), ("index_sha256", shard["index"])):
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == shard[kind]
    tokens = np.load(folder / shard["file"], allow_pickle=False)
    assert tokens.dtype == np.uint16
    assert tokens.shape == (shard["tokens"],)
    rows = pq.read_table(folder / shard["index"]).to_pylist()
    ends = [row["offset"] for row in rows[1:]] + [len(tokens)]
    assert rows[0]["offset"] == 0
    assert sum(not row["continued"] for row in rows) == shard["documents"]
    assert sum(row["text_bytes"] for row in rows) == shard["text_bytes"]
    for row, end in zip(rows, ends, strict=True):
        part = tuple(tokens[row["offset"] : end].tolist())
        source = sources[row["source"]]
        if row["continued"]:
            last = documents.pop()
            assert (last.source, last.row + last.text_bytes) == (source, row["row"])
            part, size = last.tokens + part, last.text_bytes + row["text_bytes"]
            documents.append(Document(source, last.row, size, part))
        else:
            documents.append(Document(source, row["row"], row["text_bytes"], part))


def quarantine(folder: Path) -> list[dict]:
    """What was left out."""
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_bytes().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes that are the same for the same input: every file but the log and the work area."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name != "prepare.log"
    }
