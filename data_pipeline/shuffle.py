"""A global shuffle as a pure function of (seed, epoch, index): no list of indices is ever stored.

A balanced Feistel network permutes the smallest power of four that covers the range; indices that fall
outside are walked along their cycle until they fall inside (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002, section 3). Everything is vectorised over numpy arrays.
"""

import numpy as np

ROUNDS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finaliser of SplitMix64; Steele et al., OOPSLA 2014, figure 17)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int) -> np.uint64:
    """One 64-bit key from several integers, order included."""
    key = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            key = mix(np.asarray((int(key) ^ (part % 2**64)), np.uint64) + _GOLDEN)[()]
    return key


def permute(indices: np.ndarray, size: int, key: np.uint64) -> np.ndarray:
    """Where each index of `range(size)` goes under the permutation that `key` names.

    indices: integers in [0, size), any shape. Returns int64 of the same shape; a bijection of `range(size)`.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    half_mask = np.uint64((1 << int(half_bits)) - 1)
    out = np.asarray(indices).astype(np.uint64).ravel()
    walking = np.arange(out.size)
    with np.errstate(over="ignore"):
        round_keys = [mix(key + np.uint64(r + 1) * _GOLDEN) for r in range(ROUNDS)]
        while walking.size:
            x = out[walking]
            left, right = x >> half_bits, x & half_mask
            for round_key in round_keys:
                left, right = right, left ^ (mix(right ^ round_key) & half_mask)
            x = (left << half_bits) | right
            out[walking] = x
            walking = walking[x >= np.uint64(size)]
    return out.astype(np.int64).reshape(np.shape(indices))
