"""Token files of other projects → a dataset, and back.

`nanogpt` is a bare stream of uint16 in train.bin and val.bin (karpathy/nanoGPT). `llmc` is any
number of files of a header, 256 int32 with a magic number, a version and the count, and as many
uint16 (karpathy/llm.c; modded-nanogpt has the same). Both hold GPT-2's tokens.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards import tokenizer
from shards.files import atomic_folder
from shards.manifest import SPLITS, Manifest, Shard, Source, Split, TokenizerIdentity
from shards.reader import open_tokens
from shards.writer import DTYPE, INDEX_SCHEMA, open_shard

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
MAX_COUNT = 2**31 - 1  # what the header can say
# A longer bare stream becomes several shards; a file with a header stays one.
MAX_SHARD_TOKENS = 1 << 27
BLOCK = 1 << 22

Progress = Callable[[int], object]


@dataclass(frozen=True)
class TokenFile:
    """A file of another project: the split that it names, and `tokens` from byte `start` on."""

    path: Path
    format: str
    side: str
    start: int
    tokens: int

    def open(self) -> np.ndarray:
        """Its token ids, (tokens,) uint16, a view of the file."""
        return np.asarray(np.memmap(self.path, DTYPE, "r", self.start, (self.tokens,)))


@dataclass(frozen=True)
class Part:
    """Tokens `start` to `end` of the file number `source`: a shard, maybe the split's last."""

    source: int
    start: int
    end: int
    last: bool


@dataclass(frozen=True)
class Vocabulary:
    """What finding documents in a stream of ids needs: how many bytes each id stands for."""

    eot: int
    lengths: np.ndarray


def look_at(path: Path, form: str) -> TokenFile:
    """What a file holds; `form` is nanogpt, llmc, or auto: by the magic number.

    Raises FileNotFoundError or ValueError for a file that can't be one of them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of tokens in {path}, found none")
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    header = np.frombuffer(head[: len(head) // 4 * 4], "<i4").tolist()
    if form == "auto":  # the magic number is larger than two of GPT-2's tokens can be
        form = "llmc" if header[:1] == [MAGIC] else "nanogpt"
    start = HEADER_BYTES if form == "llmc" else 0
    tokens, rest = divmod(path.stat().st_size - start, DTYPE.itemsize)
    if form == "llmc" and header[:3] != [MAGIC, VERSION, tokens]:
        raise ValueError(
            f"expected magic {MAGIC}, version {VERSION} and the number of tokens ({tokens}) in the "
            f"header of {path}, found {header[:3]}: it was cut short, or is of another format"
        )
    if tokens < 1 or rest:
        raise ValueError(
            f"expected 16-bit tokens in {path}, found {path.stat().st_size} bytes: it was cut short"
        )
    if (path.parent / "meta.pkl").exists():
        raise ValueError(
            f"expected GPT-2's tokens in {path}, found a meta.pkl beside it: its tokens are of a "
            "vocabulary of its own; prepare the text instead"
        )
    return TokenFile(path, form, _side(path), start, tokens)


def _side(path: Path) -> str:
    """The split that a file's name has as a word, never as a part of one."""
    words = re.findall("[a-z]+", path.stem.lower())
    named = [side for side in SPLITS if side in words]
    if len(named) != 1:
        raise ValueError(
            f"expected train or val as a word in the name {path.name}, found "
            f"{' and '.join(named) or 'neither'}: rename it (train.bin, web_val_000000.bin)"
        )
    return named[0]


def import_files(
    paths: Sequence[Path], out: Path, form: str, progress: Progress = lambda _: None
) -> Manifest:
    """Make the dataset `out` of other projects' token files, its shards in the order given.

    A document begins at each `<|endoftext|>`, and where a split begins without one; a file that
    begins within a document goes on with that of the file before. `progress` is told of tokens.
    Raises ValueError or OSError for files that can't be read and for ids that GPT-2 lacks.
    """
    files = [look_at(path, form) for path in paths]
    if missing := sorted(set(SPLITS) - {file.side for file in files}):
        raise ValueError(f"expected files of both splits, found none of {missing[0]}: add one")
    gpt2 = tokenizer.load()
    vocabulary = Vocabulary(gpt2.eot, gpt2.byte_lengths())
    shards: dict[str, list[Shard]] = {side: [] for side in SPLITS}
    with atomic_folder(out) as folder:
        for part in _parts(files):
            side = files[part.source].side
            path = folder / f"{side}_{len(shards[side]):05d}.npy"
            _write(part, files[part.source], path, shards[side], vocabulary, progress)
        splits = {side: Split(tuple(done)) for side, done in shards.items()}
        written = sum(split.documents for split in splits.values())
        Manifest(
            tokenizer=TokenizerIdentity(gpt2.name, gpt2.n_vocab, gpt2.eot, gpt2.hash),
            split_rule={"rule": "imported"},
            sources=tuple(Source(path.name, path.stat().st_size) for path in paths),
            splits=splits,
            counts={"read": written, "written": written, "empty": 0, "quarantined": 0},
        ).save(folder)
    return Manifest.load(out)


def _parts(files: Sequence[TokenFile]) -> Iterator[Part]:
    last = {file.side: source for source, file in enumerate(files)}
    for source, file in enumerate(files):
        size = MAX_SHARD_TOKENS if file.format == "nanogpt" else file.tokens
        for start in range(0, file.tokens, size):
            end = min(start + size, file.tokens)
            yield Part(source, start, end, last[file.side] == source and end == file.tokens)


def _write(
    part: Part,
    file: TokenFile,
    path: Path,
    done: list[Shard],
    vocabulary: Vocabulary,
    progress: Progress,
) -> None:
    """Copy a part of a file into the shard `path`, noting the documents found in it."""
    ids, text_bytes = file.open()[part.start : part.end], 0
    begins, before = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    with open_shard(path, done, durable=False) as writer:
        for at in range(0, len(ids), BLOCK):
            block = ids[at : at + BLOCK]
            if (highest := int(block.max())) >= len(vocabulary.lengths):
                raise ValueError(
                    f"expected GPT-2's ids, below {len(vocabulary.lengths)}, in {file.path}, found "
                    f"{highest}: it is of another vocabulary, or of another format"
                )
            read = text_bytes + np.cumsum(vocabulary.lengths[block])
            begins.append(at + np.flatnonzero(block == vocabulary.eot))
            before.append(read[begins[-1] - at])
            text_bytes = int(read[-1])
            writer.write(block)
            progress(len(block))
        marks = np.append(np.concatenate(before), text_bytes)
        writer.note(_documents(part, np.concatenate(begins), marks, continues=bool(done)))


def _documents(
    part: Part, begins: np.ndarray, marks: np.ndarray, continues: bool
) -> pa.RecordBatch:
    """The index of a shard whose `<|endoftext|>` stand at `begins`, (n,).

    `marks`, (n + 1,), are the text bytes before each and in all. What stands before the first
    belongs to the document of the shard before where the stream `continues`.
    """
    last_token = part.end - part.start - 1
    if part.last and begins.size and begins[-1] == last_token > 0:
        # nanoGPT ends documents with <|endoftext|>: nothing begins at the very last token.
        begins, marks = begins[:-1], np.delete(marks, -2)
    headless = not begins.size or bool(begins[0])
    if headless:
        begins, marks = np.insert(begins, 0, 0), np.insert(marks, 0, 0)
    columns = [
        pa.array(begins),
        pa.array(np.full(len(begins), part.source, np.int32)),
        pa.array(begins + part.start),
        pa.array(np.diff(marks)),
        pa.array((begins == 0) & (headless and continues)),
    ]
    return pa.record_batch(columns, schema=INDEX_SCHEMA)


def export(
    manifest: Manifest, out: Path, form: str, progress: Progress = lambda _: None
) -> list[str]:
    """Write a dataset's tokens into the new folder `out`; returns the names of its files.

    nanogpt: train.bin and val.bin. llmc: a file for each shard, train_000000.bin and so on.
    """
    files: dict[str, tuple[Shard, ...]] = {}
    for side, split in manifest.splits.items():
        if form == "nanogpt":
            files[f"{side}.bin"] = split.shards
        else:
            files |= {f"{side}_{i:06d}.bin": (shard,) for i, shard in enumerate(split.shards)}
    with atomic_folder(out) as folder:
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
            f"expected at most {MAX_COUNT} tokens a shard, found {shard.tokens} in {shard.file}: "
            "the header has no room for more; use --format nanogpt"
        )
    return np.array([MAGIC, VERSION, shard.tokens], "<i4").tobytes().ljust(HEADER_BYTES, b"\0")
