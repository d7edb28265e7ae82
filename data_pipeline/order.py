"""The order of one source's documents: a permutation of them for each epoch, as a pure function."""

import functools
from dataclasses import dataclass

import numpy as np

from armillary.data_pipeline.shuffle import key_of, permute, unpermute


@dataclass(frozen=True)
class Order:
    """sizes: documents of each shard; key: names the permutations; together: how many shards are shuffled together.

    With `together` 0 any document may follow any other. Otherwise the shards come in a random order, and documents
    are shuffled within groups of `together` shards, so that few shards are in use at a time: for shards that are
    fetched from far away.
    """

    sizes: tuple[int, ...]
    key: int
    together: int = 0

    @functools.cached_property
    def size(self) -> int:
        """Documents in all."""
        return sum(self.sizes)

    def documents(self, places: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The documents at `places` (int64 [n], each in [0, size)) of `epochs` (int64 [n], ascending), int64 [n]."""
        one = len(epochs) and epochs[0] == epochs[-1]
        if not self.together:
            return permute(places, self.size, key_of(self.key, int(epochs[0]) if one else epochs))
        found = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            groups = _groups(self, epoch)
            mine = np.flatnonzero(epochs == epoch)
            of = np.searchsorted(groups.ends, places[mine], side="right")
            for number in np.unique(of).tolist():
                which = mine[of == number]
                begin = int(groups.ends[number - 1]) if number else 0
                within = permute(
                    places[which] - begin, int(groups.ends[number]) - begin, self._group_key(epoch, number)
                )
                found[which] = groups.document(number, within)
        return found

    def place(self, document: int, epoch: int) -> int:
        """Where `document` stands in `epoch`: the inverse of `documents`."""
        if not self.together:
            return int(unpermute(np.asarray(document), self.size, key_of(self.key, epoch)))
        groups = _groups(self, epoch)
        number, within = groups.find(document)
        begin = int(groups.ends[number - 1]) if number else 0
        size = int(groups.ends[number]) - begin
        return begin + int(unpermute(np.asarray(within), size, self._group_key(epoch, number)))

    def _group_key(self, epoch: int, number: int) -> np.uint64:
        return key_of(self.key, epoch, 1, number)


@dataclass(frozen=True)
class _Groups:
    """An epoch's shards in their order, in groups. What it holds grows with the number of shards."""

    shards: np.ndarray  # int64 [shards]: in their order
    begins: np.ndarray  # int64 [shards]: first document of each shard of the source
    behind: np.ndarray  # int64 [shards]: documents up to and with the n-th shard of the order
    ends: np.ndarray  # int64 [groups]: documents up to and with each group
    together: int

    def document(self, number: int, within: np.ndarray) -> np.ndarray:
        """The documents that stand `within` group `number`, before it is shuffled."""
        place = within + (int(self.ends[number - 1]) if number else 0)
        nth = np.searchsorted(self.behind, place, side="right")
        before = np.where(nth > 0, self.behind[nth - 1], 0)
        return self.begins[self.shards[nth]] + place - before

    def find(self, document: int) -> tuple[int, int]:
        """The group of a document, and where it stands within it."""
        shard = int(np.searchsorted(self.begins, document, side="right")) - 1
        nth = int(np.flatnonzero(self.shards == shard)[0])
        number = nth // self.together
        before = int(self.behind[nth - 1]) if nth else 0
        return number, before + document - int(self.begins[shard]) - (int(self.ends[number - 1]) if number else 0)


@functools.lru_cache(8)
def _groups(order: Order, epoch: int) -> _Groups:
    sizes = np.array(order.sizes, np.int64)
    shards = permute(np.arange(len(sizes)), len(sizes), key_of(order.key, epoch, 2))
    behind = np.cumsum(sizes[shards])
    last = np.minimum(np.arange(order.together, len(sizes) + order.together, order.together), len(sizes)) - 1
    return _Groups(shards, np.cumsum(sizes) - sizes, behind, behind[last], order.together)
