"""What a dataset is: a folder with `manifest.json`, token shards and their document indexes.

The manifest is a pure function of the sources and the prepare options: it holds no times, no host
paths and nothing of the machine that wrote it (promise 2). It comes last, and its presence says
that the dataset is complete (promise 6). Its fingerprint is the identity that checkpoints carry
(promise 10); a dataset grows by generations, and each prefix keeps its own fingerprint.
"""

import gc
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

import orjson

from shards.files import to_json, write_json

FORMAT = "mygpt-shards"
# Version 1 had no checksum. The tokens' identity is the same in both, and stays so.
VERSION, READABLE = 2, (1, 2)
IDENTITY_VERSION = 1
FILE_NAME = "manifest.json"
SPLITS = ("train", "val")
PLAIN_NAME = re.compile(r"\w[^/\\:]*")

Record = TypeVar("Record")


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer made the tokens; `hash` is the sha256 of its vocabulary."""

    name: str
    n_vocab: int
    eot: int
    hash: str


@dataclass(frozen=True)
class Source:
    """One input file: its name relative to what was given to prepare, and its size."""

    name: str
    bytes: int
    generation: int = 0


@dataclass(frozen=True)
class Shard:
    """One token file, `(tokens,)` uint16 .npy, with its index file and its place in the dataset.

    `sha256` and `index_sha256` are of the whole files; `text_bytes` is the UTF-8 size of the
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

    def windows(self, block_size: int) -> int:
        """How many windows of `block_size` + 1 tokens the shard serves in an epoch (promise 4)."""
        return max(self.tokens - 1, 0) // block_size


@dataclass(frozen=True)
class Split:
    """The shards of one side, in order, with their totals."""

    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        """Token ids on disk, `<|endoftext|>` included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents, each begun by one `<|endoftext|>`."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents."""
        return sum(shard.text_bytes for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """A dataset's description. `Manifest.load` reads one; prepare alone writes them.

    `rule` records how documents were split, and appends follow it. `folder` is where the manifest
    was loaded from, `uri` the same where that is no folder of this machine; they are not part of
    the dataset.
    """

    tokenizer: TokenizerIdentity
    rule: dict[str, Any]
    sources: tuple[Source, ...]
    splits: dict[str, Split]
    counts: dict[str, int]
    generation: int = 0
    folder: Path = field(default=Path(), compare=False)
    uri: str = field(default="", compare=False)

    @classmethod
    def load(cls, folder: str | Path, generation: int | None = None) -> "Manifest":
        """Read the manifest in `folder`, a path or URI, up to `generation` (by default all of it).

        Raises FileNotFoundError where there is none, ValueError where it is of another format or
        version, was altered, names a file outside the folder, or lacks that generation, and
        OSError where a remote one can't be read.
        """
        uri = str(folder).rstrip("/") if "://" in str(folder) else ""
        with _no_collection():
            manifest = cls.from_json(_read(str(folder)), Path(folder))
        manifest = replace(manifest, uri=uri) if uri else manifest
        return manifest if generation is None else manifest.prefix(generation)

    @classmethod
    def from_json(cls, raw: Any, folder: Path) -> "Manifest":
        """The manifest of its JSON. Raises ValueError as `load` does."""
        path = folder / FILE_NAME
        found = (raw.get("format"), raw.get("version")) if isinstance(raw, dict) else (None, None)
        if found[0] != FORMAT or found[1] not in READABLE or found[1] is True:
            raise ValueError(
                f"expected format {FORMAT} version {VERSION} in {path}, found {found[0]} version "
                f"{found[1]}: use the version of this program that wrote it, or prepare again"
            )
        try:
            checks = [] if found[1] == 1 else [("checksum", raw["checksum"], _checksum(raw))]
            manifest = _parse(raw, folder)
            checks.append(("fingerprint", raw["fingerprint"], manifest.fingerprint))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"expected a whole manifest in {path}, found it without {error}: restore it"
            ) from None
        for name, recorded, own in checks:
            if recorded != own:
                raise ValueError(
                    f"expected the {name} {own[:12]} in {path}, found {str(recorded)[:12]}: "
                    "the file was altered; restore it or prepare again"
                )
        _check_names(manifest)
        return manifest

    def prefix(self, generation: int) -> "Manifest":
        """The dataset as it was at `generation`. Raises ValueError where it never was there."""
        if not 0 <= generation <= self.generation:
            raise ValueError(
                f"expected a generation from 0 to {self.generation} in {self.folder}, found "
                f"{generation}: this copy is older than what asks for it; bring the newer one here"
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
    def where(self) -> str:
        """The folder or URI of the dataset."""
        return self.uri or str(self.folder)

    def path(self, file: str) -> Path:
        """Where one of the dataset's files lies, if it lies on this machine."""
        return self.folder / file

    def name(self, file: str) -> str:
        """One of the dataset's files, as messages name it."""
        return f"{self.uri}/{file}" if self.uri else str(self.path(file))

    def open(self, file: str, sha256: str) -> IO[bytes]:
        """One of the dataset's files; a remote one is fetched, checked and kept in the cache.

        Raises FileNotFoundError where there is none; for a remote one ValueError where its content
        has another hash, and OSError where it can't be read.
        """
        if self.uri:
            from shards import cache

            return cache.open_file(self.uri, file, sha256)
        try:
            return open(self.path(file), "rb")
        except FileNotFoundError:
            raise FileNotFoundError(
                f"expected {self.path(file)}, found no such file: restore it, or prepare the "
                "dataset again"
            ) from None

    def to_json(self) -> dict[str, Any]:
        """What `manifest.json` holds; `checksum` is of all the rest."""
        values = self._values()
        return values | {"checksum": _checksum(values)}

    def _values(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "dtype": "uint16",
            "fingerprint": self.fingerprint,
            "generation": self.generation,
            "tokenizer": asdict(self.tokenizer),
            "split_rule": self.rule,
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

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`, all or nothing."""
        write_json(folder / FILE_NAME, self.to_json())


def _read(folder: str) -> Any:
    """The manifest's JSON."""
    if "://" in folder:
        from shards import remote

        content = remote.read(folder, FILE_NAME)
    else:
        content = _read_local(Path(folder))
    try:
        return orjson.loads(content)
    except ValueError as error:
        raise ValueError(
            f"expected JSON in {folder}/{FILE_NAME}, found {error}: restore it or prepare again"
        ) from None


def _read_local(folder: Path) -> bytes:
    path = folder / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(
            f"expected a dataset with {FILE_NAME} in {folder}, found "
            f"{'none' if folder.is_dir() else 'no such folder'}: make one with "
            f"`python -m prepare SOURCE --out {folder}` (an unfinished one: the same command again)"
        )
    return path.read_bytes()


def _checksum(values: dict[str, Any]) -> str:
    """Hex sha256 of all that a manifest says."""
    said = {key: value for key, value in values.items() if key != "checksum"}
    return hashlib.sha256(to_json(said)).hexdigest()


def _parse(raw: dict[str, Any], folder: Path) -> Manifest:
    """The manifest that some JSON spells out."""
    return Manifest(
        tokenizer=TokenizerIdentity(**raw["tokenizer"]),
        rule=raw["split_rule"],
        sources=_records(Source, raw["sources"]),
        splits={name: Split(_records(Shard, raw["splits"][name]["shards"])) for name in SPLITS},
        counts=raw["counts"],
        generation=raw["generation"],
        folder=folder,
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from going through 100,000 new objects again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _records(kind: type[Record], rows: Sequence[dict[str, Any]]) -> tuple[Record, ...]:
    """Frozen dataclasses of their JSON. Raises TypeError or AttributeError for other fields.

    A frozen dataclass sets each field through a call; for 100,000 shards that takes most of a
    second, and this a tenth of one.
    """
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    made = []
    for row in rows:
        if row.keys() != names:
            raise TypeError(f"the fields {', '.join(sorted(names))}")
        record = object.__new__(kind)
        vars(record).update(row)
        made.append(record)
    return tuple(made)


def _check_names(manifest: Manifest) -> None:
    """Raise ValueError where the manifest names a file outside its folder."""
    for split in manifest.splits.values():
        for shard in split.shards:
            for name in (shard.file, shard.index):
                if not (isinstance(name, str) and PLAIN_NAME.fullmatch(name)):
                    raise ValueError(
                        f"expected plain file names in {manifest.folder / FILE_NAME}, found "
                        f"{name!r}: a dataset's files lie in its own folder; don't use this one"
                    )
