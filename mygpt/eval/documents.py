"""A split by documents: the losses of each, and the same documents in another vocabulary.

T block size, D documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from mygpt.distributed import DistributedContext
from mygpt.evaluate import Loss, token_losses
from mygpt.model import GPT
from shards.manifest import Manifest, Shard, Split
from shards.reader import EvalWindows, locate_part, open_tokens, read_index
from shards.tokenizer import Tokenizer, open_tokenizer
from shards.writer import open_shard


class DocumentWindows(Sequence[np.ndarray]):
    """The `EvalWindows` of one or several datasets, one after the other, with their documents.

    A target belongs to the document of the token before it, so a document scores its text and the
    `<|endoftext|>` that ends it. A document that continues in the next shard is one, although the
    first token there is no target.

    Attributes: `n_documents`; `text_bytes`, int64 (D,); `dataset`, int64 (D,), an index into
    `manifests`; `source`, int64 (D,), an index into the sources of all manifests, concatenated.
    Raises FileNotFoundError or ValueError as `open_tokens` and `read_index` do.
    """

    def __init__(self, manifests: Sequence[Manifest], split: str, block_size: int) -> None:
        self.block_size = block_size
        self._datasets = [EvalWindows(manifest, split, block_size) for manifest in manifests]
        self._ends = np.cumsum([len(windows) for windows in self._datasets])
        shards = [(one, shard) for one in manifests for shard in one.splits[split].shards]
        indexes = [read_index(*pair) for pair in shards]
        # Of the shards and of the rows of their indexes, all datasets together.
        sizes = [len(manifest.splits[split].shards) for manifest in manifests]
        self._first_shards = np.cumsum([0, *sizes])
        self._first_rows = np.cumsum([0, *map(len, indexes)])
        first_rows = self._first_rows[self._first_shards]  # of each dataset
        rows = pa.concat_tables(indexes)
        self._offsets = rows["offset"].to_numpy()
        is_start = ~rows["continued"].to_numpy()
        is_start[first_rows[:-1]] = True
        self._documents = np.cumsum(is_start) - 1  # of each row
        self.n_documents = int(self._documents[-1]) + 1
        self.text_bytes = np.bincount(self._documents, rows["text_bytes"]).astype(np.int64)
        self.dataset = np.repeat(np.arange(len(manifests)), np.diff(first_rows))[is_start]
        first_sources = np.cumsum([0, *(len(manifest.sources) for manifest in manifests)])
        self.source = rows["source"].to_numpy()[is_start] + first_sources[self.dataset]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        dataset, window = locate_part(self._ends, index)
        return self._datasets[dataset][window]

    def documents(self, index: int) -> np.ndarray:
        """Return the document of each target of window `index`, int64, ascending."""
        dataset, window = locate_part(self._ends, index)
        shard, start = self._datasets[dataset].locate(window)
        shard += int(self._first_shards[dataset])
        rows = slice(int(self._first_rows[shard]), int(self._first_rows[shard + 1]))
        contexts = np.arange(start, start + len(self[index]) - 1)
        return self._documents[rows][np.searchsorted(self._offsets[rows], contexts, "right") - 1]


@dataclass(frozen=True)
class Losses:
    """Nats and targets per document, (D,), and per position in the context, (T,).

    Targets at position t have t + 1 tokens before them. Nats are float64, counts int64.
    """

    nats: np.ndarray
    tokens: np.ndarray
    position_nats: np.ndarray
    position_tokens: np.ndarray

    @property
    def total(self) -> Loss:
        """Loss over all documents."""
        return Loss(float(self.nats.sum()), int(self.tokens.sum()))

    def part(self, documents: np.ndarray) -> "Losses":
        """Return the losses of some documents, without positions."""
        nothing = np.empty(0)
        return Losses(self.nats[documents], self.tokens[documents], nothing, nothing)


def evaluate_documents(
    model: GPT,
    windows: DocumentWindows,
    ranks: DistributedContext,
    batch_size: int | None = None,
    progress: bool = False,
) -> Losses:
    """Like `evaluate`, per document and per position in the context."""
    nats, tokens = np.zeros((2, windows.n_documents))
    position_nats, position_tokens = np.zeros((2, windows.block_size))
    for batch, losses, counted in token_losses(model, windows, ranks, batch_size, progress):
        owners = np.concatenate([windows.documents(i) for i in batch])
        first = owners[0]  # consecutive windows hold consecutive documents
        document_nats = np.bincount(owners - first, weights=losses[counted])
        nats[first : first + len(document_nats)] += document_nats
        tokens[first : first + len(document_nats)] += np.bincount(owners - first)
        position_nats[: losses.shape[1]] += losses.sum(0)
        position_tokens[: losses.shape[1]] += counted.sum(0)
    parts = (nats, tokens, position_nats, position_tokens)
    sums = np.array(ranks.all_reduce_sum(np.concatenate(parts).tolist()))
    nats, tokens, position_nats, position_tokens = np.split(
        sums, np.cumsum([len(part) for part in parts[:-1]])
    )
    return Losses(nats, tokens.astype(np.int64), position_nats, position_tokens.astype(np.int64))


def retokenize(
    manifests: Sequence[Manifest], split: str, tokenizer: Tokenizer, folder: Path
) -> list[Manifest]:
    """Write a split of datasets into `folder` in another vocabulary; return the manifests there.

    So that models of other tokens can be compared, in bits per byte, on the same text. Shards and
    rows of their indexes stay what they are. Raises ValueError for tokens that are not UTF-8 text,
    and as `open_tokenizer` does.
    """
    written = []
    for number, manifest in enumerate(manifests):
        vocabulary = np.array(
            open_tokenizer(manifest.tokenizer, manifest.location).vocabulary(), object
        )
        place, shards = folder / str(number), list[Shard]()
        place.mkdir()
        for shard in manifest.splits[split].shards:
            _rewrite(manifest, shard, vocabulary, tokenizer, place, shards)
        splits = {split: Split(tuple(shards))}
        identity = tokenizer.identity
        written.append(replace(manifest, tokenizer=identity, splits=splits, folder=place, uri=""))
    return written


def _rewrite(
    manifest: Manifest,
    shard: Shard,
    vocabulary: np.ndarray,
    tokenizer: Tokenizer,
    place: Path,
    shards: list[Shard],
) -> None:
    """Write one shard; `vocabulary`, (n_vocab,), holds the bytes of each id that it has now."""
    index, tokens = read_index(manifest, shard), open_tokens(manifest, shard)
    bounds = pairwise([*index["offset"].to_pylist(), len(tokens)])
    offsets = []
    with open_shard(place / shard.file, shards) as writer:
        for (start, end), continued in zip(bounds, index["continued"].to_pylist(), strict=True):
            try:
                text = b"".join(vocabulary[tokens[start:end]]).decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"expected UTF-8 from token {start} of {manifest.location_of(shard.file)} on, "
                    f"found {error.reason}: a model of another vocabulary can't read it; leave out "
                    "--reference"
                ) from None
            offsets.append(writer.tokens)
            writer.write(np.array([] if continued else [tokenizer.eot], np.uint16))
            writer.write(np.array(tokenizer.encode(text), np.uint32))
        moved = index.set_column(0, index.schema.field(0), pa.array(offsets, pa.int64()))
        for batch in moved.to_batches():
            writer.note(batch)
