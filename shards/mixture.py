"""Opened datasets: one, or several mixed by their weights, `--data NAME=WEIGHT:FOLDER`."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import orjson

from shards.manifest import Manifest, TokenizerIdentity

# Part of the identity of every mixture of several sources, as ORDER_VERSION is of every stream.
MIXTURE_VERSION = 1
SPEC = re.compile(r"([A-Za-z0-9_-]+)=([^:/]*):(.+)")
# Positions are computed in 64 bits: the period of the pattern, squared, must fit.
MAX_PERIOD = 2**31


@dataclass(frozen=True)
class Component:
    """One source of a mixture: its name, its weight among the others, and its folder or URI."""

    name: str
    weight: float
    folder: str


def parse_data_specs(specs: Sequence[str]) -> tuple[Component, ...]:
    """Return the sources that `NAME=WEIGHT:FOLDER` or plain `FOLDER` (weight 1) spell, by name.

    Raises ValueError for no source, a weight that is not a positive number, and a repeated name.
    """
    components = sorted((_component(spec) for spec in specs), key=lambda component: component.name)
    if not components:
        raise ValueError("expected a dataset, found none: give --data FOLDER")
    for one, other in pairwise(components):
        if one.name == other.name:
            raise ValueError(
                f"expected sources of different names, found {one.name!r} twice, in {one.folder} "
                f"and {other.folder}: give --data NAME=WEIGHT:FOLDER"
            )
    integer_weights(components)
    return tuple(components)


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
    integers = [int(weight * scale) for weight in exact]
    integers = [weight // math.gcd(*integers) for weight in integers]
    if sum(integers) > MAX_PERIOD:
        raise ValueError(
            f"expected weights whose ratios have fewer digits, found "
            f"{', '.join(f'{c.name}={c.weight:g}' for c in components)}: round them"
        )
    return tuple(integers)


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

        `expect` is the fingerprint that they must have, by default any. Raises FileNotFoundError if
        one is not there, and ValueError for a damaged one, for different tokenizers, generations
        of other names, or another fingerprint.
        """
        components = parse_data_specs(specs)
        chosen = _chosen_generations(components, generations)
        try:
            manifests = tuple(Manifest.load(c.folder, chosen[c.name]) for c in components)
        except FileNotFoundError:
            if not expect:
                raise
            raise FileNotFoundError(
                f"expected the run's dataset, {expect[:12]}, in "
                f"{', '.join(c.folder for c in components)}, found none: if it was moved, give its "
                "folder with --data"
            ) from None
        mixture = cls(components, manifests)
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
        fingerprints = [manifest.fingerprint for manifest in self.manifests]
        sources = list(zip(names, self.weights, fingerprints, strict=True))
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
    def locations(self) -> list[str]:
        """The folders or URIs of the sources."""
        return [manifest.location for manifest in self.manifests]

    @property
    def tokenizer(self) -> TokenizerIdentity:
        """The tokenizer of all sources."""
        return self.manifests[0].tokenizer

    def tokens(self, split: str) -> int:
        """Return the token count of a split, all sources together."""
        return sum(manifest.splits[split].tokens for manifest in self.manifests)


@dataclass(frozen=True)
class Earlier:
    """What a run's datasets were up to the step `until`, before they moved to later generations."""

    until: int
    fingerprint: str
    generations: dict[str, int]


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
