"""`explain`: the origin of each row of a training step: where a spike of the loss came from.

Of a run's `config.json` are read: "fingerprint", "generations" (source → generation), "earlier"
(the same two, "until" a step, before the run moved to a later generation), and of "config": "data"
(specs), "seed", "total_batch_size", "shuffle_shards", "max_steps", and "block_size" of its "model".
Its `log.txt` tells how many steps it has trained.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from tyro.conf import UseAppendAction, arg

from shards import stored_json
from shards.cli import counted, printable
from shards.manifest import Manifest
from shards.mixture import Earlier, Mixture
from shards.reader import ShardReader, position, read_index
from shards.stream import MixedStream
from shards.tokenizer import Tokenizer, open_tokenizer

SHOWN_CHARACTERS = 200
MAX_STEPS = 1 << 31  # of a run that does not say its own
LOGGED_STEP = re.compile(rb"^(?:skip )?step (\d{1,18})/", re.MULTILINE)


@dataclass(frozen=True)
class Explain:
    """Say where each row of a training step came from, and how its text begins."""

    run_folder: Annotated[Path, arg(name="run")]
    """The run's folder."""
    step: int
    """The finished step, as log.txt counts them."""
    row: int | None = None
    """Only this row of the global batch, from 0, with its whole text."""
    data: UseAppendAction[tuple[str, ...]] = ()
    """The present location of its datasets, if they were moved; as the run's own --data."""
    json: bool = False
    """Print one JSON object per row and line, with the whole text."""
    losses: bool = False
    """Rank the rows by their losses, with the newest checkpoint before the step."""

    def run(self) -> int:
        """Print the rows."""
        if self.losses:
            return self._hand_over()
        for row in rows_of(self.run_folder, self.step, self.row, self.data):
            print(json.dumps(row.to_dict()) if self.json else row.as_text(self.row is not None))
        return 0

    def _hand_over(self) -> int:
        """Run the command that computes losses: this package knows no models."""
        command = ["-m", "mygpt.explain", "--run", str(self.run_folder), "--step", str(self.step)]
        command += [word for spec in self.data for word in ("--data", spec)]
        return subprocess.call([sys.executable, *command, *(["--json"] if self.json else [])])


@dataclass(frozen=True)
class Piece:
    """The part of a document that a row holds.

    `document` counts from 0 over the split, as `shards show` does; `file` and `row` locate it in
    the input; `offset` is the piece's first token in the document, its `<|endoftext|>` included, or
    in the part of the document that lies in this shard.
    """

    document: int
    file: str
    row: int
    offset: int
    tokens: int


@dataclass(frozen=True)
class Row:
    """A row of a step's global batch: `block_size` + 1 tokens from `token` of a shard on."""

    row: int
    source: str
    shard: str
    token: int
    pieces: list[Piece]
    text: str
    # (block_size + 1,), uint16; not compared: an array has no truth value, and its place says it.
    ids: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the row for JSON, without its ids."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ids"}
        return values | {"pieces": [asdict(piece) for piece in self.pieces]}

    def as_text(self, whole: bool) -> str:
        """Return the row for people: its origin, and its text or the start of it."""
        lines = [f"=== row {self.row}: {self.source}, {self.shard} from token {self.token} ==="]
        lines += [
            f"  {counted(p.tokens, 'token')} of document {p.document}, from its token {p.offset}: "
            f"{p.file}, {position(p.file, p.row)}"
            for p in self.pieces
        ]
        shown = " ".join(self.text[: 2 * SHOWN_CHARACTERS].split())[:SHOWN_CHARACTERS]
        lines += self.text.split("\n") if whole else [f"  {shown}"]
        return "\n".join(map(printable, lines))


@dataclass(frozen=True)
class _Model:
    block_size: int


@dataclass(frozen=True)
class _Config:
    seed: int
    total_batch_size: int
    model: _Model
    data: tuple[str, ...] = ()
    shuffle_shards: int = 0
    max_steps: int = 0


@dataclass(frozen=True)
class _Run:
    """The part of a run's `config.json` that says what it read."""

    fingerprint: str
    generations: dict[str, int]
    config: _Config
    earlier: tuple[Earlier, ...] = ()


def rows_of(run_dir: Path, step: int, row: int | None, data: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of finished step `step` of a run, as its log counts them, or only one row.

    `data` locates its datasets if they have been moved. Raises FileNotFoundError if there is no
    run, ValueError for a step or row out of range and for other datasets.
    """
    record = _read_run(run_dir)
    config, block_size = record.config, record.config.model.block_size
    rows, last = config.total_batch_size // block_size, _last_step(run_dir, config)
    if not 1 <= step <= last:
        raise ValueError(
            f"expected --step from 1 to {last}, the last step of {run_dir}, found {step}: steps "
            "are counted as in log.txt"
        )
    if row is not None and not 0 <= row < rows:
        raise ValueError(f"expected --row from 0 to {rows - 1}, found {row}")
    mixture = _open_data(record, step, list(data or config.data))
    tokenizer = open_tokenizer(mixture.tokenizer, run_dir, *mixture.locations)
    settings = block_size, config.seed, config.shuffle_shards
    stream = MixedStream(mixture.manifests, mixture.weights, "train", *settings)
    chosen = np.arange(rows) if row is None else np.array([row])
    windows = zip(chosen, *stream.locate((step - 1) * rows + chosen), strict=True)
    sources = [_Source(manifest, tokenizer) for manifest in mixture.manifests]
    for number, source, shard, start in windows:
        name = mixture.components[source].name
        yield sources[source].row(int(number), name, int(shard), int(start), block_size + 1)


def _read_run(run_dir: Path) -> _Run:
    path = run_dir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a run's config.json in {run_dir}, found none: name a run"
        )
    raw = stored_json.read(path, "mygpt-run", (2,), "name another run")
    return stored_json.build(_Run, raw, path, ignore_unknown=True)


def _last_step(run: Path, config: _Config) -> int:
    """Return the last step that log.txt names; without a log, that of the whole run."""
    path = run / "log.txt"
    if not path.is_file():
        return config.max_steps or MAX_STEPS
    return max(map(int, LOGGED_STEP.findall(path.read_bytes())), default=0)


def _open_data(record: _Run, step: int, specs: list[str]) -> Mixture:
    """Open the datasets that a run read at a step."""
    if not specs:
        raise ValueError("expected the run to name its datasets, found none: give --data")
    earlier = [one for one in record.earlier if step <= one.until]
    identity = earlier[0] if earlier else record
    return Mixture.load(specs, identity.generations, expect=identity.fingerprint)


class _Source:
    """The training shards of one dataset with their indexes, read when needed."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer) -> None:
        self._manifest, self._tokenizer = manifest, tokenizer
        self._reader = ShardReader(manifest, "train")
        documents = [shard.documents for shard in self._reader.shards]
        self._documents_before = np.cumsum([0, *documents])
        self._index = lru_cache(maxsize=64)(self._read_index)

    def _read_index(self, shard: int) -> pa.Table:
        return read_index(self._manifest, self._reader.shards[shard])

    def row(self, number: int, source: str, shard: int, start: int, width: int) -> Row:
        """Return the row of `width` tokens from token `start` of a shard on."""
        ids = self._reader.tokens(shard)[start : start + width]
        return Row(
            row=number,
            source=source,
            shard=self._reader.shards[shard].file,
            token=start,
            pieces=list(self._pieces(shard, start, start + width)),
            text=self._tokenizer.decode(ids),
            ids=ids,
        )

    def _pieces(self, shard: int, start: int, end: int) -> Iterator[Piece]:
        index = self._index(shard)
        offsets = index["offset"].to_numpy()
        started = np.cumsum(~index["continued"].to_numpy())
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        for i in range(max(first, 0), int(np.searchsorted(offsets, end))):
            entry = index.slice(i, 1).to_pylist()[0]
            begin = max(start, entry["offset"])
            last = int(offsets[i + 1]) if i + 1 < len(offsets) else end
            # A continued entry belongs to the document that started before it, here or earlier.
            head = int(offsets[max(int(np.searchsorted(started, started[i])), 0)])
            yield Piece(
                document=int(self._documents_before[shard] + started[i] - 1),
                file=self._manifest.sources[entry["source"]].name,
                row=entry["row"],
                offset=begin - head,
                tokens=min(end, last) - begin,
            )
