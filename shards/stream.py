"""Which window lies at a position of the stream: of one dataset, and of several by their weights.

A position is worked out, not looked up, so seeking costs nothing and no order is held in memory.
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

# --- Several datasets as one: `--data web=0.7:data/web --data code=0.3:data/code`.


# Part of the identity of every stream of several sources, as ORDER_VERSION is of every stream.
MIXTURE_VERSION = 1
SPEC = re.compile(r"([A-Za-z0-9_-]+)=([^:/]*):(.+)")
# Places are worked out in 64 bits: a period of the pattern, squared, must fit.
MAX_PERIOD = 2**31


@dataclass(frozen=True)
class Component:
    """One source of a stream: its name, its weight among the others, and where it lies."""

    name: str
    weight: float
    folder: str


def parse(specs: Sequence[str]) -> tuple[Component, ...]:
    """The sources that `NAME=WEIGHT:FOLDER` or plain `FOLDER` (weight 1) spell out, by name.

    Raises ValueError for none, for a weight that is no positive number, and for a name twice.
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
    """One source, as its spec has it."""
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
    """The weights in the smallest whole numbers. Raises ValueError where these are too large."""
    # Of the decimal number as written: 0.7 is seven tenths, not the binary fraction next to it.
    exact = [Fraction(repr(component.weight)) for component in components]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    whole = [weight // math.gcd(*whole) for weight in whole]
    if sum(whole) > MAX_PERIOD:
        raise ValueError(
            f"expected weights whose ratios are of fewer digits, found "
            f"{', '.join(f'{c.name}={c.weight:g}' for c in components)}: round them"
        )
    return tuple(whole)


@dataclass(frozen=True)
class Mixture:
    """The sources of a stream and their manifests, both sorted by name."""

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
        chosen: Mapping[str, int | None] = dict.fromkeys(c.name for c in components)
        if generations is not None:
            if len(components) == len(generations) == 1:
                # The name of an only source is that of its folder, which may be moved.
                chosen = {components[0].name: next(iter(generations.values()))}
            elif generations.keys() != chosen.keys():
                raise ValueError(
                    f"expected the sources {', '.join(sorted(generations))}, found "
                    f"{', '.join(chosen)}: give the --data that the run began with"
                )
            else:
                chosen = generations
        manifests = tuple(Manifest.load(c.folder, chosen[c.name]) for c in components)
        for component, manifest in zip(components, manifests, strict=True):
            if manifest.tokenizer != manifests[0].tokenizer:
                raise ValueError(
                    f"expected the tokenizer {manifests[0].tokenizer.name} "
                    f"{manifests[0].tokenizer.hash[:12]} of {components[0].folder} in "
                    f"{component.folder} too, found {manifest.tokenizer.name} "
                    f"{manifest.tokenizer.hash[:12]}: prepare both with the same one"
                )
        mixture = cls(components, manifests)
        if expect and mixture.fingerprint != expect:
            raise ValueError(
                f"expected the dataset with fingerprint {expect[:12]}, found "
                f"{mixture.fingerprint[:12]} in {', '.join(c.folder for c in components)}: give "
                "the dataset that the run was trained on with --data"
            )
        return mixture

    @cached_property
    def fingerprint(self) -> str:
        """Of one dataset its own; of several the hash of their names, weights and fingerprints."""
        if len(self.manifests) == 1:
            return self.manifests[0].fingerprint
        names = [component.name for component in self.components]
        prints = [manifest.fingerprint for manifest in self.manifests]
        sources = list(zip(names, self.weights, prints, strict=True))
        identity = {"mixture": MIXTURE_VERSION, "sources": sources}
        return hashlib.sha256(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS)).hexdigest()

    @property
    def weights(self) -> tuple[int, ...]:
        """The weights in the smallest whole numbers."""
        return integer_weights(self.components)

    @property
    def generations(self) -> dict[str, int]:
        """The generation of each source, by name."""
        pairs = zip(self.components, self.manifests, strict=True)
        return {component.name: manifest.generation for component, manifest in pairs}

    @property
    def tokenizer(self) -> TokenizerIdentity:
        """The tokenizer that made the tokens of all of them."""
        return self.manifests[0].tokenizer

    def tokens(self, split: str) -> int:
        """Token ids of a split, all sources together."""
        return sum(manifest.splits[split].tokens for manifest in self.manifests)

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the documents of a split, all sources together."""
        return sum(manifest.splits[split].text_bytes for manifest in self.manifests)


def share_out(places: np.ndarray, weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(source, index) of each place of a stream, all int64 of the same shape (n,).

    `index` is how often the source was taken before. It differs from the source's share of the
    places by at most 1/2 for two sources, and 1/2 more with each doubling of their number.
    """
    if len(weights) == 1:
        return np.zeros_like(places), places
    middle = len(weights) // 2
    left, total = sum(weights[:middle]), sum(weights)
    before = _share(places, left, total)
    is_left = _share(places + 1, left, total) > before
    sources, indices = np.empty_like(places), np.empty_like(places)
    sources[is_left], indices[is_left] = share_out(before[is_left], weights[:middle])
    is_right = ~is_left
    right, inside = share_out((places - before)[is_right], weights[middle:])
    sources[is_right], indices[is_right] = right + middle, inside
    return sources, indices


def count_before(place: int, weights: Sequence[int]) -> list[int]:
    """How often each source is taken before `place`."""
    if len(weights) == 1:
        return [place]
    middle = len(weights) // 2
    left = int(_share(np.array(place), sum(weights[:middle]), sum(weights)))
    return count_before(left, weights[:middle]) + count_before(place - left, weights[middle:])


def _share(places: np.ndarray, part: int, total: int) -> np.ndarray:
    """part / total of each number of places, rounded to the nearest, without leaving 64 bits."""
    periods, rest = np.divmod(places, total)
    return periods * part + (rest * part + total // 2) // total


# Told apart from the keys of windows and of phases.
GROUPS, INSIDE = 1, 2


class WindowStream:
    """The windows of some shards in a seeded order that is another in each epoch.

    With `shuffle_shards` K the order of an epoch is that of groups of K shards, put together anew
    in each epoch, one group after the other, shuffled inside; with 0 all shards are one group.
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
        """(shard, first token) of the windows at `indices` of the stream, each int64 (n,)."""
        epochs, places = np.divmod(indices.astype(np.int64), self.windows_per_epoch)
        if self.shuffle_shards:
            shards, within = self._locate_in_groups(epochs, places)
        else:
            keys = key_of(self.seed, epochs)
            windows = permute(places, self.windows_per_epoch, keys).astype(np.int64)
            shards = np.searchsorted(self._ends, windows, side="right")
            within = windows - (self._ends - self._windows)[shards]
        # The tokens that no window holds are others in each epoch: the first window begins
        # anywhere within them, so that block boundaries move too.
        phases = key_of(self.seed, epochs, shards) % (self._slack[shards] + 1).astype(np.uint64)
        return shards, within * self.block_size + phases.astype(np.int64)

    def ahead(self, index: int) -> Iterator[int]:
        """The shards of the group that window `index` is in, then those of the next."""
        if not self.shuffle_shards:
            yield from range(len(self._ends))
            return
        epoch, place = divmod(index, self.windows_per_epoch)
        order, _, group_ends = self._grouped(epoch)
        group = int(np.searchsorted(group_ends, place, side="right"))
        first = group * self.shuffle_shards
        yield from order[first : first + 2 * self.shuffle_shards].tolist()
        if group + 1 >= len(group_ends):
            yield from self._grouped(epoch + 1)[0][: self.shuffle_shards].tolist()

    def _locate_in_groups(
        self, epochs: np.ndarray, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(shard, window within it) of places in an epoch."""
        shards, within = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            order, ends, group_ends = self._grouped(epoch)
            own = np.flatnonzero(epochs == epoch)
            groups = np.searchsorted(group_ends, places[own], side="right")
            for group in np.unique(groups).tolist():
                rows = own[groups == group]
                first = int(group_ends[group - 1]) if group else 0
                key = key_of(self.seed, epoch, INSIDE, group)
                inside = permute(places[rows] - first, int(group_ends[group]) - first, key)
                windows = first + inside.astype(np.int64)
                nth = np.searchsorted(ends, windows, side="right")
                shards[rows] = order[nth]
                within[rows] = windows - (ends - self._windows[order])[nth]
        return shards, within

    def _group(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order of the shards in an epoch; the windows up to the end of each, of each group."""
        count = len(self._ends)
        order = permute(np.arange(count), count, key_of(self.seed, epoch, GROUPS)).astype(np.int64)
        ends = np.cumsum(self._windows[order])
        lasts = np.arange(self.shuffle_shards, count + self.shuffle_shards, self.shuffle_shards)
        return order, ends, ends[np.minimum(lasts, count) - 1]


class MixedStream:
    """The windows of one split of a mixture, each source in the order of its own stream.

    Raises ValueError for a source without a window, since its turn would come.
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
                    f"{manifest.folder}, found at most {longest}: prepare more text, or use a "
                    "shorter --block-size, or choose the validation text by --split position, "
                    "--val-fraction or --val-source"
                )

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, shard, first token) of the windows at `positions`, each int64 (n,)."""
        sources, indices = share_out(positions.astype(np.int64), self._weights)
        shards, starts = np.empty_like(sources), np.empty_like(sources)
        for number, stream in enumerate(self.streams):
            own = sources == number
            shards[own], starts[own] = stream.locate(indices[own])
        return sources, shards, starts

    def ahead(self, position: int) -> list[Iterator[int]]:
        """The shards of each source that are read from `position` on: its group's, the next's."""
        counts = count_before(position, self._weights)
        return [stream.ahead(count) for stream, count in zip(self.streams, counts, strict=True)]
