"""The global shuffle as a permutation that is computed, not stored: O(1) memory, O(1) seek.

A keyed Feistel network permutes range(4^k), the smallest that covers all windows. Results outside
are permuted again until they fall inside (cycle walking), which keeps it a bijection.
Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.
"""

import numpy as np

# Part of a stream's identity: raise it with any change in this file that moves a window.
ORDER_VERSION = 1
ROUNDS = 6

_U64 = np.uint64
_MULTIPLIERS = (_U64(0xBF58476D1CE4E5B9), _U64(0x94D049BB133111EB))
_INCREMENT = _U64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """Hash each uint64 (the finaliser of SplitMix64; Steele et al., 2014)."""
    # In place: allocating for every step would take longer than the steps. Arrays wrap silently.
    values = values + _INCREMENT
    shifted = np.empty_like(values)
    for bits, multiplier in zip((_U64(30), _U64(27)), _MULTIPLIERS, strict=True):
        np.right_shift(values, bits, out=shifted)
        values ^= shifted
        values *= multiplier
    np.right_shift(values, _U64(31), out=shifted)
    values ^= shifted
    return values


def key_of(*parts: int | np.ndarray) -> np.ndarray:
    """Return a uint64 key of all parts and their order; arrays give an array of keys."""
    key = np.zeros(1, _U64)
    for part in parts:
        key = mix(key ^ mix(np.atleast_1d(np.asarray(part, _U64))))
    return key


def permute(indices: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Apply a permutation of range(size) to each index: uint64 in, uint64 out, same shape.

    `key` is a uint64 array, of shape (1,) or that of `indices` (another permutation per index).
    """
    half = _U64((max(size - 1, 1).bit_length() + 1) // 2)
    low = (_U64(1) << half) - _U64(1)
    out = indices.astype(_U64)
    keys = np.broadcast_to(key, out.shape)
    pending = np.arange(out.size)
    while pending.size:
        walked = _feistel(out[pending], half, low, keys[pending])
        out[pending] = walked
        pending = pending[walked >= _U64(size)]
    return out


def _feistel(values: np.ndarray, half: np.uint64, low: np.uint64, keys: np.ndarray) -> np.ndarray:
    """Apply a keyed bijection of range(4 ** half)."""
    left, right = values >> half, values & low
    for constant in mix(np.arange(ROUNDS, dtype=_U64)):
        mixed = mix(right ^ keys ^ constant)
        mixed &= low
        mixed ^= left
        left, right = right, mixed
    return (left << half) | right
