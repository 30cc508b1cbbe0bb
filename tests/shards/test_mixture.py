"""Several sources in one stream: exact shares, each source's own order, one identity."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.loader import TokenLoader
from shards.manifest import Manifest, TokenizerIdentity
from shards.mixture import Component, Mixture, integer_weights
from shards.mixture import parse_data_specs as parse
from shards.stream import interleave
from tests.shards.support import arange_dataset, grown, write_dataset

WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=9)


# Who takes which position


@given(weights=WEIGHTS, start=st.integers(0, 2**40))
def test_each_source_counts_its_own_windows(weights: list[int], start: int) -> None:
    positions = np.arange(start, start + 500)
    sources, indices = interleave(positions, weights)
    assert sources.min() >= 0 and sources.max() < len(weights)
    for number in range(len(weights)):
        own = indices[sources == number]
        assert (np.diff(own) == 1).all(), "one after the other, none left out"


@given(weights=WEIGHTS, start=st.integers(0, 2**40))
def test_shares_are_exact_to_a_small_constant(weights: list[int], start: int) -> None:
    positions = np.arange(start, start + 300)
    sources, indices = interleave(positions, weights)
    bound = Fraction((len(weights) - 1).bit_length(), 2)
    for position, source, index in zip(positions, sources, indices, strict=True):
        share = Fraction(weights[source], sum(weights)) * int(position)
        assert abs(int(index) - share) <= bound


@given(weights=WEIGHTS)
def test_the_first_place_is_the_first_of_its_source(weights: list[int]) -> None:
    sources, indices = interleave(np.arange(sum(weights)), weights)
    assert np.bincount(sources, minlength=len(weights)).tolist() == weights, "a whole period"
    for number in range(len(weights)):
        assert indices[sources == number][0] == 0


def test_far_places_with_long_weights() -> None:
    weights = (2**30 + 1, 2**30 - 3)
    positions = np.array([0, 10**18, 2**62])
    sources, indices = interleave(positions, weights)
    for position, source, index in zip(positions, sources, indices, strict=True):
        assert abs(int(index) - Fraction(int(position) * weights[source], 2**31 - 2)) <= 1


# How sources are named


def test_specs() -> None:
    assert parse(["data/web"]) == (Component("web", 1, "data/web"),)
    assert parse(["/a/b c.d/"]) == (Component("b-c-d", 1, "/a/b c.d/"),)
    assert parse(["s3://bucket/web?region=x"]) == (Component("web", 1, "s3://bucket/web?region=x"),)
    assert parse(["s3://bucket"])[0].name == parse(["."])[0].name == "data"
    assert parse(["web=0.7:data/web", "code=3e-1:s3://b/code:x"]) == (
        Component("code", 0.3, "s3://b/code:x"),
        Component("web", 0.7, "data/web"),
    )
    assert parse(["a=1/x"]) == (Component("x", 1, "a=1/x"),)
    assert [c.name for c in parse(["b", "a"])] == ["a", "b"]


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([], "expected a dataset, found none"),
        (["web=0:x"], "a weight above 0 .* found '0'"),
        (["web=-1:x"], "a weight above 0"),
        (["web=nan:x"], "a weight above 0"),
        (["web=inf:x"], "a weight above 0"),
        (["web=:x"], "a weight above 0"),
        (["web=much:x"], "a weight above 0 .* found 'much'"),
        (["a/web", "b/web"], "different names, found 'web' twice, in a/web and b/web"),
        (["a=1:x", "a=2:x"], "different names"),
        (["a=0.1234567891234:x", "b=1:y"], "fewer digits, found a=0.123457, b=1"),
    ],
)
def test_specs_that_can_not_be(specs: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse(specs)
    assert "\n" not in str(caught.value)


def test_weights_are_the_decimals_as_written() -> None:
    assert integer_weights(parse(["a=0.7:x", "b=0.3:y"])) == (7, 3)
    assert integer_weights(parse(["a=70:x", "b=3e1:y"])) == (7, 3)
    assert integer_weights(parse(["a=0.1:x", "b=0.2:y", "c=0.7:z"])) == (1, 2, 7)
    assert integer_weights(parse(["a=5:x"])) == (1,)


# The stream


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two datasets whose ids say where a token lies, those of the second from 1,000 on."""
    made = {name: tmp_path_factory.mktemp("mixed") / name for name in ("code", "web")}
    arange_dataset(made["code"], (50, 9, 33), (20,))
    far = [np.arange(1000, 1090), np.arange(1090, 1100), np.arange(1100, 1250)]
    write_dataset(made["web"], {"train": far, "val": [np.arange(2000, 2050)]})
    return made


def specs(folders: dict[str, Path], web: float = 0.7, code: float = 0.3) -> list[str]:
    return [f"web={web}:{folders['web']}", f"code={code}:{folders['code']}"]


def windows(loader: TokenLoader, batches: int) -> np.ndarray:
    taken = [torch.cat([x, y[:, -1:]], 1) for x, y in islice(loader, batches)]
    return torch.cat(taken).numpy()


def firsts(data: str | Path | Sequence[str], count: int, block: int = 8) -> list[int]:
    return windows(TokenLoader(data, "train", count, block), 1)[:, 0].tolist()


def test_each_source_is_served_in_its_own_order(folders: dict[str, Path]) -> None:
    mixed = firsts(specs(folders), 200)
    code, web = ([f for f in mixed if (f >= 1000) == far] for far in (False, True))
    assert (len(code), len(web)) == (60, 140), "by weight, not by size"
    assert code == firsts(folders["code"], 60) and web == firsts(folders["web"], 140)


@settings(max_examples=30)
@given(
    batch=st.integers(1, 5),
    world=st.sampled_from([1, 2, 3, 8]),
    batches=st.integers(1, 6),
    web=st.integers(1, 9),
    groups=st.integers(0, 3),
)
def test_ranks_together_are_the_one_rank_stream(
    folders: dict[str, Path], batch: int, world: int, batches: int, web: int, groups: int
) -> None:
    data = specs(folders, web, 3)

    def loader(rows: int, rank: int = 0, of: int = 1) -> TokenLoader:
        return TokenLoader(data, "train", rows, 8, rank, of, shuffle_shards=groups)

    taken = [windows(loader(batch, rank, world), batches) for rank in range(world)]
    together = np.stack([part.reshape(batches, batch, 9) for part in taken], 1).reshape(-1, 9)
    assert np.array_equal(together, windows(loader(batch * world), batches))


def test_restored_at_every_step_it_goes_on_the_same(folders: dict[str, Path]) -> None:
    data = specs(folders)
    whole = windows(TokenLoader(data, "train", 3, 8), 30).reshape(30, 3, 9)
    running = TokenLoader(data, "train", 3, 8)
    for step in range(29):
        resumed = TokenLoader(list(reversed(data)), "train", 3, 8)  # as if named in another order
        resumed.load_state_dict(running.state_dict())
        assert np.array_equal(windows(resumed, 1), whole[step])
        assert np.array_equal(windows(running, 1), whole[step])


def test_a_mixture_of_one_is_the_dataset(folders: dict[str, Path]) -> None:
    plain = TokenLoader(folders["web"], "train", 4, 8)
    named = TokenLoader(Mixture.load([f"any=3:{folders['web']}"], {"old": 0}), "train", 4, 8)
    assert named.state_dict() == plain.state_dict()
    assert named.mixture.fingerprint == Manifest.load(folders["web"]).fingerprint
    assert np.array_equal(windows(named, 5), windows(plain, 5))


# Identity


def test_the_fingerprint_is_of_names_weights_and_datasets(folders: dict[str, Path]) -> None:
    data = specs(folders)
    own = Mixture.load(data).fingerprint
    assert Mixture.load(list(reversed(data))).fingerprint == own
    assert Mixture.load(specs(folders, 70, 30)).fingerprint == own, "the same shares"
    others = [
        specs(folders, 0.6, 0.4),
        [data[0].replace("web=", "www="), data[1]],
        [data[0], f"code=0.3:{folders['web']}"],
    ]
    assert len({own, *(Mixture.load(other).fingerprint for other in others)}) == 4
    state = TokenLoader(data, "train", 1, 8).state_dict()
    for other in others:
        with pytest.raises(ValueError, match="with fingerprint"):
            TokenLoader(other, "train", 1, 8).load_state_dict(state)


def test_totals_and_names(folders: dict[str, Path]) -> None:
    mixture = Mixture.load(specs(folders))
    assert [c.name for c in mixture.components] == ["code", "web"]
    assert mixture.tokens("train") == 92 + 250 and mixture.tokens("val") == 70
    assert mixture.generations == {"code": 0, "web": 0}
    assert mixture.tokenizer == Manifest.load(folders["web"]).tokenizer
    loader = TokenLoader(specs(folders), "train", 1, 8)
    assert loader.windows_per_epoch == 6 + 1 + 4 + 11 + 1 + 18
    assert loader.unused_tokens == 342 - sum(8 * n + 1 for n in (6, 1, 4, 11, 1, 18))


def test_generations_by_name(tmp_path: Path) -> None:
    grown(arange_dataset(tmp_path / "web", (50, 50)), (0, 1))
    arange_dataset(tmp_path / "code", (30,))
    data = [str(tmp_path / "web"), str(tmp_path / "code")]
    now = Mixture.load(data)
    then = Mixture.load(data, {"web": 0, "code": 0})
    assert now.generations == {"code": 0, "web": 1} and then.generations["web"] == 0
    assert now.fingerprint != then.fingerprint
    assert Mixture.load(data, now.generations).fingerprint == now.fingerprint
    with pytest.raises(ValueError, match="expected the sources books, web, found code, web"):
        Mixture.load(data, {"web": 0, "books": 0})


def test_another_fingerprint_than_expected_is_refused(folders: dict[str, Path]) -> None:
    own = Mixture.load(specs(folders)).fingerprint
    assert Mixture.load(specs(folders), expect=own).fingerprint == own
    with pytest.raises(ValueError, match=rf"fingerprint {'0' * 12}, found {own[:12]} in .*--data"):
        Mixture.load(specs(folders), expect="0" * 64)


def test_sources_of_two_tokenizers_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": [[1, 2]]}, TokenizerIdentity("other", 9, 8, "f" * 64))
    with pytest.raises(ValueError, match=r"expected the tokenizer .* in .*found other ffff"):
        Mixture.load([*specs(folders), f"more=1:{tmp_path}"])


def test_a_source_without_a_window_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    arange_dataset(tmp_path, (5,))
    with pytest.raises(ValueError, match=f"more than 8 tokens in {tmp_path}, found at most 5"):
        TokenLoader([*specs(folders), f"tiny=0.001:{tmp_path}"], "train", 1, 8)


def test_a_source_that_is_not_there_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Mixture.load([*specs(folders), f"more=1:{tmp_path / 'nowhere'}"])
