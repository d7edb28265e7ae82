"""Which documents come when: sources mixed by weight, each shuffled anew every epoch.

The run is a sequence of blocks. What a source has given before block b is a closed formula of b, so no block needs
the ones before it, and nothing is stored that grows with the number of samples.
"""

from dataclasses import dataclass

import numpy as np

from armillary.data_pipeline.order import Order
from armillary.data_pipeline.shuffle import key_of, permute

BLOCK_ROWS = 4096  # a block draws documents for about so many rows, and is packed by itself
ORDER = 3  # of this module and those that it stands on: raised where the same cursor comes to mean another row


@dataclass(frozen=True)
class Stage:
    """From block `start` on, a block draws `rates[s]` documents from source s (on average; any number >= 0)."""

    start: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Mixture:
    """orders: of each source's documents; stages: in order, the first from block 0; seed: of the shuffle.

    A source's share of any stretch of blocks is exact to one document, and a stage changes nothing before its start.
    """

    orders: tuple[Order, ...]
    stages: tuple[Stage, ...]
    seed: int

    def drawn(self, block: int) -> np.ndarray:
        """Documents of each source that come before `block`, int64 [sources]."""
        total = np.full(len(self.orders), 0.5)  # so that rounding is to the nearest
        ends = [stage.start for stage in self.stages[1:]] + [block]
        for stage, end in zip(self.stages, ends, strict=True):
            total += np.asarray(stage.rates, np.float64) * max(0, min(block, end) - stage.start)
        return np.floor(total).astype(np.int64)

    def block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of one block in their order: (source, document), int64 [n] each; n may be 0.

        `document` is an index into its source. The sources come by turns at random; each is used up in a fresh order
        each time round.
        """
        first, last = self.drawn(block), self.drawn(block + 1)
        documents = [self._documents(s, np.arange(a, b)) for s, (a, b) in enumerate(zip(first, last, strict=True))]
        sources = np.repeat(np.arange(len(self.orders)), last - first)
        if np.count_nonzero(last - first) <= 1:
            return sources, np.concatenate(documents)
        sources = sources[permute(np.arange(len(sources)), len(sources), key_of(self.seed, 0, block))]
        found = np.empty(len(sources), np.int64)
        found[np.argsort(sources.astype(np.uint16), kind="stable")] = np.concatenate(documents)
        return sources, found

    def ordinal(self, source: int, document: int, epoch: int) -> int:
        """How many documents the source gives before it gives `document` in epoch `epoch`."""
        return epoch * self.orders[source].size + self.orders[source].place(document, epoch)

    def block_of(self, source: int, ordinal: int) -> int | None:
        """The block that draws the source's document number `ordinal`; None if no block ever does."""
        if ordinal >= self.drawn(self.stages[-1].start)[source] and self.stages[-1].rates[source] == 0:
            return None
        low, high = 0, 1
        while self.drawn(high)[source] <= ordinal:
            low, high = high, 2 * high
        while high - low > 1:  # drawn(low) <= ordinal < drawn(high)
            middle = (low + high) // 2
            low, high = (middle, high) if self.drawn(middle)[source] <= ordinal else (low, middle)
        return low

    def _documents(self, source: int, ordinals: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(ordinals, self.orders[source].size)
        return self.orders[source].documents(places, epochs)
