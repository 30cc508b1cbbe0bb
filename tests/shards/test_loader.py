"""Every window once, one cursor (promises 4 and 5), on shards whose ids say where they lie."""

import copy
import json
import pickle
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from re import escape
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import loader as loader_module
from shards.checks import check
from shards.loader import TokenLoader
from shards.manifest import Manifest
from shards.mixture import Mixture
from shards.reader import BackgroundCheck
from tests.shards.support import arange_dataset, grown, write_dataset

# Lengths of train shards; ids count on over them, so a token's id is its place in the split.
RAGGED = {
    "one": (101,),
    "equal": (65, 65, 65),
    "ragged": (3, 64, 1, 250, 17, 33, 16, 2, 129),
    "one_large": (9, 2000, 8, 7),
    "many": tuple(range(2, 60)),
}


@pytest.fixture(scope="module", autouse=True)
def _plan_little() -> Iterator[None]:
    """64 ranks in one process, each reading thousands of rows ahead, would only take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "READ_TOKENS", 512)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in RAGGED}
    for name, lengths in RAGGED.items():
        arange_dataset(made[name], lengths)
    return made


def rows(loader: TokenLoader, batches: int) -> np.ndarray:
    """The windows of the next batches, (batches * B, T + 1)."""
    taken = list(islice(loader, batches))
    for x, y in taken:
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape == (loader.batch_size, loader.block_size)
    return np.concatenate([torch.cat([x, y[:, -1:]], 1).numpy() for x, y in taken])


def stream(folder: Path, windows: int, block_size: int, seed: int = 0) -> np.ndarray:
    """The first windows of the one-rank stream, (windows, T + 1)."""
    return rows(TokenLoader(folder, "train", windows, block_size, seed=seed), 1)


def ranks(
    folder: Path, batch: int, block: int, world: int, seed: int = 0, groups: int = 0
) -> list[TokenLoader]:
    return [
        TokenLoader(folder, "train", batch, block, rank, world, seed, shuffle_shards=groups)
        for rank in range(world)
    ]


def together(loaders: list[TokenLoader], batches: int) -> np.ndarray:
    """What all ranks hand out, batch by batch and rank by rank: the global stream."""
    taken = [rows(loader, batches) for loader in loaders]  # each (batches * B, T + 1)
    batch, width = loaders[0].batch_size, loaders[0].block_size + 1
    by_rank = np.stack([part.reshape(batches, batch, width) for part in taken], 1)
    return by_rank.reshape(-1, width)


def check_epoch(windows: np.ndarray, lengths: tuple[int, ...], block: int) -> list[int]:
    """That these windows are one epoch: every window once. Returns each shard's phase."""
    assert (np.diff(windows, axis=1) == 1).all(), "a window runs on, inside one shard"
    ends = np.cumsum(lengths)
    expected, phases = set[int](), []
    starts = windows[:, 0]
    for first, end in zip(ends - lengths, ends, strict=True):
        count = max(end - first - 1, 0) // block
        inside = starts[(starts >= first) & (starts < end)]
        assert len(inside) == count
        if count:
            phases.append(int(inside.min() - first))
            assert 0 <= phases[-1] <= end - first - 1 - count * block, "within the slack"
            expected |= set(range(inside.min(), inside.min() + count * block))
    # Targets are ids, ids are positions: coverage is one equality of sets, and of sizes.
    targets = windows[:, 1:].ravel() - 1
    assert set(targets.tolist()) == expected
    assert targets.size == len(expected)
    return phases


@settings(max_examples=30)
@given(
    name=st.sampled_from(sorted(RAGGED)),
    batch=st.integers(1, 7),
    block=st.integers(1, 24),
    world=st.integers(1, 64),
    seed=st.integers(0, 2**40),
)
def test_every_window_once_an_epoch_across_ranks(
    folders: dict[str, Path], name: str, batch: int, block: int, world: int, seed: int
) -> None:
    loaders = ranks(folders[name], batch, block, world, seed)
    epoch = loaders[0].windows_per_epoch
    assert epoch == sum(max(length - 1, 0) // block for length in RAGGED[name])
    windows = together(loaders, -(-2 * epoch // (batch * world)))
    # Batches straddle the epoch's edge where it is no multiple of the global batch.
    check_epoch(windows[:epoch], RAGGED[name], block)
    check_epoch(windows[epoch : 2 * epoch], RAGGED[name], block)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    block=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_every_window_once_for_any_shards(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], block: int, seed: int
) -> None:
    if max(lengths) <= block:
        lengths.append(block + 1)
    folder = tmp_path_factory.mktemp("any")
    arange_dataset(folder, lengths)
    epoch = TokenLoader(folder, "train", 1, block).windows_per_epoch
    check_epoch(stream(folder, epoch, block, seed), tuple(lengths), block)


@settings(max_examples=25)
@given(
    name=st.sampled_from(sorted(RAGGED)),
    batch=st.integers(1, 5),
    world=st.integers(1, 16),
    batches=st.integers(1, 9),
    seed=st.integers(0, 99),
    groups=st.integers(0, 4),
)
def test_ranks_together_are_the_one_rank_stream(
    folders: dict[str, Path],
    name: str,
    batch: int,
    world: int,
    batches: int,
    seed: int,
    groups: int,
) -> None:
    alone = TokenLoader(folders[name], "train", batch * world, 8, seed=seed, shuffle_shards=groups)
    many = ranks(folders[name], batch, 8, world, seed, groups)
    assert np.array_equal(together(many, batches), rows(alone, batches))


def test_micro_batches_do_not_change_what_a_step_sees(folders: dict[str, Path]) -> None:
    whole = stream(folders["ragged"], 96, 8)
    for batch in (1, 2, 3, 8, 32):
        accumulated = TokenLoader(folders["ragged"], "train", batch, 8)
        assert np.array_equal(rows(accumulated, 96 // batch), whole)


@pytest.mark.parametrize(("groups", "ahead"), [(0, 1), (0, 200), (0, 1 << 15), (2, 1), (2, 500)])
@pytest.mark.parametrize("name", ["ragged", "equal"])
def test_restored_at_every_step_it_goes_on_the_same(
    folders: dict[str, Path], name: str, groups: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows are read ahead: a state is of the batch handed out, however many more were read.
    monkeypatch.setattr(loader_module, "READ_TOKENS", ahead)
    folder, batch = folders[name], 3

    def new() -> TokenLoader:
        return TokenLoader(folder, "train", batch, 8, seed=5, shuffle_shards=groups)

    running = new()
    steps = 2 * -(-running.windows_per_epoch // batch) + 2  # beyond two epochs' edges
    uninterrupted = rows(new(), steps + 4).reshape(-1, batch, 9)
    for step in range(steps):
        state = json.loads(json.dumps(running.state_dict()))
        assert state["position"] == step * batch
        resumed = new()
        resumed.load_state_dict(state)
        resumed.load_state_dict(resumed.state_dict())  # twice in a row
        assert resumed.state_dict() == state
        following = uninterrupted[step : step + 3].reshape(-1, 9)
        assert np.array_equal(rows(resumed, 3), following)
        resumed.load_state_dict(state)  # and back from further on
        assert np.array_equal(rows(resumed, 3), following)
        assert np.array_equal(rows(running, 1), uninterrupted[step])


def test_a_state_at_the_very_edge_of_an_epoch(folders: dict[str, Path]) -> None:
    folder, lengths = folders["equal"], RAGGED["equal"]
    loader = TokenLoader(folder, "train", 4, 8)
    assert loader.windows_per_epoch == 24
    check_epoch(rows(loader, 6), lengths, 8)
    state = loader.state_dict()
    assert state["position"] == loader.windows_per_epoch
    second = rows(loader, 6)
    check_epoch(second, lengths, 8)
    resumed = TokenLoader(folder, "train", 4, 8)
    resumed.load_state_dict(state)
    assert np.array_equal(rows(resumed, 6), second)


@settings(max_examples=30)
@given(
    world=st.sampled_from([1, 2, 3, 4, 6, 12]),
    resumed_world=st.sampled_from([1, 2, 3, 4, 6, 12]),
    batches=st.integers(0, 12),
)
def test_a_run_resumes_on_another_number_of_ranks(
    folders: dict[str, Path], world: int, resumed_world: int, batches: int
) -> None:
    folder, in_all = folders["many"], 12
    before = ranks(folder, in_all // world, 8, world)
    together(before, batches) if batches else None
    states = [loader.state_dict() for loader in before]
    assert all(state == states[0] for state in states), "one cursor for all ranks"
    after = ranks(folder, in_all // resumed_world, 8, resumed_world)
    for loader in after:
        loader.load_state_dict(states[0])
    expected = stream(folder, (batches + 4) * in_all, 8)[batches * in_all :]
    assert np.array_equal(together(after, 4), expected)


@pytest.mark.parametrize(("world", "groups"), [(1, 0), (2, 0), (2, 5), (8, 0), (60, 5), (1024, 0)])
def test_worlds_up_to_1024_share_one_stream(
    folders: dict[str, Path], world: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The ranks' rows alone: 1,024 loaders would each read the manifest.
    folder, batch, block = folders["many"], 2, 8
    mixture = Mixture.load([str(folder)])
    monkeypatch.setattr(loader_module, "READ_TOKENS", 1)
    starting = 3 * world
    taken = []
    for rank in range(world):
        own = loader_module.BatchReader(mixture, "train", batch, block, rank, world, 0, groups)
        own.seek(starting)
        taken += [own.read().copy() for _ in range(2)]
    by_batch = np.stack(taken).reshape(world, 2, batch, block + 1).swapaxes(0, 1)
    count = world * batch * 2
    alone = TokenLoader(folder, "train", starting + count, block, shuffle_shards=groups)
    assert np.array_equal(by_batch.reshape(-1, block + 1), rows(alone, 1)[starting:])


def test_resumed_within_an_accumulation_with_another_micro_batch(folders: dict[str, Path]) -> None:
    folder = folders["many"]
    whole = stream(folder, 48, 8)
    first = TokenLoader(folder, "train", 2, 8)
    rows(first, 5)  # of a step of 12 rows in micro-steps of 2
    second = TokenLoader(folder, "train", 1, 8)
    second.load_state_dict(first.state_dict())
    assert np.array_equal(rows(second, 38), whole[10:])


def test_a_far_position_is_reached_at_once(folders: dict[str, Path]) -> None:
    loader = TokenLoader(folders["ragged"], "train", 2, 8)
    state = loader.state_dict() | {"position": 10**15}
    loader.load_state_dict(state)
    x, _ = next(loader)
    assert loader.state_dict()["position"] == 10**15 + 2
    epoch, place = divmod(10**15, loader.windows_per_epoch)
    assert 0 <= place < loader.windows_per_epoch and epoch > 10**12 and x.shape == (2, 8)


def epochs(folder: Path, block: int, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    loader = TokenLoader(folder, "train", 1, block, seed=seed)
    for _ in range(count):
        yield rows(loader, loader.windows_per_epoch)


def test_boundaries_move_between_epochs_within_the_slack(folders: dict[str, Path]) -> None:
    block, lengths = 8, RAGGED["ragged"]
    phases = np.array(
        [check_epoch(e, lengths, block) for e in epochs(folders["ragged"], block, 40)]
    )
    with_windows = [length for length in lengths if length > block]
    slack = [(length - 1) % block for length in with_windows]
    for own, room in zip(phases.T, slack, strict=True):
        assert own.min() == 0 and own.max() == room, "all of the slack is used, none beyond it"


def test_each_epoch_and_seed_has_its_own_order(folders: dict[str, Path]) -> None:
    orders = {tuple(e[:, 0] // 8) for seed in range(3) for e in epochs(folders["one"], 8, 4, seed)}
    assert len(orders) == 12


def groups_of(starts: np.ndarray, lengths: tuple[int, ...], size: int) -> list[set[int]]:
    """The shards that each run of an epoch's windows comes from, a run ending with its group."""
    shards = np.searchsorted(np.cumsum(lengths), starts, side="right").tolist()
    found: list[set[int]] = []
    for shard in shards:
        if not any(shard in group for group in found) and (not found or len(found[-1]) == size):
            found.append(set())
        if shard not in found[-1]:
            assert not any(shard in group for group in found), "a group is left once"
            found[-1].add(shard)
    return found


@settings(max_examples=25)
@given(
    name=st.sampled_from(sorted(RAGGED)),
    block=st.integers(1, 24),
    size=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_shuffled_in_groups_every_window_is_served_once(
    folders: dict[str, Path], name: str, block: int, size: int, seed: int
) -> None:
    loader = TokenLoader(folders[name], "train", 1, block, seed=seed, shuffle_shards=size)
    for _ in range(3):
        check_epoch(rows(loader, loader.windows_per_epoch), RAGGED[name], block)


def test_groups_come_one_after_the_other_and_are_others_each_epoch(tmp_path: Path) -> None:
    lengths = (33, 41, 49, 33, 57, 65, 33)
    arange_dataset(tmp_path, lengths)
    loader = TokenLoader(tmp_path, "train", 1, 8, shuffle_shards=3)
    seen = set()
    for _ in range(8):
        epoch = rows(loader, loader.windows_per_epoch)[:, 0]
        groups = groups_of(epoch, lengths, 3)
        assert [len(group) for group in groups] == [3, 3, 1]
        seen.add(tuple(map(frozenset, groups)))
        shards = np.searchsorted(np.cumsum(lengths), epoch, side="right")
        assert (np.diff(shards) != 0).sum() > 10, "shuffled inside a group"
    assert len(seen) == 8


def test_what_lies_ahead_is_what_comes(tmp_path: Path) -> None:
    lengths = (33, 41, 49, 33, 57, 65, 33)
    arange_dataset(tmp_path, lengths)
    loader = TokenLoader(tmp_path, "train", 1, 8, shuffle_shards=3)
    stream = loader._reader.stream.streams[0]
    for position in range(3 * loader.windows_per_epoch):
        (shard,), _ = stream.locate(np.array([position]))
        ahead = list(stream.upcoming_shards(position))
        assert shard in ahead[:3]
        coming, _ = stream.locate(np.arange(position, position + 5))
        assert set(coming.tolist()) <= set(ahead), "no group has fewer than 4 windows"


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("block", [1, 4, 16])
def test_unused_tokens_are_those_in_no_window(
    folders: dict[str, Path], name: str, block: int
) -> None:
    loader = TokenLoader(folders[name], "train", 1, block)
    served = set(rows(loader, loader.windows_per_epoch).ravel().tolist())
    assert loader.unused_tokens == sum(RAGGED[name]) - len(served)


def test_ids_beyond_int16_arrive_whole(tmp_path: Path) -> None:
    ids = np.arange(65_500, 65_536)
    write_dataset(tmp_path, {"train": [ids], "val": [ids]})
    devices = ["cpu"]
    devices += ["cuda"] if torch.cuda.is_available() else []
    devices += ["mps"] if torch.backends.mps.is_available() else []
    for device in devices:
        x, y = next(TokenLoader(tmp_path, "val", 1, 35, device=device))
        assert x.device.type == device and x.dtype == y.dtype == torch.int64
        assert x[0].tolist() == ids[:-1].tolist()
        assert y[0].tolist() == ids[1:].tolist()


class _Elsewhere(str):
    """The CPU, taken for a device that ids have to be sent to."""

    type = "elsewhere"


def test_ids_become_int64_on_the_device(tmp_path: Path) -> None:
    ids = np.arange(32_750, 32_786)
    write_dataset(tmp_path, {"train": [ids], "val": [ids]})
    loader = TokenLoader(tmp_path, "val", 1, 35)
    vars(loader)["device"] = _Elsewhere("cpu")
    x, y = next(loader)
    assert x.dtype == y.dtype == torch.int64
    assert (x[0].tolist(), y[0].tolist()) == (ids[:-1].tolist(), ids[1:].tolist())


class _Gpu(str):
    """The CPU, taken for a GPU: what is read ahead is read ahead, copies are at hand at once."""

    type, index = "cuda", None


def test_read_ahead_for_a_gpu_the_state_is_of_the_batch_handed_out(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    folder = folders["ragged"]
    monkeypatch.setattr(loader_module.torch, "device", lambda name: _Gpu("cpu"))
    running, resumed = (TokenLoader(folder, "train", 3, 8) for _ in range(2))
    monkeypatch.undo()
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    whole = stream(folder, 90, 8).reshape(-1, 3, 9)
    assert running._thread and resumed._thread
    for step in range(25):
        state = running.state_dict()
        assert state["position"] == 3 * step
        resumed.load_state_dict(state)
        assert np.array_equal(rows(resumed, 3).reshape(-1, 3, 9), whole[step : step + 3])
        assert np.array_equal(rows(running, 1), whole[step])
        assert len(running._prefetched) == loader_module.PREFETCH


def test_memory_is_given_back_and_nothing_changes(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stream(folders["many"], 200, 8)
    calls = []
    monkeypatch.setattr(loader_module, "HELD_WINDOWS", 10)
    monkeypatch.setattr(loader_module.ShardReader, "release_pages", lambda self: calls.append(self))
    assert np.array_equal(rows(TokenLoader(folders["many"], "train", 1, 8), 200), whole)
    assert calls


def test_memory_does_not_grow_over_epochs(tmp_path: Path) -> None:
    arange_dataset(tmp_path, [500] * 40)
    loader = TokenLoader(tmp_path, "train", 4, 16, shuffle_shards=7)
    epoch = loader.windows_per_epoch // 4
    rows(loader, epoch)
    tracemalloc.start()
    try:
        rows(loader, epoch)
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(4):
            rows(loader, epoch)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000, "a window a byte would be more"


def test_after_an_error_the_same_batch_is_served(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stream(folders["many"], 120, 8).reshape(-1, 2, 9)
    monkeypatch.setattr(loader_module, "READ_TOKENS", 200)
    loader = TokenLoader(folders["many"], "train", 2, 8)
    tokens, calls = loader_module.ShardReader.tokens, count()

    def failing(self: loader_module.ShardReader, index: int) -> np.ndarray:
        if next(calls) in (0, 30, 31, 90):
            raise OSError("the network is gone")
        return tokens(self, index)

    monkeypatch.setattr(loader_module.ShardReader, "tokens", failing)
    failed = 0
    for batch in whole:
        while True:
            try:
                assert np.array_equal(rows(loader, 1), batch)
                break
            except OSError:
                failed += 1
    assert failed == 4


def test_val_is_served_too_and_apart(tmp_path: Path) -> None:
    arange_dataset(tmp_path, train=(50, 50), val=(40,))
    loader = TokenLoader(tmp_path, "val", 1, 13)
    assert sorted(rows(loader, 3)[:, 0].tolist()) == [100, 113, 126]


def test_batches_are_not_each_others_memory(folders: dict[str, Path]) -> None:
    loader = TokenLoader(folders["one"], "train", 2, 8)
    x, _ = next(loader)
    kept = x.clone()
    next(loader)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"generations": [1]}, "generations"),
        ({"seed": 1}, "seed"),
        ({"block_size": 16}, "block_size"),
        ({"split": "val"}, "split"),
        ({"order": 0}, "order"),
        ({"shuffle_shards": 3}, "shuffle_shards"),
        ({"version": 3}, "version"),
    ],
)
def test_a_state_of_another_stream_is_refused(
    folders: dict[str, Path], change: dict[str, object], named: str
) -> None:
    loader = TokenLoader(folders["one"], "train", 2, 8)
    next(loader)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=f"with {named} .*, found {escape(str(change[named]))}"):
        loader.load_state_dict(state | change)
    with pytest.raises(ValueError, match=f"with {named} .*, found None"):
        loader.load_state_dict({key: value for key, value in state.items() if key != named})
    assert loader.state_dict() == state, "a refused state changes nothing"


def test_a_state_of_version_1_is_refused(folders: dict[str, Path]) -> None:
    loader = TokenLoader(folders["one"], "train", 2, 8)
    state = loader.state_dict()
    assert state.keys() == {
        *("version", "order", "fingerprint", "split", "seed", "block_size", "position"),
        *("generations", "shuffle_shards"),
    }
    with pytest.raises(ValueError, match="with version 2, found 1: resume"):
        loader.load_state_dict(state | {"version": 1, "generation": 0})


@pytest.mark.parametrize("position", [-1, "8", 1.5, True, None, (1 << 62) + 1, 1 << 70])
def test_a_position_that_can_not_be(folders: dict[str, Path], position: object) -> None:
    loader = TokenLoader(folders["one"], "train", 2, 8)
    state = loader.state_dict()
    with pytest.raises(ValueError, match="position from 0, found"):
        loader.load_state_dict(state | {"position": position})
    assert loader.state_dict() == state


def test_a_state_of_an_earlier_generation_keeps_its_position(tmp_path: Path) -> None:
    grown(arange_dataset(tmp_path, train=(50, 50)), (0, 1))
    first = TokenLoader(Mixture.load([str(tmp_path)], {"any": 0}), "train", 2, 7)
    next(first)
    state, now = first.state_dict(), TokenLoader(tmp_path, "train", 2, 7)
    with pytest.raises(ValueError, match="with fingerprint"):
        now.load_state_dict(state)
    own = now.state_dict()
    now.load_state_dict(state, earlier=[state["fingerprint"]])
    assert now.state_dict() == own | {"position": 2}
    with pytest.raises(ValueError, match="with seed 0, found 1"):
        now.load_state_dict(state | {"seed": 1}, earlier=[state["fingerprint"]])


def test_a_state_that_was_released_is_read() -> None:
    released = Path(__file__).parents[1] / "released/v2"
    checkpoint = max((released / "run/checkpoints").iterdir())
    state = json.loads((checkpoint / "state.json").read_text("utf-8"))["loader"]
    assert state["version"] == 2 and state["position"] > 0
    sizes = {"block_size": state["block_size"], "seed": state["seed"]}
    loader = TokenLoader(released / "dataset", "train", 4, **sizes)
    loader.load_state_dict(state)
    assert loader.state_dict()["position"] == state["position"]
    x, _ = next(loader)
    whole = TokenLoader(released / "dataset", "train", state["position"] + 4, **sizes)
    assert torch.equal(x, next(whole)[0][state["position"] :])


def test_a_state_of_an_altered_dataset_is_refused(tmp_path: Path) -> None:
    arange_dataset(tmp_path / "a", train=(50,))
    arange_dataset(tmp_path / "b", train=(51,))
    state = TokenLoader(tmp_path / "a", "train", 2, 8).state_dict()
    with pytest.raises(ValueError, match="fingerprint"):
        TokenLoader(tmp_path / "b", "train", 2, 8).load_state_dict(state)


def test_a_dataset_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    arange_dataset(tmp_path, train=(9, 5), val=(9,))
    assert TokenLoader(tmp_path, "train", 1, 8).windows_per_epoch == 1
    with pytest.raises(ValueError, match=r"more than 9 tokens .* found at most 9: .*--block-size"):
        TokenLoader(tmp_path, "train", 1, 9)
    with pytest.raises(ValueError, match=r"a val shard .*--val-source"):
        TokenLoader(tmp_path, "val", 1, 9)


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": [np.arange(50)]})
    for split in ("val", "test"):
        with pytest.raises(ValueError, match=f"split '{split}'.*found none"):
            TokenLoader(tmp_path, split, 1, 8)
    with pytest.raises(FileNotFoundError, match="python -m prepare"):
        TokenLoader(tmp_path / "nowhere", "train", 1, 8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 2, "world_size": 2},
        {"rank": -1},
        {"world_size": 0},
        {"batch_size": 0},
        {"block_size": 0},
        {"seed": -1},
        {"seed": 1 << 64},
        {"seed": 1.0},
        {"batch_size": 2.0},
        {"block_size": True},
        {"shuffle_shards": "1"},
    ],
)
def test_sizes_and_ranks_that_can_not_be(folders: dict[str, Path], wrong: dict[str, int]) -> None:
    sizes = {"batch_size": 1, "block_size": 8} | wrong
    with pytest.raises(ValueError, match="expected batch_size"):
        TokenLoader(folders["one"], "train", **sizes)


def test_the_stream_never_changes_under_its_version(folders: dict[str, Path]) -> None:
    # Checkpoints point into it. Another stream needs another ORDER_VERSION.
    firsts = stream(folders["ragged"], 12, 16, seed=1337)[:, 0].tolist()
    assert firsts == [386, 418, 294, 42, 198, 335, 402, 214, 150, 102, 246, 434]


def test_an_older_generation_is_its_own_dataset(tmp_path: Path) -> None:
    manifest = grown(arange_dataset(tmp_path, train=(50, 50)), (0, 1))
    assert TokenLoader(tmp_path, "train", 1, 7).windows_per_epoch == 14
    first = TokenLoader(Mixture.load([str(tmp_path)], {"any": 0}), "train", 1, 7)
    assert first.windows_per_epoch == 7
    assert set(rows(first, 7).ravel().tolist()) <= set(range(50))
    assert first.state_dict()["fingerprint"] != manifest.fingerprint
    with pytest.raises(ValueError, match="generation"):
        Mixture.load([str(tmp_path)], {"any": 2})


# What is refused


@pytest.fixture
def dataset(tmp_path: Path) -> Manifest:
    return arange_dataset(tmp_path, (50, 60, 70))


def test_a_missing_shard_is_refused_at_open(dataset: Manifest) -> None:
    dataset.path("train_00001.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_00001\.npy, found no such file \(1 of 3"):
        TokenLoader(dataset.folder, "train", 1, 8)
    assert TokenLoader(dataset.folder, "val", 1, 1)


def test_a_short_shard_is_found_in_the_background(dataset: Manifest) -> None:
    with open(dataset.path("train_00002.npy"), "r+b") as file:
        file.truncate(200)
    loader = TokenLoader(dataset.folder, "train", 1, 8)
    # The first batch is of another shard.
    position = next(i for i in range(20) if loader._reader.stream.locate(np.array([i]))[1] != 2)
    loader.load_state_dict(loader.state_dict() | {"position": position})
    loader._reader._fill_buffer()
    assert loader._reader._check
    loader._reader._check.join()
    with pytest.raises(ValueError, match=r"expected 70 tokens .*train_00002"):
        next(loader)


def test_ranks_share_the_background_check(dataset: Manifest) -> None:
    with open(dataset.path("train_00002.npy"), "r+b") as file:
        file.truncate(200)
    shards = dataset.splits["train"].shards
    for rank in range(3):
        background = BackgroundCheck([(dataset, shards[rank::3])])
        background.join()
        assert (background.fault is not None) == (rank == 2)


def test_an_altered_shard_is_found_by_check(dataset: Manifest) -> None:
    check(dataset, "train")
    path = dataset.path("train_00001.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert next(TokenLoader(dataset.folder, "train", 1, 8))
    check(dataset, "val")
    with pytest.raises(ValueError, match=r"expected sha256 .*train_00001\.npy, found .*: restore"):
        check(dataset, "train")


def test_time_inside_next_is_counted(dataset: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = TokenLoader(dataset.folder, "train", 1, 8)
    assert loader.wait_seconds == 0
    read = loader._reader.read
    monkeypatch.setattr(loader._reader, "read", lambda: (time.sleep(0.01), read())[1])
    started = time.perf_counter()
    for _ in range(3):
        next(loader)
    assert 0.03 <= loader.wait_seconds <= time.perf_counter() - started


def test_all_loaders_share_one_limit_on_open_files(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    arange_dataset(tmp_path, [20] * 120)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        loaders = [TokenLoader(tmp_path, "train", 4, 8, seed=seed) for seed in range(3)]
        for loader in loaders:
            rows(loader, loader.windows_per_epoch // 4)
        held = [len(loader._reader._readers[0]._open) for loader in loaders]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sum(held) <= 100 and min(held) > 0


def test_threads_that_share_a_loader_get_each_batch_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stream(folders["many"], 400, 8)
    loader = TokenLoader(folders["many"], "train", 1, 8)
    read = loader._reader.read
    # Another thread's turn comes between reading a batch and copying it.
    monkeypatch.setattr(loader._reader, "read", lambda: (read(), time.sleep(0))[0])
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            taken = list(pool.map(lambda _: rows(loader, 100), range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert sorted(np.concatenate(taken).tolist()) == sorted(whole.tolist())
    assert loader.state_dict()["position"] == 400


def test_a_pickled_loader_continues_at_its_position(folders: dict[str, Path]) -> None:
    specs = [f"a=2:{folders['many']}", f"b=1:{folders['ragged']}"]
    loader = TokenLoader(specs, "train", 3, 8, rank=1, world_size=2, seed=5, shuffle_shards=2)
    rows(loader, 7)
    copies = [pickle.loads(pickle.dumps(loader)), copy.deepcopy(loader)]
    expected = rows(loader, 20)
    for other in copies:
        assert np.array_equal(rows(other, 20), expected)
        assert other.state_dict() == loader.state_dict()


# What is read, checked and fetched, and when


def test_each_read_is_twice_the_last_up_to_a_limit(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "READ_TOKENS", 2 * 9 * 5 + 17)  # five batches of two windows
    reader = TokenLoader(folders["many"], "train", 2, 8)._reader
    buffers = []
    original = reader._copy_windows
    monkeypatch.setattr(
        reader, "_copy_windows", lambda buffer, *at: (buffers.append(buffer), original(buffer, *at))
    )
    for _ in range(1 + 2 + 4 + 5 + 5 + 1):
        reader.read()
    assert [len(buffer) // 2 for buffer in buffers] == [1, 2, 4, 5, 5, 5]
    assert buffers[-1] is buffers[-2], "memory of the same size is used again"
    reader.seek(7)
    for _ in range(3):
        reader.read()
    assert [len(buffer) // 2 for buffer in buffers[6:]] == [1, 2]
    monkeypatch.setattr(loader_module, "READ_TOKENS", 1)
    small = TokenLoader(folders["many"], "train", 2, 8)._reader
    small.read()
    small.read()
    assert len(small._buffer) == 2


def test_each_rank_checks_its_part_of_the_shards(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []

    class Check:
        def __init__(self, parts: list) -> None:
            checked.append(parts)

        def check(self) -> None:
            checked.append("looked")

    monkeypatch.setattr(loader_module, "BackgroundCheck", Check)
    loader = TokenLoader(folders["many"], "train", 1, 8, rank=1, world_size=3)
    rows(loader, 3)
    ((manifest, shards),) = checked[0]
    assert shards == manifest.splits["train"].shards[1::3]
    assert checked[1:] == ["looked"] * 2, "once it has begun, before each batch"


@pytest.mark.parametrize(("held", "released"), [(6, (2, 4)), (7, (3, 5))])
def test_files_are_fetched_ahead_and_memory_is_released(
    held: int,
    released: tuple[int, ...],
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader_module, "READ_TOKENS", 1)
    monkeypatch.setattr(loader_module, "HELD_WINDOWS", held)
    loader = TokenLoader(folders["ragged"], "train", 3, 8, shuffle_shards=2)
    (reader,) = loader._reader._readers
    calls = []
    for name in ("close_evicted", "release_pages"):
        monkeypatch.setattr(reader, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(reader, "fetch_ahead", lambda shards: calls.append(list(shards)))
    expected = []
    for step in range(6):
        (shards,) = loader._reader.stream.upcoming_shards(3 * step)
        # Released before the read that follows so many windows, three in each read.
        expected += ["close_evicted", list(shards), *["release_pages"] * (step in released)]
        next(loader)
    assert calls == expected


def cached(*tokens: int, uri: str = "s3://bucket") -> SimpleNamespace:
    shards = [SimpleNamespace(tokens=count) for count in tokens]
    return SimpleNamespace(manifest=SimpleNamespace(uri=uri), shards=shards)


@pytest.mark.parametrize(
    ("readers", "groups", "needed"),
    [
        ([cached(10, 70, 30, 20)], 0, 260),
        ([cached(10, 70, 30, 20)], 1, 200),
        ([cached(10, 70), cached(5, 6, 7)], 1, 160 + 26),
        ([cached(10, 70, uri=""), cached(5)], 0, 10),
    ],
)
def test_shards_that_are_shuffled_together_fit_into_the_cache(
    readers: list, groups: int, needed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loader_module.cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(loader_module.cache, "limit_bytes", lambda: needed)
    loader_module._check_cache(readers, groups)
    monkeypatch.setattr(loader_module.cache, "limit_bytes", lambda: needed - 1)
    with pytest.raises(ValueError) as caught:
        loader_module._check_cache(readers, groups)
    assert str(caught.value) == (
        f"expected {needed / 1e9:.3g} GB in the cache {tmp_path} for the shards that are shuffled "
        f"together, found a limit of {(needed - 1) / 1e9:.3g}: set MYGPT_CACHE_GB, or shuffle "
        "fewer with --shuffle-shards"
    )
    monkeypatch.setattr(loader_module.cache, "limit_bytes", lambda: -1)
    loader_module._check_cache([cached(10, uri="")], groups)


def test_the_cache_is_asked_for_a_group(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(loader_module, "_check_cache", lambda *arguments: asked.append(arguments))
    loader = TokenLoader(folders["one"], "train", 1, 8, shuffle_shards=3)
    assert asked == [(loader._reader._readers, 3)]


def test_shards_of_one_number_in_two_sources_are_kept_apart(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    write_dataset(tmp_path, {"train": [np.arange(1000, 1101)], "val": [[0]]})
    data = [f"a=1:{folders['one']}", f"b=1:{tmp_path}"]
    mixed = rows(TokenLoader(data, "train", 24, 8), 1)
    for source, far in ((folders["one"], False), (tmp_path, True)):
        assert np.array_equal(mixed[(mixed[:, 0] >= 1000) == far], stream(source, 12, 8))


def test_what_a_loader_says_of_itself(folders: dict[str, Path]) -> None:
    data = [f"a=2:{folders['many']}", f"b=1:{folders['one']}"]
    loader = TokenLoader(data, "train", 3, 8, 1, 2, 5, shuffle_shards=4)
    one, many = (TokenLoader(folders[name], "train", 1, 8) for name in ("one", "many"))
    assert loader.windows_per_epoch == one.windows_per_epoch + many.windows_per_epoch
    assert loader.unused_tokens == one.unused_tokens + many.unused_tokens
    assert (loader.split, loader.seed, loader.shuffle_shards) == ("train", 5, 4)
    assert (loader.batch_size, loader.block_size) == (3, 8)
    assert (loader.rank, loader.world_size, loader.device) == (1, 2, torch.device("cpu"))
    assert loader.wait_seconds == 0.0
    rows(loader, 2)
    assert loader.state_dict() == {
        "version": 2,
        "order": 1,
        "fingerprint": loader.mixture.fingerprint,
        "generations": [0, 0],
        "split": "train",
        "seed": 5,
        "block_size": 8,
        "shuffle_shards": 4,
        "position": 12,
    }
    defaults = TokenLoader(folders["one"], "train", 1, 8)
    named = (defaults.rank, defaults.world_size, defaults.seed, defaults.shuffle_shards)
    assert named == (0, 1, 0, 0) and defaults.device.type == "cpu"


def test_what_the_refusals_say(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError) as caught:
        TokenLoader(folders["one"], "train", 1, 8, rank=2, world_size=2, seed=3)
    assert str(caught.value) == (
        "expected batch_size, block_size, world_size >= 1, 0 <= rank < world_size and seed, "
        "shuffle_shards >= 0, all int, found 1, 8, 2, 2, 3, 0"
    )
    loader = TokenLoader(folders["one"], "train", 1, 8)
    for change, message in (
        (
            {"seed": 7},
            "expected a loader state with seed 0, found 7: resume with the datasets and the "
            "settings with which the run was started",
        ),
        (
            {"position": "x"},
            "expected a loader state with a position from 0, found 'x': resume from another "
            "checkpoint",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            loader.load_state_dict(loader.state_dict() | change)
        assert str(caught.value) == message
    loader.load_state_dict(loader.state_dict() | {"position": 1 << 62})
    assert loader.state_dict()["position"] == 1 << 62


def test_the_largest_sizes_that_can_be(folders: dict[str, Path]) -> None:
    for sizes in ({"seed": (1 << 64) - 1}, {"rank": 1, "world_size": 2}, {"world_size": 1 << 59}):
        assert next(TokenLoader(folders["one"], "train", 1, 8, **sizes))
    with pytest.raises(ValueError, match="expected batch_size"):
        TokenLoader(folders["one"], "train", 1, 8, world_size=(1 << 59) + 1)


@pytest.mark.parametrize(("index", "expected"), [(None, 5), (0, 0), (3, 3)])
def test_the_thread_of_a_gpu_sets_its_device(
    index: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda i: calls.append((i, threading.current_thread().name))
    )
    pool = loader_module._reading_thread(torch.device("cuda", index))
    list(pool.map(str, range(20)))
    assert calls == [(expected, "loader_0")]


@pytest.mark.parametrize(("device", "non_blocking"), [("cuda", True), ("mps", False)])
def test_ids_travel_as_two_bytes(device: str, non_blocking: bool) -> None:
    class Ids:
        def view(self, dtype: torch.dtype) -> "Ids":
            assert dtype == torch.int16
            return self

        def to(self, target: torch.device, **how: object) -> torch.Tensor:
            assert target == torch.device(device) and how == {"non_blocking": non_blocking}
            return torch.tensor([-1, 7], dtype=torch.int16)

    assert loader_module.to_int64(Ids(), torch.device(device)).tolist() == [65535, 7]


def test_batches_read_ahead_are_dropped_by_a_seek(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those not begun are cancelled; the one being read is waited for, whatever becomes of it."""
    loader = TokenLoader(folders["one"], "train", 1, 8)
    asked = []

    class Read:
        def __init__(self, begun: bool) -> None:
            self.begun = begun

        def cancel(self) -> bool:
            asked.append("cancel")
            return not self.begun

        def exception(self) -> None:
            asked.append("wait")

    loader._prefetched.extend([Read(True), Read(False)])
    monkeypatch.setattr(loader._reader, "seek", lambda position: asked.append(position))
    loader.load_state_dict(loader.state_dict() | {"position": 4})
    assert asked == ["cancel", "wait", "cancel", 4] and not loader._prefetched
