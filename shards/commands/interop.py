"""`import` and `export`: token files of other projects to a dataset, and a dataset to such files.

`nanogpt` is a bare stream of uint16 in train.bin and val.bin (karpathy/nanoGPT). `llmc` is any
number of files with a header of 256 int32 (a magic number, a version, the count) and as many uint16
(karpathy/llm.c; modded-nanogpt has the same). Both hold GPT-2's tokens, unless a `tokenizer.json`
lies beside them, which a dataset of another vocabulary is exported with.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from tqdm import tqdm
from tyro.conf import Positional, arg

from shards import tokenizer
from shards.cli import counted
from shards.files import atomic_folder
from shards.manifest import DTYPE, INDEX_SCHEMA, SPLITS, Manifest, Shard, Source, Split
from shards.reader import open_tokens
from shards.vocabulary import TOKENIZER_NAME
from shards.writer import open_shard

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
MAX_COUNT = 2**31 - 1  # of tokens, an int32 in the header
# A longer bare stream becomes several shards; a file with a header stays one.
MAX_SHARD_TOKENS = 1 << 27
BLOCK = 1 << 22

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Import:
    """Make a dataset of another project's token files (nanoGPT, llm.c, modded-nanogpt)."""

    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE...")]
    """The .bin files, with train or val as a word in their names."""
    out: Path
    """The new dataset's folder."""
    format: Literal["auto", "nanogpt", "llmc"] = "auto"
    """nanogpt: bare uint16; llmc: with a header of 256 int32; auto: by its magic number."""

    def run(self) -> int:
        """Copy the tokens and find the documents in them."""
        size = sum(path.stat().st_size for path in self.files if path.is_file())
        with progress(size // 2, "import") as bar:  # two bytes per token
            manifest = import_files(self.files, self.out, self.format, bar.update)
        print(
            f"{counted(manifest.counts['written'], 'document')}, "
            f"{counted(total_tokens(manifest), 'token')} in {self.out}: "
            f"python -m shards info {self.out}"
        )
        return 0


@dataclass(frozen=True)
class Export:
    """Write a dataset's tokens as another project's files (nanoGPT, llm.c, modded-nanogpt)."""

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
    """The dataset's folder or URI."""
    out: Path
    """The new folder for the .bin files."""
    format: Literal["nanogpt", "llmc"] = "nanogpt"
    """nanogpt: train.bin and val.bin; llmc: one file with a header per shard."""

    def run(self) -> int:
        """Copy the tokens."""
        manifest = Manifest.load(self.folder)
        with progress(total_tokens(manifest), "export") as bar:
            names = export(manifest, self.out, self.format, bar.update)
        print(f"{counted(len(names), 'file')} in {self.out}: {names[0]} to {names[-1]}")
        return 0


def total_tokens(manifest: Manifest) -> int:
    """Return the token count of all splits."""
    return sum(split.tokens for split in manifest.splits.values())


def progress(tokens: int, name: str) -> "tqdm[None]":
    """Return a progress bar that counts tokens."""
    return tqdm(total=tokens, unit=" tokens", unit_scale=True, desc=name, leave=False)


@dataclass(frozen=True)
class TokenFile:
    """A file of another project: the split in its name, and `tokens` ids from byte `start`."""

    path: Path
    format: str
    split: str
    start: int
    tokens: int

    def open(self) -> np.ndarray:
        """Return the token ids, (tokens,) uint16, a view of the file."""
        return np.asarray(np.memmap(self.path, DTYPE, "r", self.start, (self.tokens,)))


@dataclass(frozen=True)
class Part:
    """Tokens `start` to `end` of file number `source`, a shard; `last` if it ends its split."""

    source: int
    start: int
    end: int
    last: bool


def identify(path: Path, form: str) -> TokenFile:
    """Describe a token file; `form` is nanogpt, llmc, or auto: llmc if it has the magic number.

    Raises FileNotFoundError or ValueError for a file that can't be of that format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of tokens in {path}, found none")
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    header = np.frombuffer(head[: len(head) // 4 * 4], "<i4").tolist()
    if form == "auto":  # two of GPT-2's ids never make the magic number
        form = "llmc" if header[:1] == [MAGIC] else "nanogpt"
    start = HEADER_BYTES if form == "llmc" else 0
    tokens, rest = divmod(path.stat().st_size - start, DTYPE.itemsize)
    if form == "llmc" and header[:3] != [MAGIC, VERSION, tokens]:
        raise ValueError(
            f"expected magic {MAGIC}, version {VERSION} and the number of tokens ({tokens}) in the "
            f"header of {path}, found {header[:3]}: it was cut short, or has another format"
        )
    if tokens < 1 or rest:
        raise ValueError(
            f"expected 16-bit tokens in {path}, found {path.stat().st_size} bytes: it was cut short"
        )
    if (path.parent / "meta.pkl").exists():
        raise ValueError(
            f"expected GPT-2's tokens in {path}, found a meta.pkl beside it: its tokens are of "
            "another vocabulary; prepare the text instead"
        )
    return TokenFile(path, form, _split_of(path), start, tokens)


def _split_of(path: Path) -> str:
    """Return the split that is a word of the file's name, not merely a substring."""
    words = re.findall("[a-z]+", path.stem.lower())
    named = [split for split in SPLITS if split in words]
    if len(named) != 1:
        raise ValueError(
            f"expected train or val as a word in the name {path.name}, found "
            f"{' and '.join(named) or 'neither'}: rename it (train.bin, web_val_000000.bin)"
        )
    return named[0]


def import_files(
    paths: Sequence[Path], out: Path, form: str, progress: Progress = lambda _: None
) -> Manifest:
    """Make the dataset `out` from token files of other projects, its shards in the given order.

    A document starts at each `<|endoftext|>`; what precedes the first one of a file continues the
    last document of the file before, if there is one. `progress` is called with counts of tokens.
    Raises ValueError or OSError for files that can't be read and ids that the vocabulary lacks.
    """
    files = [identify(path, form) for path in paths]
    if missing := sorted(set(SPLITS) - {file.split for file in files}):
        raise ValueError(f"expected files of both splits, found none of {missing[0]}: add one")
    own = tokenizer.tokenizer_beside(paths[0].parent)
    lengths = own.byte_lengths()
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    with atomic_folder(out) as folder:
        for part in _parts(files):
            file = files[part.source]
            done = shards[file.split]
            path = folder / f"{file.split}_{len(done):05d}.npy"
            _write(part, file, path, done, own.eot, lengths, progress)
        if own.name != tokenizer.GPT2:
            (folder / TOKENIZER_NAME).write_bytes(own.to_json())
        splits = {split: Split(tuple(done)) for split, done in shards.items()}
        written = sum(split.documents for split in splits.values())
        Manifest(
            tokenizer=own.identity,
            split_rule={"rule": "imported"},
            sources=tuple(Source(path.name, path.stat().st_size) for path in paths),
            splits=splits,
            counts={"read": written, "written": written, "empty": 0, "quarantined": 0},
        ).save(folder)
    return Manifest.load(out)


def _parts(files: Sequence[TokenFile]) -> Iterator[Part]:
    last = {file.split: source for source, file in enumerate(files)}
    for source, file in enumerate(files):
        size = MAX_SHARD_TOKENS if file.format == "nanogpt" else file.tokens
        for start in range(0, file.tokens, size):
            end = min(start + size, file.tokens)
            yield Part(source, start, end, last[file.split] == source and end == file.tokens)


def _write(
    part: Part,
    file: TokenFile,
    path: Path,
    done: list[Shard],
    eot: int,
    lengths: np.ndarray,
    progress: Progress,
) -> None:
    """Copy a part of a file into the shard `path` and index the documents found in it.

    `lengths`, (n_vocab,), are the bytes that each id stands for.
    """
    ids, text_bytes = file.open()[part.start : part.end], 0
    starts, bytes_before = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    with open_shard(path, done) as writer:
        for at in range(0, len(ids), BLOCK):
            block = ids[at : at + BLOCK]
            if (highest := int(block.max())) >= len(lengths):
                raise ValueError(
                    f"expected ids of the vocabulary, below {len(lengths)}, in {file.path}, found "
                    f"{highest}: "
                    "it has another vocabulary, or another format"
                )
            total = text_bytes + np.cumsum(lengths[block])
            starts.append(at + np.flatnonzero(block == eot))
            bytes_before.append(total[starts[-1] - at])
            text_bytes = int(total[-1])
            writer.write(block)
            progress(len(block))
        marks = np.append(np.concatenate(bytes_before), text_bytes)
        writer.note(_documents(part, np.concatenate(starts), marks, continues=bool(done)))


def _documents(
    part: Part, starts: np.ndarray, marks: np.ndarray, continues: bool
) -> pa.RecordBatch:
    """Return the index of a shard whose `<|endoftext|>` stand at `starts`, (n,).

    `marks`, (n + 1,), are the text bytes before each and in total. Tokens before the first one
    belong to the last document of the shard before if the split `continues`.
    """
    last_token = part.end - part.start - 1
    if part.last and starts.size and starts[-1] == last_token > 0:
        # nanoGPT ends documents with <|endoftext|>: no document starts at the very last token.
        starts, marks = starts[:-1], np.delete(marks, -2)
    is_headless = not starts.size or bool(starts[0])
    if is_headless:
        starts, marks = np.insert(starts, 0, 0), np.insert(marks, 0, 0)
    columns = [
        pa.array(starts),
        pa.array(np.full(len(starts), part.source, np.int32)),
        pa.array(starts + part.start),
        pa.array(np.diff(marks)),
        pa.array((starts == 0) & (is_headless and continues)),
    ]
    return pa.record_batch(columns, schema=INDEX_SCHEMA)


def export(
    manifest: Manifest, out: Path, form: str, progress: Progress = lambda _: None
) -> list[str]:
    """Write a dataset's tokens into the new folder `out` and return the names of its files.

    nanogpt: train.bin and val.bin. llmc: one file per shard, train_000000.bin and so on.
    """
    files: dict[str, tuple[Shard, ...]] = {}
    for name, split in manifest.splits.items():
        if form == "nanogpt":
            files[f"{name}.bin"] = split.shards
        else:
            files |= {f"{name}_{i:06d}.bin": (shard,) for i, shard in enumerate(split.shards)}
    with atomic_folder(out) as folder:
        if vocabulary := tokenizer.read_stored(manifest.location):
            (folder / TOKENIZER_NAME).write_bytes(vocabulary)
        for name, shards in files.items():
            with open(folder / name, "wb") as file:
                file.write(b"" if form == "nanogpt" else _header(shards[0]))
                for shard in shards:
                    ids = open_tokens(manifest, shard)
                    for at in range(0, len(ids), BLOCK):
                        file.write(ids[at : at + BLOCK].data)
                        progress(len(ids[at : at + BLOCK]))
    return list(files)


def _header(shard: Shard) -> bytes:
    if shard.tokens > MAX_COUNT:
        raise ValueError(
            f"expected at most {MAX_COUNT} tokens per shard, found {shard.tokens} in {shard.file}: "
            "the header holds no larger count; use --format nanogpt"
        )
    return np.array([MAGIC, VERSION, shard.tokens], "<i4").tobytes().ljust(HEADER_BYTES, b"\0")
