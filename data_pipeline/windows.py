"""A source's tokens without regard to documents: stretches of its batches' token buffers, copied a row at a time."""

import functools

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from armillary.data_pipeline.batch import PackedBatch
from armillary.data_pipeline.corpus import OPEN, Corpus, Entries, groups
from armillary.data_pipeline.shards import Shard
from armillary.errors import DataError


class Windows:
    """Stands in for a Corpus: window after window of `length` positions, each with a token more for its last label.

    DataError where the source has images, which a window would cut, or no window at all; and, when a shard is first
    read, where its documents have roles or weights.
    """

    def __init__(self, corpus: Corpus, source: str, shards: tuple[Shard, ...], length: int):
        if corpus.images:
            raise DataError(f"the source {source} has images, which windows would cut", "data.packing", "pack greedily")
        counts = [np.maximum(np.array(shard.batch_tokens) - 1, 0) // length for shard in shards]
        self._ends = np.cumsum(np.concatenate(counts))  # int64 [batches of all shards]
        self._shard = np.repeat(np.arange(len(shards)), [len(count) for count in counts])
        self._batch = np.concatenate([np.arange(len(count)) for count in counts])
        self._length, self._corpus = length, corpus
        self._source, self._rows = source, functools.lru_cache(OPEN)(self._open_rows)
        self.shard_sizes = tuple(int(count.sum()) for count in counts)
        self.documents = int(self._ends[-1])
        if not self.documents:
            raise DataError(f"the source {source} has no window of {length} tokens", "data.seq_length", "make it less")
        self.tokens, self.images = self.documents * (length + 1), 0

    def _open_rows(self, shard: int) -> np.ndarray:
        """Every stretch of `length` tokens of a shard's file, as a view."""
        reader = self._corpus.reader(shard)
        if (reader.first < 0).any():
            raise DataError(
                f"the source {self._source} has roles or weights, of which windows know nothing", "data.packing",
                "pack greedily",
            )  # fmt: skip
        return sliding_window_view(reader.flat, self._length)

    def look_up(self, windows: np.ndarray) -> Entries:
        """Where `windows` (int64 [n]) are."""
        place = np.searchsorted(self._ends, windows, side="right")
        begin = np.where(place > 0, self._ends[place - 1], 0)
        nothing = np.zeros(len(windows), np.int64)
        first = (windows - begin) * self._length
        return Entries(nothing + self._length + 1, nothing, first, self._shard[place], self._batch[place], nothing - 1)

    def gather(self, entries: Entries, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of the windows entries[which], [n, length] each, in the shards' dtype."""
        shard = entries.shard[which]
        parts = []
        for number, mine in groups(shard):
            chosen = which[mine]
            starts = self._corpus.reader(number).token_starts(entries.batch[chosen]) + entries.first[chosen]
            rows = self._rows(number)
            parts.append((mine, rows[starts], rows[starts + 1]))
        if len(parts) == 1:
            return parts[0][1:]
        tokens, labels = (np.empty((len(which), self._length), parts[0][1].dtype) for _ in range(2))
        for mine, some_tokens, some_labels in parts:
            tokens[mine], labels[mine] = some_tokens, some_labels
        return tokens, labels


def window_batch(
    tokens: np.ndarray, labels: np.ndarray, sources: np.ndarray, patch_shape: tuple[int, int]
) -> PackedBatch:
    """A batch of windows, [rows, length], of `sources` (int32 [rows]): every label counts, every row is a piece."""
    mask, positions, bounds = _constants(*tokens.shape)
    return PackedBatch(
        tokens_T=tokens.ravel(),
        labels_T=labels.ravel(),
        loss_mask_T=mask,
        positions_T=positions,
        cu_seqlens=bounds,
        piece_sources=sources,
        patches_IND=np.empty((0, *patch_shape), np.uint8),
        image_starts_I=np.empty(0, np.int64),
    )


@functools.lru_cache(4)
def _constants(rows: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask, positions and bounds of every batch of that shape."""
    positions = np.tile(np.arange(length, dtype=np.int32), rows)
    return np.ones(rows * length, np.float32), positions, np.arange(rows + 1, dtype=np.int32) * length
