"""Whose tokens an evaluation scores: the document and the source of every target of a split."""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from shards.manifest import Manifest
from shards.reader import EvalWindows, read_index


class DocumentWindows:
    """The exact cover of a split of one or several datasets, and the document of each target.

    Windows are those of `EvalWindows`, one dataset after the other. A target belongs to the
    document of the token before it: so a document has its text and the `<|endoftext|>` that ends
    it. One that goes on in the next shard is still one, though the first token there is no target.

    Attributes, D documents: `n_documents`; `text_bytes`, int64 (D,); `dataset`, int64 (D,), the
    index into `manifests`; `source`, int64 (D,), the index into the sources of all manifests, one
    list after the other. Raises FileNotFoundError or ValueError for shards and indexes that are
    missing or not as their manifest says.
    """

    def __init__(self, manifests: Sequence[Manifest], split: str, block_size: int) -> None:
        self.block_size = block_size
        self._parts = [_Part(manifest, split, block_size) for manifest in manifests]
        self._ends = np.cumsum([len(part.windows) for part in self._parts])
        sizes = [len(part.source) for part in self._parts]
        self._first_documents = np.cumsum([0, *sizes])
        self.n_documents = int(self._first_documents[-1])
        self.text_bytes = np.concatenate([part.text_bytes for part in self._parts])
        self.dataset = np.repeat(np.arange(len(sizes)), sizes)
        first_sources = np.cumsum([0, *(len(manifest.sources) for manifest in manifests)])
        self.source = np.concatenate([part.source for part in self._parts])
        self.source = self.source + first_sources[self.dataset]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[np.ndarray]:
        return chain.from_iterable(part.windows for part in self._parts)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part, within = self._place(index)
        return self._parts[part].windows[within]

    def documents(self, index: int) -> np.ndarray:
        """The document of each target of window `index`, int64, ascending."""
        part, within = self._place(index)
        return self._first_documents[part] + self._parts[part].documents(within)

    def _place(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)


class _Part:
    """One dataset of them; documents are counted from 0."""

    def __init__(self, manifest: Manifest, split: str, block_size: int) -> None:
        self.windows = EvalWindows(manifest, split, block_size)
        self.block_size = block_size
        shards = manifest.splits[split].shards
        # Where each shard's windows end, as EvalWindows cuts it.
        targets = np.array([max(shard.tokens - 1, 0) for shard in shards])
        self._window_ends = np.cumsum(-(-targets // block_size))
        indexes = [read_index(manifest, shard) for shard in shards]
        self._row_ends = np.cumsum([len(index) for index in indexes])
        columns = {
            name: np.concatenate([index[name].to_numpy() for index in indexes])
            for name in ("offset", "source", "text_bytes", "continued")
        }
        self._offsets = columns["offset"]
        begins = ~columns["continued"]
        begins[:1] = True
        self._documents = np.cumsum(begins) - 1
        self.source = columns["source"][begins]
        self.text_bytes = np.bincount(self._documents, columns["text_bytes"]).astype(np.int64)

    def documents(self, index: int) -> np.ndarray:
        """The document of each target of one window."""
        shard = int(np.searchsorted(self._window_ends, index, side="right"))
        first_window = int(self._window_ends[shard - 1]) if shard else 0
        first_row = int(self._row_ends[shard - 1]) if shard else 0
        rows = slice(first_row, int(self._row_ends[shard]))
        start = (index - first_window) * self.block_size
        before = np.arange(start, start + len(self.windows[index]) - 1)
        found = np.searchsorted(self._offsets[rows], before, side="right") - 1
        return self._documents[rows][found]
