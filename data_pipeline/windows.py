"""A source's tokens without regard to documents: stretches of its batches' token buffers."""

import numpy as np

from armillary.data_pipeline.corpus import Corpus, Entries
from armillary.data_pipeline.shards import Shard, ShardReader
from armillary.errors import DataError


class Windows:
    """Stands in for a Corpus: its documents are windows of `length` positions, each with a token more for its last
    label.

    DataError where the source has images, which a window would cut, is compressed, or has no window at all; and, when
    a shard is first read, where its documents have roles or weights.
    """

    compressed = False

    def __init__(self, corpus: Corpus, source: str, shards: tuple[Shard, ...], length: int):
        if corpus.images:
            raise DataError(f"the source {source} has images, which windows would cut", "data.packing", "pack greedily")
        if corpus.compressed:
            raise DataError(
                "windows are not read from compressed shards", f"the source {source}", 'build with compression = "none"'
            )
        counts = [np.maximum(np.array(shard.batch_tokens) - 1, 0) // length for shard in shards]
        self._ends = np.cumsum(np.concatenate(counts))  # int64 [batches of all shards]
        self._shard = np.repeat(np.arange(len(shards)), [len(count) for count in counts])
        self._batch = np.concatenate([np.arange(len(count)) for count in counts])
        self._length, self._corpus, self._source = length, corpus, source
        self.fetch, self.bytes_of = corpus.fetch, corpus.bytes_of
        self.shard_sizes = tuple(int(count.sum()) for count in counts)
        self.documents = int(self._ends[-1])
        if not self.documents:
            raise DataError(f"the source {source} has no window of {length} tokens", "data.seq_length", "make it less")
        self.tokens, self.images = self.documents * (length + 1), 0

    def reader(self, shard: int) -> ShardReader:
        """As that of the corpus."""
        reader = self._corpus.reader(shard)
        if reader.mixed:
            raise DataError(
                f"the source {self._source} has roles or weights, of which windows know nothing", "data.packing",
                "pack greedily",
            )  # fmt: skip
        return reader

    def shards_of(self, windows: np.ndarray) -> np.ndarray:
        """As that of the corpus."""
        return np.unique(self._shard[np.searchsorted(self._ends, windows, side="right")])

    def look_up(self, windows: np.ndarray) -> Entries:
        """Where `windows` (int64 [n]) are: `first` is where a window begins in its batch, `row` means nothing."""
        place = np.searchsorted(self._ends, windows, side="right")
        begin = np.where(place > 0, self._ends[place - 1], 0)
        nothing = np.zeros(len(windows), np.int64)
        first = (windows - begin) * self._length
        plain = np.ones(len(windows), bool)
        return Entries(
            nothing + self._length + 1, nothing, first, self._batch[place], nothing, self._shard[place], plain
        )
