"""From rows to memory: where the tokens of a block's pieces are, in the mapped files of its shards."""

import bisect
import functools
from dataclasses import dataclass

import numpy as np

from armillary.data_pipeline.batch import Laid, Pieces, address_of, blank
from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.corpus import Corpus
from armillary.data_pipeline.plan import Block, Rows
from armillary.data_pipeline.shards import ShardReader
from armillary.data_pipeline.shuffle import key_of, mix
from armillary.data_pipeline.windows import Windows


@dataclass(frozen=True)
class _Located:
    """Of each piece of a block, where its tokens are and what else is to be done with it."""

    address: np.ndarray  # int64: see batch.Pieces
    count: np.ndarray  # int64
    bounds: np.ndarray  # int64 [pieces + 1]: positions up to each piece, and in all
    source: np.ndarray  # int32; -1: padding
    variation: np.ndarray  # uint64: see batch.Laid
    laid: list[int]  # the pieces that are made of more than their tokens
    readers: list[ShardReader]  # that keep the files there
    batch: np.ndarray  # int64 [documents + 1]: which of the readers' batches has a document; the last: none
    batch_begins: list[int]  # the first of each reader's
    unchecked: set[int]  # those that have not been compared with their checksums

    def check(self, documents: np.ndarray) -> None:
        """Compare the batches of `documents` with their checksums, each once; DataError at the first that differs."""
        for batch in self.unchecked.intersection(np.unique(self.batch[documents]).tolist()):
            reader = bisect.bisect_right(self.batch_begins, batch) - 1
            self.readers[reader].check(batch - self.batch_begins[reader])
            self.unchecked.discard(batch)


class Locator:
    """Finds the pieces of rows. `dtype` is that of the shards' tokens."""

    def __init__(self, config: DataConfig, corpora: list[Corpus | Windows], dtype: np.dtype):
        self._corpora, self._width = corpora, dtype.itemsize
        self._blank = address_of(blank(config.seq_length, dtype))
        self._first_shard = np.cumsum([0, *(len(corpus.shard_sizes) for corpus in corpora)])
        self._augment, self._seed = np.array([source.augment for source in config.sources]), config.seed
        self._located = functools.lru_cache(2)(self._locate)  # a step may end one block and begin another

    def pieces(self, rows: Rows) -> Pieces:
        """What rows are made of; DataError where a batch that they need is damaged."""
        first, last = rows.pieces
        block, located = rows.block, self._located(rows.block)
        packed = block.packed
        if located.unchecked:
            located.check(packed.document[first:last])
        low, high = bisect.bisect_left(located.laid, first), bisect.bisect_left(located.laid, last)
        laid = {}
        for number in located.laid[low:high]:
            document = int(packed.document[number])
            source, shard, batch = block.batch_of(document)
            laid[number - first] = Laid(
                self._corpora[source].columns(shard, batch),
                int(block.entries.row[document]),
                int(packed.start[number]),
                int(packed.stop[number]),
                int(located.variation[number]),
            )
        mine = slice(first, last)
        bounds = located.bounds[first : last + 1] - located.bounds[first]
        return Pieces(bounds, located.source[mine], located.address[mine], located.count[mine], located.readers, laid)

    def _locate(self, block: Block) -> _Located:
        packed, entries, of, width = block.packed, block.entries, block.packed.document, self._width
        readers, reader = self._readers(block)
        batch_begins = np.cumsum([0, *(len(one.checked) for one in readers)])
        batch = batch_begins[reader] + entries.batch
        compressed = np.array([corpus.compressed for corpus in self._corpora])
        laid = (entries.first < 0) | compressed[block.source]
        begin = np.concatenate([one.tokens_at for one in readers])[batch] + entries.first * width
        end, size = begin + entries.tokens * width, np.array([one.size for one in readers])[reader]
        outside = reader[~laid & ((begin < 0) | (end > size))]
        if len(outside):
            raise readers[outside[0]].inconsistent()
        begin += np.array([one.address for one in readers])[reader]

        # Of pieces from here on. Padding is of document -1.
        padding, lengths = of < 0, packed.stop - packed.start
        laid = laid[of] & ~padding
        variation = np.zeros(len(of), np.uint64)
        if self._augment.any():
            names = mix(of.astype(np.uint64) + key_of(self._seed, 2, block.number)) | np.uint64(1)
            variation = np.where(self._augment[block.source[of]], names, np.uint64(0))
        return _Located(
            address=np.where(padding | laid, self._blank, begin[of] + packed.start * width),
            count=np.where(laid, 0, lengths),
            bounds=np.cumsum(np.concatenate([[0], lengths])),
            source=np.where(padding, -1, block.source[of]).astype(np.int32),
            variation=variation,
            laid=np.flatnonzero(laid).tolist(),
            readers=readers,
            batch=np.append(batch, batch_begins[-1]),
            batch_begins=batch_begins.tolist(),
            unchecked=set(np.flatnonzero(~np.concatenate([one.checked for one in readers])).tolist()),
        )

    def _readers(self, block: Block) -> tuple[list[ShardReader], np.ndarray]:
        """The shards that a block needs, open, and of each of its documents which of them has it."""
        shards = self._first_shard[block.source] + block.entries.shard
        needed = np.bincount(shards, minlength=self._first_shard[-1]) > 0
        readers = []
        for corpus, first, last in zip(self._corpora, self._first_shard, self._first_shard[1:], strict=False):
            readers += [corpus.reader(shard) for shard in np.flatnonzero(needed[first:last]).tolist()]
        return readers, (np.cumsum(needed) - 1)[shards]
