"""Finding copies: exact by a hash of the whole document, near by MinHash over runs of five words."""

import numpy as np
import xxhash

from armillary.data_pipeline.document import Document, Picture
from armillary.data_pipeline.shuffle import key_of, mix

BANDS, ROWS, RUN = 14, 8, 5  # two texts share a band with probability 1/2 where 0.72 of their runs are alike
_KEYS = key_of(5, np.arange(BANDS * ROWS))


def exact_key(document: Document) -> tuple[int, int]:
    """128 bits of a document: its parts, whitespace at their ends left out."""
    digest = xxhash.xxh3_128()
    for part in document.parts:
        content = part.data if isinstance(part, Picture) else part.text.strip().encode()
        digest.update(f"{type(part).__name__} {len(content)} ".encode())
        digest.update(content)
    return divmod(digest.intdigest(), 1 << 64)


def near_keys(document: Document) -> np.ndarray:
    """A key for each band, uint64 [BANDS]: near copies agree in at least one with high probability.

    MinHash (Broder 1997, "On the resemblance and containment of documents", section 4) over the runs of five words,
    with bands as in Leskovec et al., "Mining of Massive Datasets", section 3.4. Documents with other images are never
    alike.
    """
    images = xxhash.xxh3_64()
    for part in document.parts:
        if isinstance(part, Picture):
            images.update(part.data)
    words = "\n".join(document.texts).lower().encode().split()
    hashes = np.array([xxhash.xxh3_64_intdigest(word) for word in words], np.uint64)
    with np.errstate(over="ignore"):
        runs = np.full(max(len(hashes) - RUN + 1, 1), images.intdigest(), np.uint64)
        for place in range(min(RUN, len(hashes))):
            runs = mix(runs ^ hashes[place : place + len(runs)]) + np.uint64(1)
        runs = np.unique(runs)
        least = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, np.uint64)
        for start in range(0, len(runs), 1024):
            least = np.minimum(least, mix(runs[start : start + 1024, None] ^ _KEYS).min(0))
        keys = np.zeros(BANDS, np.uint64)
        for row in range(ROWS):
            keys = mix(keys ^ least.reshape(BANDS, ROWS)[:, row]) + np.uint64(1)
    return keys


def copies(keys: np.ndarray) -> np.ndarray:
    """Which documents are copies of an earlier one that is kept, bool [n], given their keys, uint64 [n, kinds].

    Two documents are alike if they agree in any kind of key. Likeness is not passed on: a chain of documents, each
    a little different from the one before, keeps more than its first.
    """
    seen: list[set[int]] = [set() for _ in range(keys.shape[1])]
    doubled = np.zeros(len(keys), bool)
    for number, row in enumerate(keys.tolist()):
        if any(key in kept for key, kept in zip(row, seen, strict=True)):
            doubled[number] = True
        else:
            for key, kept in zip(row, seen, strict=True):
                kept.add(key)
    return doubled
