"""The global order of windows: of one dataset, and of several mixed by their weights.

A position of the stream is mapped to a window by computation, not by a table, so seeking is O(1)
and no order is held in memory. P positions at once; arrays are int64.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import numpy as np
import orjson

from shards.manifest import Manifest, Shard, TokenizerIdentity
from shards.order import key_of, permute

# Part of the identity of every mixture of several sources, as ORDER_VERSION is of every stream.
MIXTURE_VERSION = 1
SPEC = re.compile(r"([A-Za-z0-9_-]+)=([^:/]*):(.+)")
# Positions are computed in 64 bits: the period of the pattern, squared, must fit.
MAX_PERIOD = 2**31
# Domain separation: keys of group orders and of orders inside a group differ from other keys.
GROUPS, INSIDE = 1, 2


@dataclass(frozen=True)
class Component:
    """One source of a mixture: its name, its weight among the others, and its folder or URI."""

    name: str
    weight: float
    folder: str


def parse(specs: Sequence[str]) -> tuple[Component, ...]:
    """Return the sources that `NAME=WEIGHT:FOLDER` or plain `FOLDER` (weight 1) spell, by name.

    Raises ValueError for no source, a weight that is not a positive number, and a repeated name.
    """
    found = sorted((_component(spec) for spec in specs), key=lambda component: component.name)
    if not found:
        raise ValueError("expected a dataset, found none: give --data FOLDER")
    for one, other in pairwise(found):
        if one.name == other.name:
            raise ValueError(
                f"expected sources of different names, found {one.name!r} twice, in {one.folder} "
                f"and {other.folder}: give --data NAME=WEIGHT:FOLDER"
            )
    integer_weights(found)
    return tuple(found)


def _component(spec: str) -> Component:
    if not (match := SPEC.fullmatch(spec)):
        path = urlsplit(spec).path if "://" in spec else spec
        last = PurePosixPath(path.replace("\\", "/")).name
        return Component(re.sub(r"[^A-Za-z0-9_-]", "-", last) or "data", 1.0, spec)
    name, weight, folder = match.groups()
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(
            f"expected a weight above 0 in {spec!r}, found {weight!r}: "
            "give --data NAME=WEIGHT:FOLDER, such as web=0.7:data/web"
        )
    return Component(name, value, folder)


def integer_weights(components: Sequence[Component]) -> tuple[int, ...]:
    """Return the weights as the smallest integers. Raises ValueError if these are too large."""
    # Of the decimal number as written: 0.7 is seven tenths, not the binary fraction next to it.
    exact = [Fraction(repr(component.weight)) for component in components]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    whole = [weight // math.gcd(*whole) for weight in whole]
    if sum(whole) > MAX_PERIOD:
        raise ValueError(
            f"expected weights whose ratios have fewer digits, found "
            f"{', '.join(f'{c.name}={c.weight:g}' for c in components)}: round them"
        )
    return tuple(whole)


@dataclass(frozen=True)
class Mixture:
    """One or several opened datasets: their components and manifests, both sorted by name."""

    components: tuple[Component, ...]
    manifests: tuple[Manifest, ...]

    @classmethod
    def load(
        cls,
        specs: Sequence[str],
        generations: Mapping[str, int] | None = None,
        expect: str = "",
    ) -> "Mixture":
        """Open the datasets that `specs` name, each up to its generation (by default all of it).

        `expect` is the fingerprint that they must have, by default any. Raises FileNotFoundError or
        ValueError as `parse` and `Manifest.load` do, and ValueError for datasets of different
        tokenizers, generations of other names, or another fingerprint.
        """
        components = parse(specs)
        chosen = _chosen_generations(components, generations)
        mixture = cls(
            components, tuple(Manifest.load(c.folder, chosen[c.name]) for c in components)
        )
        mixture._check_tokenizers()
        if expect and mixture.fingerprint != expect:
            raise ValueError(
                f"expected the dataset with fingerprint {expect[:12]}, found "
                f"{mixture.fingerprint[:12]} in {', '.join(c.folder for c in components)}: give "
                "the dataset that the run was trained on with --data"
            )
        return mixture

    def _check_tokenizers(self) -> None:
        for component, manifest in zip(self.components, self.manifests, strict=True):
            if manifest.tokenizer != self.tokenizer:
                raise ValueError(
                    f"expected the tokenizer {self.tokenizer.name} {self.tokenizer.hash[:12]} of "
                    f"{self.components[0].folder} in {component.folder} too, found "
                    f"{manifest.tokenizer.name} {manifest.tokenizer.hash[:12]}: prepare both with "
                    "the same one"
                )

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of an only dataset; of several a hash of names, weights, fingerprints."""
        if len(self.manifests) == 1:
            return self.manifests[0].fingerprint
        names = [component.name for component in self.components]
        prints = [manifest.fingerprint for manifest in self.manifests]
        sources = list(zip(names, self.weights, prints, strict=True))
        identity = {"mixture": MIXTURE_VERSION, "sources": sources}
        return hashlib.sha256(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS)).hexdigest()

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """The weights as the smallest integers."""
        return integer_weights(self.components)

    @property
    def generations(self) -> dict[str, int]:
        """The generation of each source, by name."""
        pairs = zip(self.components, self.manifests, strict=True)
        return {component.name: manifest.generation for component, manifest in pairs}

    @property
    def tokenizer(self) -> TokenizerIdentity:
        """The tokenizer of all sources."""
        return self.manifests[0].tokenizer

    def tokens(self, split: str) -> int:
        """Return the token count of a split, all sources together."""
        return sum(manifest.splits[split].tokens for manifest in self.manifests)


def _chosen_generations(
    components: Sequence[Component], generations: Mapping[str, int] | None
) -> Mapping[str, int | None]:
    """Return the generation of each source by name. Raises ValueError for other names."""
    names = [component.name for component in components]
    if generations is None:
        return dict.fromkeys(names)
    if len(names) == len(generations) == 1:
        # The name of an only source is that of its folder, which may have been moved.
        return {names[0]: next(iter(generations.values()))}
    if generations.keys() != set(names):
        raise ValueError(
            f"expected the sources {', '.join(sorted(generations))}, found {', '.join(names)}: "
            "give the --data with which the run was started"
        )
    return generations


def interleave(positions: np.ndarray, weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (source, index in that source's own stream) of each position, (P,).

    The index is the number of earlier positions of the same source. It differs from the source's
    share of the positions by at most 1/2 for two sources, and 1/2 more for each doubling of them.
    """
    if len(weights) == 1:
        return np.zeros_like(positions), positions
    middle = len(weights) // 2
    left, total = sum(weights[:middle]), sum(weights)
    before = _scaled(positions, left, total)
    is_left = _scaled(positions + 1, left, total) > before
    sources, indices = np.empty_like(positions), np.empty_like(positions)
    sources[is_left], indices[is_left] = interleave(before[is_left], weights[:middle])
    is_right = ~is_left
    right, inside = interleave((positions - before)[is_right], weights[middle:])
    sources[is_right], indices[is_right] = right + middle, inside
    return sources, indices


def count_before(position: int, weights: Sequence[int]) -> list[int]:
    """Return the number of positions of each source before `position`."""
    if len(weights) == 1:
        return [position]
    middle = len(weights) // 2
    left = int(_scaled(np.array(position), sum(weights[:middle]), sum(weights)))
    return count_before(left, weights[:middle]) + count_before(position - left, weights[middle:])


def _scaled(counts: np.ndarray, part: int, total: int) -> np.ndarray:
    """Return counts * part / total rounded to the nearest integer, without overflow of 64 bits."""
    periods, rest = np.divmod(counts, total)
    return periods * part + (rest * part + total // 2) // total


class WindowStream:
    """Endless stream of the windows of some shards, in a seeded order that differs each epoch.

    With `shuffle_shards` K an epoch is a sequence of groups of K shards, drawn anew each epoch and
    shuffled inside; with 0 all shards are one group.
    """

    def __init__(
        self, shards: Sequence[Shard], block_size: int, seed: int, shuffle_shards: int = 0
    ) -> None:
        tokens = np.array([shard.tokens for shard in shards], np.int64)
        self._windows = np.maximum(tokens - 1, 0) // block_size
        self._ends = np.cumsum(self._windows)
        self._slack = np.maximum(tokens - 1 - self._windows * block_size, 0)
        self.block_size, self.seed, self.shuffle_shards = block_size, seed, shuffle_shards
        self.windows_per_epoch = int(self._ends[-1])
        served = np.where(self._windows, self._windows * block_size + 1, 0)
        self.unused_tokens = int((tokens - served).sum())
        self._grouped = lru_cache(maxsize=4)(self._group)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (shard, first token) of the windows at `indices` of the stream, each (P,)."""
        epochs, within_epoch = np.divmod(indices.astype(np.int64), self.windows_per_epoch)
        if self.shuffle_shards:
            shards, windows = self._locate_in_groups(epochs, within_epoch)
        else:
            keys = key_of(self.seed, epochs)
            chosen = permute(within_epoch, self.windows_per_epoch, keys).astype(np.int64)
            shards = np.searchsorted(self._ends, chosen, side="right")
            windows = chosen - (self._ends - self._windows)[shards]
        # The first window of a shard starts anywhere within the slack, anew each epoch, so that
        # other tokens are left out and block boundaries move.
        phases = key_of(self.seed, epochs, shards) % (self._slack[shards] + 1).astype(np.uint64)
        return shards, windows * self.block_size + phases.astype(np.int64)

    def ahead(self, index: int) -> Iterator[int]:
        """Yield the shards of the group of window `index`, then those of the next group."""
        if not self.shuffle_shards:
            yield from range(len(self._ends))
            return
        epoch, within_epoch = divmod(index, self.windows_per_epoch)
        order, _, group_ends = self._grouped(epoch)
        group = int(np.searchsorted(group_ends, within_epoch, side="right"))
        first = group * self.shuffle_shards
        yield from order[first : first + 2 * self.shuffle_shards].tolist()
        if group + 1 >= len(group_ends):
            yield from self._grouped(epoch + 1)[0][: self.shuffle_shards].tolist()

    def _locate_in_groups(
        self, epochs: np.ndarray, within_epoch: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (shard, window in it) of positions within their epochs, each (P,)."""
        shards, windows = np.empty_like(within_epoch), np.empty_like(within_epoch)
        for epoch in np.unique(epochs).tolist():
            order, ends, group_ends = self._grouped(epoch)
            own = np.flatnonzero(epochs == epoch)
            groups = np.searchsorted(group_ends, within_epoch[own], side="right")
            for group in np.unique(groups).tolist():
                members = own[groups == group]
                first = int(group_ends[group - 1]) if group else 0
                key = key_of(self.seed, epoch, INSIDE, group)
                inside = permute(within_epoch[members] - first, int(group_ends[group]) - first, key)
                chosen = first + inside.astype(np.int64)
                nth = np.searchsorted(ends, chosen, side="right")
                shards[members] = order[nth]
                windows[members] = chosen - (ends - self._windows[order])[nth]
        return shards, windows

    def _group(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the shards in an epoch's order, and the window at which each shard, group ends."""
        count = len(self._ends)
        order = permute(np.arange(count), count, key_of(self.seed, epoch, GROUPS)).astype(np.int64)
        ends = np.cumsum(self._windows[order])
        lasts = np.arange(self.shuffle_shards, count + self.shuffle_shards, self.shuffle_shards)
        return order, ends, ends[np.minimum(lasts, count) - 1]


class MixedStream:
    """Endless stream of one split of a mixture, each source in the order of its own stream.

    Raises ValueError for a source without a single window.
    """

    def __init__(
        self, mixture: Mixture, split: str, block_size: int, seed: int, shuffle_shards: int = 0
    ) -> None:
        self._weights = mixture.weights
        self.streams = [
            WindowStream(manifest.splits[split].shards, block_size, seed, shuffle_shards)
            for manifest in mixture.manifests
        ]
        for manifest, stream in zip(mixture.manifests, self.streams, strict=True):
            if not stream.windows_per_epoch:
                longest = max(shard.tokens for shard in manifest.splits[split].shards)
                raise ValueError(
                    f"expected a {split} shard with more than {block_size} tokens in "
                    f"{manifest.location}, found at most {longest}: prepare more text, or use a "
                    "shorter --block-size, or choose the validation text by --split position, "
                    "--val-fraction or --val-source"
                )

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (source, shard, first token) of the windows at `positions`, each (P,)."""
        sources, indices = interleave(positions.astype(np.int64), self._weights)
        shards, starts = np.empty_like(sources), np.empty_like(sources)
        for number, stream in enumerate(self.streams):
            own = sources == number
            shards[own], starts[own] = stream.locate(indices[own])
        return sources, shards, starts

    def ahead(self, position: int) -> list[Iterator[int]]:
        """Return, for each source, the shards that are read next from `position`."""
        counts = count_before(position, self._weights)
        return [stream.ahead(count) for stream, count in zip(self.streams, counts, strict=True)]
