"""Where the rows of a training step came from: what one asks after a spike of the loss.

A run's `config.json` says which stream it reads; of its documented JSON are used: "fingerprint",
"generations" (source → generation; "generation" in version 1), "earlier" (what these were until
some step), and of "config": "data" (specs, or one folder), "seed", "total_batch_size",
"shuffle_shards", and "block_size" of its "model".
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards import tokenizer
from shards.manifest import Manifest
from shards.reader import ShardReader, read_index
from shards.stream import MixedStream, Mixture

SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Piece:
    """A part of a document that a row holds.

    `document` counts from 0 over the split, as `shards show` does; `file` and `row` say where it
    stood in the input; `offset` is the piece's first token in the document, or in that part of it
    which lies in this shard, counted with its <|endoftext|>.
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

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def as_text(self, whole: bool) -> str:
        """For people: where it is from, and its text or how that begins."""
        lines = [f"=== row {self.row}: {self.source}, {self.shard} from token {self.token} ==="]
        lines += [
            f"  {p.tokens} tokens of document {p.document}, from its token {p.offset}: {p.file}, "
            f"row {p.row}"
            for p in self.pieces
        ]
        if whole:
            return "\n".join([*lines, self.text])
        shown = " ".join(self.text[: 2 * SHOWN_CHARACTERS].split())[:SHOWN_CHARACTERS]
        return "\n".join([*lines, f"  {shown}"])


def rows_of(run: Path, step: int, row: int | None, data: Sequence[str]) -> Iterator[Row]:
    """The rows of finished step `step` of a run, as its log counts them, or only one of them.

    `data` says where its datasets lie now, if not where they lay. Raises FileNotFoundError where
    there is no run, ValueError for a step or row that can't be and for other datasets.
    """
    identity, config = _read_run(run, step)
    block_size = config["model"]["block_size"]
    rows = config["total_batch_size"] // block_size
    if step < 1 or not (row is None or 0 <= row < rows):
        raise ValueError(
            f"expected --step from 1 and --row from 0 to {rows - 1}, found {step} and {row}: "
            "steps are counted as in log.txt"
        )
    mixture = _open(list(data) or _specs(config["data"]), identity)
    seed, groups = config["seed"], config.get("shuffle_shards", 0)
    stream = MixedStream(mixture, "train", block_size, seed, groups)
    chosen = np.arange(rows) if row is None else np.array([row])
    places = zip(chosen, *stream.locate((step - 1) * rows + chosen), strict=True)
    parts = [_Source(manifest) for manifest in mixture.manifests]
    for number, source, shard, start in places:
        name = mixture.components[source].name
        yield parts[source].row(int(number), name, int(shard), int(start), block_size + 1)


def _read_run(run: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's identity at a step, and its settings."""
    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected a run's config.json in {run}, found none: name a run")
    try:
        raw = json.loads(path.read_text("utf-8"))
        config = raw["config"]
        for needed in ("data", "seed", "total_batch_size", "model"):
            config[needed]
        earlier = [one for one in raw.get("earlier", []) if step <= one["until"]]
        return (earlier[0] if earlier else raw), config
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected a run's settings in {path}, found it without {error}") from None


def _specs(data: Any) -> list[str]:
    if not data:
        raise ValueError("the run does not say where its dataset lay: give --data")
    return [data] if isinstance(data, str) else list(data)


def _open(specs: list[str], identity: dict[str, Any]) -> Mixture:
    """The datasets of a run. Raises ValueError for any other."""
    generations = identity.get("generations", {"data": identity.get("generation")})
    mixture = Mixture.load(specs, generations)
    if mixture.fingerprint != identity["fingerprint"]:
        raise ValueError(
            f"expected the fingerprint {identity['fingerprint'][:12]}, that of the run, found "
            f"{mixture.fingerprint[:12]} in {', '.join(specs)}: give --data"
        )
    return mixture


class _Source:
    """One dataset's training shards with their indexes, read when needed."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest, self._reader = manifest, ShardReader(manifest, "train")
        documents = [shard.documents for shard in self._reader.shards]
        self._documents_before = np.cumsum([0, *documents])
        self._index = lru_cache(maxsize=64)(self._read_index)

    def _read_index(self, shard: int) -> pa.Table:
        return read_index(self._manifest, self._reader.shards[shard])

    def row(self, number: int, source: str, shard: int, start: int, width: int) -> Row:
        """The row that begins at token `start` of a shard."""
        coder = tokenizer.load(self._manifest.tokenizer.name)
        ids = self._reader.tokens(shard)[start : start + width]
        return Row(
            row=number,
            source=source,
            shard=self._reader.shards[shard].file,
            token=start,
            pieces=list(self._pieces(shard, start, start + width)),
            text=coder.decode(ids),
        )

    def _pieces(self, shard: int, start: int, end: int) -> Iterator[Piece]:
        index = self._index(shard)
        offsets = index["offset"].to_numpy()
        begins = np.cumsum(~index["continued"].to_numpy())
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        for i in range(max(first, 0), int(np.searchsorted(offsets, end))):
            entry = index.slice(i, 1).to_pylist()[0]
            begin = max(start, entry["offset"])
            last = int(offsets[i + 1]) if i + 1 < len(offsets) else end
            # An entry that goes on is of the document that began before it, here or earlier.
            head = int(offsets[max(int(np.searchsorted(begins, begins[i])), 0)])
            yield Piece(
                document=int(self._documents_before[shard] + begins[i] - 1),
                file=self._manifest.sources[entry["source"]].name,
                row=entry["row"],
                offset=begin - head,
                tokens=min(end, last) - begin,
            )
