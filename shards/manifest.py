"""A dataset: a folder with `manifest.json`, token shards and their document indexes.

The manifest is a pure function of the sources and the prepare options: no times, no host paths,
nothing about the machine that wrote it (promise 2). It is written last, so its presence means that
the dataset is complete (promise 6). Its fingerprint is the identity that checkpoints carry (promise
10); a dataset grows by generations, and each prefix keeps its own fingerprint.
"""

import hashlib
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from shards import remote, stored_json
from shards.files import json_bytes, write_json

FORMAT, VERSION = "mygpt-shards", 2
# The file may change its version; what the fingerprint covers stays, or checkpoints lose their data
IDENTITY_VERSION = 1
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "val")
DTYPE = np.dtype("<u2")  # of token ids in a shard
INDEX_SCHEMA = pa.schema(
    [
        ("offset", pa.int64()),  # of the document's first token, its <|endoftext|>, in the shard
        ("source", pa.int32()),  # index into the manifest's sources
        ("row", pa.int64()),  # the document's position in its source: row or byte, from 0
        ("text_bytes", pa.int64()),  # its UTF-8 size
        # True: continues the row before, maybe of the shard before; no <|endoftext|> stands here.
        ("continued", pa.bool_()),
    ]
)
PLAIN_NAME = re.compile(r"\w[^/\\:\x00-\x1f\x7f-\x9f]*")
SHA256 = re.compile("[0-9a-f]{64}")
# Stored beside the fields of the dataclasses, from which `to_dict` computes them.
DERIVED = {"dtype", "fingerprint", "checksum", "tokens", "documents", "text_bytes"}
REMEDY = "restore it or prepare again"


@lru_cache
def npy_header(tokens: int) -> bytes:
    """Return the .npy header of `(tokens,)` uint16, which NumPy pads to one size for any length."""
    buffer = io.BytesIO()
    description = {"descr": DTYPE.str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


@dataclass(frozen=True)
class TokenizerIdentity:
    """The tokenizer that made the tokens; `hash` is the sha256 of its vocabulary."""

    name: str
    n_vocab: int
    eot: int
    hash: str


@dataclass(frozen=True)
class Source:
    """One input file: its name relative to the SOURCE given to prepare, and its size."""

    name: str
    bytes: int
    generation: int = 0


@dataclass(frozen=True)
class Shard:
    """One token file, `(tokens,)` uint16 .npy, and its index file.

    `sha256` and `index_sha256` cover the whole files; `text_bytes` is the UTF-8 size of the
    documents, without `<|endoftext|>`.
    """

    file: str
    index: str
    tokens: int
    documents: int
    text_bytes: int
    sha256: str
    index_sha256: str
    generation: int = 0

    @property
    def file_bytes(self) -> int:
        """Size of the token file."""
        return len(npy_header(self.tokens)) + self.tokens * DTYPE.itemsize

    def windows(self, block_size: int) -> int:
        """Return the number of windows of `block_size` + 1 tokens in an epoch (promise 4)."""
        return max(self.tokens - 1, 0) // block_size


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order, with their totals."""

    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        """Token ids on disk, `<|endoftext|>` included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents, each preceded by one `<|endoftext|>`."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents."""
        return sum(shard.text_bytes for shard in self.shards)

    def windows(self, block_size: int) -> int:
        """Return the number of windows of `block_size` + 1 tokens in an epoch."""
        return sum(shard.windows(block_size) for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """Description of a dataset. `Manifest.load` reads one; prepare and import write them.

    `split_rule` records how documents were split, and appends follow it. `folder` is where the
    manifest was loaded from, `uri` the same if that is an object store; neither is stored.
    """

    tokenizer: TokenizerIdentity
    split_rule: dict[str, Any]
    sources: tuple[Source, ...]
    splits: dict[str, Split]
    counts: dict[str, int]
    generation: int = 0
    folder: Path = field(default=Path(), compare=False)
    uri: str = field(default="", compare=False)

    @classmethod
    def load(cls, folder: str | Path, generation: int | None = None) -> "Manifest":
        """Read the manifest in `folder`, a path or URI, up to `generation` (by default all of it).

        Raises FileNotFoundError if there is none; ValueError if it is of another format or version,
        was altered, names a file outside the folder, or lacks that generation; and OSError if a
        remote one can't be read.
        """
        location = str(folder)
        is_remote = remote.is_remote(location)
        content = remote.read(location, MANIFEST_NAME) if is_remote else _read_local(Path(folder))
        manifest = cls.parse(content, location)
        return manifest if generation is None else manifest.prefix(generation)

    @classmethod
    def parse(cls, content: bytes, location: str) -> "Manifest":
        """Return the manifest of the bytes of its file. Raises ValueError as `load` does."""
        uri = location.rstrip("/") if remote.is_remote(location) else ""
        path = f"{uri}/{MANIFEST_NAME}" if uri else Path(location, MANIFEST_NAME)
        raw = stored_json.parse(content, path, REMEDY)
        stored_json.check_version(raw, FORMAT, (VERSION,), path, "prepare the dataset again")
        _check_hash("checksum", raw, checksum(raw), path)
        values = raw | {"folder": location, "uri": uri}
        manifest = stored_json.build(cls, values, path, retired=DERIVED, remedy=REMEDY)
        _check_values(manifest, path)
        _check_hash("fingerprint", raw, manifest.fingerprint, path)
        return manifest

    def prefix(self, generation: int) -> "Manifest":
        """Return the dataset as of `generation`. Raises ValueError if it has no such generation."""
        if not 0 <= generation <= self.generation:
            raise ValueError(
                f"expected a generation from 0 to {self.generation} in {self.location}, found "
                f"{generation}: this copy is older than the run or checkpoint that names it; copy "
                "the newer dataset here"
            )
        splits = {
            name: Split(tuple(shard for shard in split.shards if shard.generation <= generation))
            for name, split in self.splits.items()
        }
        sources = tuple(source for source in self.sources if source.generation <= generation)
        return replace(self, splits=splits, sources=sources, generation=generation)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of the tokenizer and of every shard up to this generation."""
        identity = {
            "version": IDENTITY_VERSION,
            "tokenizer": self.tokenizer.hash,
            "shards": {
                name: [(shard.tokens, shard.sha256) for shard in split.shards]
                for name, split in self.splits.items()
            },
        }
        return hashlib.sha256(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS)).hexdigest()

    @property
    def shards(self) -> list[Shard]:
        """The shards of both splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents of both splits."""
        return sum(split.text_bytes for split in self.splits.values())

    @property
    def location(self) -> str:
        """The folder or URI of the dataset."""
        return self.uri or str(self.folder)

    def path(self, file: str) -> Path:
        """Return the path of a file of a local dataset."""
        return self.folder / file

    def location_of(self, file: str) -> str:
        """Return the path or URI of one of the dataset's files."""
        return f"{self.uri}/{file}" if self.uri else str(self.path(file))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `manifest.json`; `checksum` covers everything else in it."""
        values = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": "uint16",
            "fingerprint": self.fingerprint,
            "generation": self.generation,
            "tokenizer": asdict(self.tokenizer),
            "split_rule": self.split_rule,
            "sources": [asdict(source) for source in self.sources],
            "counts": self.counts,
            "splits": {
                name: {
                    "tokens": split.tokens,
                    "documents": split.documents,
                    "text_bytes": split.text_bytes,
                    "shards": [asdict(shard) for shard in split.shards],
                }
                for name, split in self.splits.items()
            },
        }
        return values | {"checksum": checksum(values)}

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`, all or nothing."""
        write_json(folder / MANIFEST_NAME, self.to_dict())


def _read_local(folder: Path) -> bytes:
    path = folder / MANIFEST_NAME
    if folder.is_file():
        raise ValueError(
            f"expected a dataset, found the file {folder}: make a dataset of it first, by "
            f"`make data INPUT={folder}` or `python -m prepare {folder} --out data/{folder.stem}`"
        )
    if not path.is_file():  # a FIFO would be waited for
        found = "another kind of file" if path.exists() else "none"
        raise FileNotFoundError(
            f"expected a dataset with {MANIFEST_NAME} in {folder}, found "
            f"{found if folder.is_dir() else 'no such folder'}: make one with "
            f"`python -m prepare SOURCE --out {folder}` (an unfinished one: the same command again)"
        )
    return path.read_bytes()


def checksum(values: dict[str, Any]) -> str:
    """Hex sha256 of everything in a record but the checksum itself."""
    covered = {key: value for key, value in values.items() if key != "checksum"}
    return hashlib.sha256(json_bytes(covered)).hexdigest()


def _check_hash(name: str, raw: dict[str, Any], computed: str, path: str | Path) -> None:
    if raw.get(name) != computed:
        raise ValueError(
            f"expected the {name} {computed[:12]} in {path}, found {str(raw.get(name))[:12]}: "
            f"the file was altered; {REMEDY}"
        )


def _check_values(manifest: Manifest, path: str | Path) -> None:
    """Raise ValueError for other splits than `SPLITS` and for a value that is out of its range."""
    if sorted(manifest.splits) != sorted(SPLITS):
        raise ValueError(
            f"expected the splits {' and '.join(SPLITS)} in {path}, found "
            f"{', '.join(manifest.splits) or 'none'}: {REMEDY}"
        )
    identity, sources, last = manifest.tokenizer, manifest.sources, manifest.generation
    shards = [shard for split in SPLITS for shard in manifest.splits[split].shards]
    # By whole columns: a dataset has up to 100,000 shards.
    files = [name for shard in shards for name in (shard.file, shard.index)]
    hashes = [text for shard in shards for text in (shard.sha256, shard.index_sha256)]
    sizes = [n for shard in shards for n in (shard.tokens, shard.documents, shard.text_bytes)]
    rules: tuple[tuple[str, Iterable[Any], Callable[[Any], object]], ...] = (
        ("plain file names of its own folder", files, PLAIN_NAME.fullmatch),
        ("hashes of 64 hex digits", [identity.hash, *hashes], SHA256.fullmatch),
        ("sizes of shards from 0", sizes, range(1 << 44).__contains__),  # all together in 64 bits
        ("sizes from 0", [source.bytes for source in sources], range(1 << 62).__contains__),
        ("counts from 0", manifest.counts.values(), range(1 << 62).__contains__),
        ("a generation from 0", [last], range(1 << 31).__contains__),
        (
            f"generations up to {last}",
            [*(source.generation for source in sources), *(s.generation for s in shards)],
            range(last + 1).__contains__,
        ),
        ("1 to 65536 token ids", [identity.n_vocab], range(1, 1 << 16 | 1).__contains__),
        ("an eot among its ids", [identity.eot], range(identity.n_vocab).__contains__),
        ("a rule of the split", [manifest.split_rule.get("rule")], lambda x: isinstance(x, str)),
    )
    for expected, values, is_right in rules:
        if not all(map(is_right, values)):
            other = next(value for value in values if not is_right(value))
            raise ValueError(f"expected {expected} in {path}, found {other!r}: {REMEDY}")
