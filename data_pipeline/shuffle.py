"""A global shuffle as a pure function of (seed, epoch, index): no list of indices is ever stored.

A Feistel network permutes the pairs of [0, a) x [0, b), where a and b are nearly equal and their product is hardly more
than the range; the few that stand for numbers outside it are walked along their cycle until they fall inside (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, sections 3 and 4). Everything is vectorised over numpy arrays.
"""

import math
from collections.abc import Callable

import numpy as np

ROUNDS, ROUNDS_OF_FEW = 4, 12  # of few numbers, four rounds reach some orders several times as often as others
FEW = 64
AT_ONCE = 8192  # indices, so that what is made of them stays in the processor's own caches
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finaliser of SplitMix64; Steele et al., OOPSLA 2014, figure 17)."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


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
    a = math.isqrt(max(size, 1) - 1) + 1
    b = -(-size // a)
    out = np.asarray(indices).astype(np.uint64).ravel()
    with np.errstate(over="ignore"):
        round_keys = [mix(key + np.uint64(r + 1) * _GOLDEN) for r in range(ROUNDS if size > FEW else ROUNDS_OF_FEW)]
        for begin in range(0, len(out), AT_ONCE):
            part = slice(begin, begin + AT_ONCE)
            out[part] = network(out[part], a, b, _of(round_keys, part))
        walking = np.flatnonzero(out >= np.uint64(size))
        while walking.size:
            out[walking] = network(out[walking], a, b, _of(round_keys, walking))
            walking = walking[out[walking] >= np.uint64(size)]
    return out.astype(np.int64).reshape(np.shape(indices))


def _of(keys: list, which: slice | np.ndarray) -> list:
    return [key[which] if np.ndim(key) else key for key in keys]


def _forward(x: np.ndarray, a: int, b: int, round_keys: list[np.uint64]) -> np.ndarray:
    """One pass over numbers below a * b: left is below a and right below b, and the halves swap from round to round."""
    left, right = _halves(x, b)
    for key in round_keys:
        added = left + _below(a, mix(right ^ key))
        left, right = right, np.minimum(added, added - np.uint64(a))  # what is below a wraps around to a huge number
        a, b = b, a
    return left * np.uint64(b) + right


def _backward(x: np.ndarray, a: int, b: int, round_keys: list[np.uint64]) -> np.ndarray:
    left, right = _halves(x, b)  # a and b stand as in the beginning after an even number of rounds
    for key in reversed(round_keys):
        a, b = b, a
        rest = right - _below(a, mix(left ^ key))
        left, right = np.minimum(rest, rest + np.uint64(a)), left
    return left * np.uint64(b) + right


def _halves(x: np.ndarray, b: int) -> tuple[np.ndarray, np.ndarray]:
    left = x // np.uint64(b)
    return left, x - left * np.uint64(b)


def _below(size: int, scrambled: np.ndarray) -> np.ndarray:
    """Numbers in [0, size), size < 2^32, from the upper halves of 64-bit ones."""
    scrambled >>= np.uint64(32)
    scrambled *= np.uint64(size)
    scrambled >>= np.uint64(32)
    return scrambled
