"""A global shuffle as a pure function of (seed, epoch, index): no list of indices is ever stored.

A Feistel network permutes the smallest power of two that covers the range; indices that fall outside are walked along
their cycle until they fall inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 3).
Everything is vectorised over numpy arrays.
"""

from collections.abc import Callable

import numpy as np

ROUNDS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finaliser of SplitMix64; Steele et al., OOPSLA 2014, figure 17)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int | np.ndarray) -> np.uint64 | np.ndarray:
    """One 64-bit key from several integers, order included; an array of keys if one of them is an array."""
    key = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            part = np.uint64(part % 2**64) if isinstance(part, int) else part.astype(np.uint64)
            key = mix((key ^ part) + _GOLDEN)
    return key


def permute(indices: np.ndarray, size: int, key: np.uint64 | np.ndarray) -> np.ndarray:
    """Where each index of `range(size)` goes under the permutation that `key` names.

    indices: integers in [0, size), any shape; key: one, or one for each index. Returns int64 of the indices' shape;
    for each key a bijection of `range(size)`.
    """
    return _walk(indices, size, _forward, key)


def unpermute(indices: np.ndarray, size: int, key: np.uint64 | np.ndarray) -> np.ndarray:
    """The inverse of `permute` with the same size and key."""
    return _walk(indices, size, _backward, key)


def _walk(indices: np.ndarray, size: int, network: Callable, key: np.uint64 | np.ndarray) -> np.ndarray:
    bits = max(2, (size - 1).bit_length())
    with np.errstate(over="ignore"):
        round_keys = [mix(key + np.uint64(r + 1) * _GOLDEN) for r in range(ROUNDS)]
        out = network(np.asarray(indices).astype(np.uint64).ravel(), bits, round_keys)
        walking = np.flatnonzero(out >= np.uint64(size))
        while walking.size:
            own_keys = [k[walking] if np.ndim(k) else k for k in round_keys]
            out[walking] = network(out[walking], bits, own_keys)
            walking = walking[out[walking] >= np.uint64(size)]
    return out.astype(np.int64).reshape(np.shape(indices))


def _forward(x: np.ndarray, bits: int, round_keys: list[np.uint64]) -> np.ndarray:
    """One pass over numbers of `bits` bits. With an odd number of bits the halves differ by one, and swap sizes from
    round to round."""
    high, low = bits // 2, bits - bits // 2
    left, right = x >> np.uint64(low), x & _mask(low)
    for key in round_keys:
        left, right = right, left ^ (mix(right ^ key) & _mask(high))
        high, low = low, high
    return (left << np.uint64(low)) | right


def _backward(x: np.ndarray, bits: int, round_keys: list[np.uint64]) -> np.ndarray:
    high, low = bits // 2, bits - bits // 2  # as they are after an even number of rounds
    left, right = x >> np.uint64(low), x & _mask(low)
    for key in reversed(round_keys):
        high, low = low, high
        left, right = right ^ (mix(left ^ key) & _mask(high)), left
    return (left << np.uint64(low)) | right


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)
