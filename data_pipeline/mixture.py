"""Which document is the n-th sample of the run: sources mixed by weight, each shuffled anew every epoch."""

import functools
from dataclasses import dataclass

import numpy as np

from armillary.data_pipeline.shuffle import key_of, permute

BLOCK = 1024


@dataclass(frozen=True)
class Mixture:
    """sizes: documents in each source; rates: relative frequency of its documents; seed: of the shuffle.

    Samples come in blocks of 1,024. Every block holds each source's exact share (largest remainder) in an
    order of its own, so the sources' counts before any sample are known without walking through the run.
    """

    sizes: tuple[int, ...]
    rates: tuple[float, ...]
    seed: int

    def samples(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples [start, start + count) of the run: (source, document), int64 [count] each.

        `document` is an index into its source. A source is used up in a fresh order each time round.
        """
        first, last = start // BLOCK, (start + count - 1) // BLOCK
        blocks = [_block(self, block) for block in range(first, last + 1)]
        window = slice(start - first * BLOCK, start - first * BLOCK + count)
        source = np.concatenate([source for source, _ in blocks])[window]
        return source, np.concatenate([document for _, document in blocks])[window]


def quotas(rates: tuple[float, ...]) -> np.ndarray:
    """Samples of each source in one block, int64 [sources]: they sum to BLOCK, and each is at least one."""
    shares = np.asarray(rates, np.float64) / sum(rates) * BLOCK
    counts = np.maximum(np.floor(shares).astype(np.int64), 1)
    by_remainder = np.argsort(np.floor(shares) - shares, kind="stable")
    counts[by_remainder[: max(0, BLOCK - int(counts.sum()))]] += 1
    counts[np.argmax(counts)] += BLOCK - counts.sum()
    return counts


@functools.lru_cache(maxsize=64)
def _block(mixture: Mixture, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, document) of one block's samples."""
    counts = quotas(mixture.rates)
    slot = permute(np.arange(BLOCK), BLOCK, key_of(mixture.seed, 0, block))
    source = np.searchsorted(np.cumsum(counts), slot, side="right").astype(np.int64)
    document = np.empty(BLOCK, np.int64)
    for s, (count, size) in enumerate(zip(counts, mixture.sizes, strict=True)):
        ordinal = block * count + np.arange(count)
        place, drawn = ordinal % size, np.empty(count, np.int64)
        for epoch in np.unique(ordinal // size):
            within = ordinal // size == epoch
            drawn[within] = permute(place[within], size, key_of(mixture.seed, 1, s, int(epoch)))
        document[source == s] = drawn
    return source, document
