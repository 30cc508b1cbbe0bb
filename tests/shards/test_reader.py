"""Evaluation covers each target once (promise 9), and a shard that is not right is refused."""

import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import reader
from shards.manifest import INDEX_SCHEMA, Manifest
from shards.reader import (
    EvalWindows,
    ShardReader,
    open_tokens,
    position,
    read_index,
    token_counts,
)
from tests.shards.support import PLACES, arange_dataset, write_dataset


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    block=st.integers(1, 60),
)
def test_every_target_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], block: int
) -> None:
    manifest = arange_dataset(tmp_path_factory.mktemp("val"), train=(2,), val=lengths)
    windows = EvalWindows(manifest, "val", block)
    targets = [int(token) for window in windows for token in window[1:]]
    # Each id is its token's place: all but the first of each shard, in order.
    ends = 2 + np.cumsum(lengths)
    firsts = {2, *ends[:-1].tolist()}
    assert targets == [place for place in range(2, ends[-1]) if place not in firsts]
    assert windows.n_targets == len(targets)
    for window in windows:
        assert window.dtype == np.uint16
        assert 2 <= len(window) <= block + 1
        assert (np.diff(window.astype(int)) == 1).all(), "its context is what stands before it"


def test_windows_by_index(tmp_path: Path) -> None:
    windows = EvalWindows(arange_dataset(tmp_path, train=(2,), val=(10, 8)), "val", 4)
    firsts = [2, 6, 10, 12, 16]
    assert len(windows) == 5
    assert [int(window[0]) for window in windows] == firsts
    assert [int(windows[i][0]) for i in range(5)] == firsts
    for index in (5, -6):
        with pytest.raises(IndexError):
            windows[index]


@given(
    lengths=st.lists(st.integers(2, 400), min_size=1, max_size=5),
    block=st.integers(1, 40),
    n_tokens=st.integers(1, 5000),
)
@settings(max_examples=30)
def test_the_fixed_subset_is_spread_evenly(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], block: int, n_tokens: int
) -> None:
    windows = EvalWindows(
        arange_dataset(tmp_path_factory.mktemp("val"), (2,), lengths), "val", block
    )
    chosen = windows.spread(n_tokens)
    assert chosen == sorted(set(chosen)) and chosen[0] == 0 and chosen[-1] < len(windows)
    gaps = np.diff([*chosen, len(windows)])
    assert gaps.max() - gaps.min() <= 1, "evenly spaced, to the end"
    # About as many targets as asked for, never more, but at least one window.
    assert len(chosen) == 1 or len(chosen) * block <= n_tokens
    assert len(chosen) == len(windows) or (len(chosen) + 1) * block > n_tokens
    assert windows.spread(n_tokens) == chosen


def test_counts_are_numpys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "COUNTED_AT_ONCE", 7)
    random = np.random.default_rng(0)
    shards = [random.integers(0, 65536, n) for n in (1, 7, 20, 5000)]
    manifest = write_dataset(tmp_path, {"train": shards, "val": [[1, 65535, 1]]})
    counts = token_counts(manifest, "train")
    assert counts.dtype == np.int64 and counts.shape == (PLACES.n_vocab,)
    assert np.array_equal(counts, np.bincount(np.concatenate(shards), minlength=1 << 16))
    assert token_counts(manifest, "val")[[0, 1, 65535]].tolist() == [0, 2, 1]


def test_at_most_so_many_maps_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN", 3)
    monkeypatch.setattr(reader, "_readers", weakref.WeakSet())
    opened: list[str] = []
    original = reader.open_tokens
    monkeypatch.setattr(
        reader, "open_tokens", lambda m, s: (opened.append(s.file), original(m, s))[1]
    )
    shards = ShardReader(arange_dataset(tmp_path, range(2, 12)), "train")
    for index in [*range(10), 9, 8, 7, 0]:
        assert len(shards.tokens(index)) == index + 2
        assert len(shards._open) <= 3
    assert len(opened) == 11, "what is open is not opened again"
    other = ShardReader(shards.manifest, "train")
    for index in range(4):
        assert len(other.tokens(index)) == index + 2
        assert len(shards._open) + len(other._open) <= 3, "one limit for all of the process"
    assert len(other._open) in (1, 2)
    del other
    assert [len(shards.tokens(index)) for index in range(3)] == [2, 3, 4]
    assert len(shards._open) == 3


def test_tokens_are_a_view_that_can_not_be_written(tmp_path: Path) -> None:
    view = ShardReader(arange_dataset(tmp_path, (5,)), "train").tokens(0)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return arange_dataset(tmp_path, (100,))


def refused(manifest: Manifest, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        open_tokens(manifest, manifest.splits["train"].shards[0])
    message = str(caught.value)
    assert "\n" not in message
    assert "train_00000.npy" in message and "restore it, or prepare" in message


def test_a_missing_shard(manifest: Manifest) -> None:
    manifest.path("train_00000.npy").unlink()
    refused(manifest, FileNotFoundError, "found no such file")


@pytest.mark.parametrize("size", [0, 5, 60, 127, 128, 200, 327])
def test_a_short_shard_at_any_length(manifest: Manifest, size: int) -> None:
    path = manifest.path("train_00000.npy")
    assert path.stat().st_size == 128 + 200
    path.write_bytes(path.read_bytes()[:size])
    refused(manifest, ValueError, "expected 100 tokens")


@pytest.mark.parametrize(
    "other",
    [
        np.arange(99, dtype=np.uint16),
        np.arange(101, dtype=np.uint16),
        np.arange(100, dtype=np.int16),
        np.arange(100, dtype=">u2"),
        np.arange(100, dtype=np.uint32),
        np.arange(100, dtype=np.uint16).reshape(10, 10),
        np.array([{"code": "runs"}] * 100, dtype=object),
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}",
)
def test_a_shard_with_another_header(manifest: Manifest, other: np.ndarray) -> None:
    np.save(manifest.path("train_00000.npy"), other)
    refused(manifest, ValueError, "expected 100 tokens")


def test_damage_to_any_byte_of_the_header(manifest: Manifest) -> None:
    path = manifest.path("train_00000.npy")
    good = path.read_bytes()
    for place in range(128):
        for bit in (0, 5):
            damaged = bytearray(good)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            refused(manifest, ValueError, "with another header")


def test_shards_are_opened_by_many_threads_at_once(tmp_path: Path) -> None:
    manifest = arange_dataset(tmp_path, [20] * 40)
    shards = manifest.splits["train"].shards * 20
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda shard: open_tokens(manifest, shard), shards))
    assert [int(tokens[0]) for tokens in opened] == list(range(0, 800, 20)) * 20


def test_a_shard_with_tokens_too_many(manifest: Manifest) -> None:
    with open(manifest.path("train_00000.npy"), "ab") as file:
        file.write(b"\0\0")
    refused(manifest, ValueError, "expected 100 tokens")


def test_a_split_without_shards(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, {"train": [[1, 2]]})
    for split in ("val", "validation"):
        with pytest.raises(ValueError, match=f"split '{split}'"):
            EvalWindows(manifest, split, 4)


def test_an_index_is_read_or_refused(manifest: Manifest) -> None:
    shard = manifest.splits["train"].shards[0]
    index = read_index(manifest, shard)
    assert index.schema == INDEX_SCHEMA
    assert index.to_pylist() == [
        {"offset": 0, "source": 0, "row": 0, "text_bytes": 0, "continued": False}
    ]
    path = manifest.path(shard.index)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"expected a whole index in .*train_00000\.docs"):
        read_index(manifest, shard)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"offset": [1]}), path)
    with pytest.raises(ValueError, match=r"expected the columns offset, source, .* found offset"):
        read_index(manifest, shard)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="found no such file"):
        read_index(manifest, shard)


def test_a_dataset_can_be_moved(manifest: Manifest, tmp_path: Path) -> None:
    moved = tmp_path / "b=1" / "elsewhere"
    shutil.copytree(manifest.folder, moved, ignore=shutil.ignore_patterns("b=*"))
    again = Manifest.load(moved)
    assert again.fingerprint == manifest.fingerprint
    assert ShardReader(again, "train").tokens(0).tolist() == list(range(100))
    assert read_index(again, again.splits["train"].shards[0]).num_rows == 1


def test_memory_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "LARGE_TOKENS", 100)
    shards = ShardReader(arange_dataset(tmp_path, (5000,)), "train")
    view = shards.tokens(0)
    assert view[::64].sum() == np.arange(0, 5000, 64).sum()
    shards.release_pages()
    assert view.tolist() == list(range(5000)), "what is still held is read again"


def test_a_shard_that_is_not_there_is_refused_at_open(manifest: Manifest) -> None:
    manifest.path("val_00000.npy").unlink()
    assert ShardReader(manifest, "train")
    with pytest.raises(FileNotFoundError, match=r"val_00000.npy, found no such file \(1 of 1"):
        EvalWindows(manifest, "val", 4)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("corpus/a.parquet", "row 1,024"),
        ("a.ARROW.gz", "row 1,024"),
        ("a.zip/in/b.arrow", "row 1,024"),
        ("train.bin", "token 1,024"),
        ("a.jsonl", "byte 1,024"),
        ("a.parquet.d/b.csv.zst", "byte 1,024"),
        ("LICENSE", "byte 1,024"),
    ],
)
def test_a_position_has_the_unit_of_its_source(source: str, expected: str) -> None:
    assert position(source, 1024) == expected
