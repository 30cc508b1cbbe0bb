"""The computed permutation: a bijection, another for each key and epoch, and it shuffles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.order import ORDER_VERSION, key_of, mix, permute

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 97, 256, 1009, 1024, 4096, 4097, 10007]


def order(size: int, *key: int) -> np.ndarray:
    return permute(np.arange(size), size, key_of(*key))


@pytest.mark.parametrize("size", SIZES)
def test_a_permutation_of_edge_sizes(size: int) -> None:
    assert np.array_equal(np.sort(order(size, 1, 2)), np.arange(size))


@given(size=st.integers(1, 20_000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_of_any_size_under_any_key(size: int, key: int) -> None:
    assert np.array_equal(np.sort(order(size, key)), np.arange(size))


@given(
    size=st.integers(1, 2**62),
    key=st.integers(0, 2**64 - 1),
    indices=st.lists(st.integers(0, 2**62), min_size=1, unique=True),
)
def test_large_ranges_stay_inside_and_apart(size: int, key: int, indices: list[int]) -> None:
    inside = np.array(sorted({index % size for index in indices}), np.uint64)
    sent = permute(inside, size, key_of(key))
    assert (sent < size).all()
    assert len(np.unique(sent)) == len(inside)


@given(
    size=st.integers(1, 5000),
    seed=st.integers(0, 2**32),
    epochs=st.lists(st.integers(0, 9), max_size=40),
)
def test_a_key_for_each_index_is_that_key_alone(size: int, seed: int, epochs: list[int]) -> None:
    indices = np.arange(len(epochs)) % size
    together = permute(indices, size, key_of(seed, np.array(epochs, np.int64)))
    for one, index, epoch in zip(together, indices, epochs, strict=True):
        assert one == permute(np.array([index]), size, key_of(seed, epoch))[0]


@given(parts=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
def test_vectorised_keys_are_the_scalar_keys(parts: list[int]) -> None:
    arrays = [np.array([part, 7], np.uint64) for part in parts]
    assert key_of(*arrays).tolist() == [key_of(*parts)[0], key_of(*[7] * len(parts))[0]]


def test_a_key_depends_on_every_part_and_their_order() -> None:
    keys = [key_of(*parts)[0] for parts in [(), (0,), (1,), (0, 1), (1, 0), (0, 0), (0, 1, 0)]]
    assert len(set(keys)) == len(keys)


def test_keys_give_unrelated_orders() -> None:
    size = 10_000
    orders = [order(size, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random permutations agree in one index on average; 12 is beyond chance.
            assert np.count_nonzero(one == other) < 12
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


@pytest.mark.parametrize("size", [1000, 4096, 16385])
def test_it_looks_shuffled(size: int) -> None:
    for key in range(5):
        sent = order(size, key).astype(np.int64)
        # A random permutation moves an index by a third of the range.
        assert np.abs(sent - np.arange(size)).mean() == pytest.approx(size / 3, rel=0.1)
        assert abs(np.corrcoef(sent[:-1], sent[1:])[0, 1]) < 0.1
        assert np.count_nonzero(sent == np.arange(size)) < 10
        assert np.count_nonzero(np.diff(sent) == 1) < 10
        # Each tenth of the stream draws from each tenth of the data alike: chi-square, 81 degrees.
        counts = np.histogram2d(np.arange(size), sent, bins=10)[0]
        assert ((counts - size / 100) ** 2 / (size / 100)).sum() < 140


def test_every_order_of_four_windows_occurs() -> None:
    seen = {tuple(order(4, key).tolist()) for key in range(2000)}
    assert len(seen) == 24


def test_mix_is_splitmix64() -> None:
    # The first outputs of the reference implementation seeded with 0 and 1234567.
    assert mix(np.array([0], np.uint64))[0] == 0xE220A8397B1DCDAF
    assert mix(np.array([1234567], np.uint64))[0] == 6457827717110365317


def test_the_order_never_changes_under_its_version() -> None:
    # Checkpoints point into this order. Another one needs another ORDER_VERSION.
    assert ORDER_VERSION == 1
    assert order(12, 1337, 0).tolist() == [4, 0, 7, 10, 1, 8, 6, 9, 5, 11, 2, 3]
    # Around powers of 4, as docs/one_file.py computes them: the smallest network that covers.
    edges = {4: [1, 3, 0, 2], 5: [0, 4, 1, 3], 16: [13, 4, 14, 5], 17: [4, 3, 14, 9]}
    edges |= {64: [57, 47, 58, 9], 65: [60, 64, 30, 7]}
    assert {size: order(size, 1337)[:4].tolist() for size in edges} == edges
    far = permute(np.array([0, 1, 10**12]), 10**12 + 39, key_of(1337, 3))
    assert far.tolist() == [624479404477, 69025068534, 646166898319]
