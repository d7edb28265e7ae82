"""From rows to memory: where the tokens of a block's pieces are, in the mapped files of its shards."""

import bisect
import functools
from dataclasses import dataclass

import numpy as np

from armillary.data_pipeline.batch import Pieces
from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.corpus import Corpus
from armillary.data_pipeline.images import ImageShape
from armillary.data_pipeline.layout import PLAIN, Blank, Layout, address_of, lay_out, table_of
from armillary.data_pipeline.plan import Block, Rows
from armillary.data_pipeline.shards import ShardReader
from armillary.data_pipeline.shuffle import key_of, mix
from armillary.data_pipeline.windows import Windows

_NOTHING = np.empty(0, np.uint64)


@dataclass(frozen=True)
class _Located:
    """Where a block's documents are, and the batches that hold them. What has an item more, has it for padding."""

    documents: np.ndarray  # for `lay_out`; addresses of compressed sources count from their batch's first token
    tables: np.ndarray  # the same
    source: np.ndarray  # int32 [documents + 1]; -1: padding
    compressed: np.ndarray | None  # bool [documents + 1]: of a compressed source; None: none is
    end: np.ndarray  # int64 [documents]: the byte of its batch's tokens where a document ends
    readers: list[ShardReader]  # that keep the files there
    batch: np.ndarray  # int64 [documents + 1]: which of the readers' batches has a document; the last: none
    batch_begins: list[int]  # the first of each reader's
    unchecked: np.ndarray | None  # bool [batches + 1]: it has not been compared with its checksum; None: each has

    def check(self, documents: np.ndarray) -> None:
        """Compare the batches of `documents` with their checksums, each once; DataError at the first that differs."""
        if self.unchecked is None:
            return
        batches = self.batch[documents]
        unchecked = batches[self.unchecked[batches]]
        if not len(unchecked):
            return
        for batch in np.unique(unchecked).tolist():
            reader = bisect.bisect_right(self.batch_begins, batch) - 1
            self.readers[reader].check(batch - self.batch_begins[reader])
            self.unchecked[batch] = False


class Locator:
    """Finds the pieces of rows. `dtype` is that of tokens, `image_token` the one that stands for an image."""

    def __init__(
        self,
        config: DataConfig,
        corpora: list[Corpus | Windows],
        shape: ImageShape,
        dtype: np.dtype,
        image_token: int,
    ):
        self._corpora = corpora
        self._padding = np.zeros(config.seq_length + 1, dtype)
        self._image = np.full(shape.positions + 1, image_token, dtype)
        self._blank = Blank(address_of(self._padding), address_of(self._image), shape.positions, dtype.itemsize)
        self._first_shard = np.cumsum([0, *(len(corpus.shard_sizes) for corpus in corpora)])
        self._compressed = np.array([corpus.compressed for corpus in corpora])
        self._augment, self._seed = np.array([source.augment for source in config.sources]), config.seed
        self._located = functools.lru_cache(2)(self._locate)  # a step may end one block and begin another

    def pieces(self, rows: Rows, with_images: bool) -> Pieces:
        """What rows are made of; DataError where a batch that they need is damaged."""
        first, last = rows.pieces
        block, located = rows.block, self._located(rows.block)
        packed = block.packed
        documents, start, stop = packed.document[first:last], packed.start[first:last], packed.stop[first:last]
        located.check(documents)
        try:
            layout = lay_out(located.documents, located.tables, documents, start, stop, self._blank)
        except LookupError as error:
            raise located.readers[located.documents[2, error.args[0]]].inconsistent() from None
        images, variations = self._images(block, located, documents, layout) if with_images else ([], _NOTHING)
        held = [located.readers, self._padding, self._image]
        pieces = Pieces(layout, located.source[documents], images, variations, held)
        return pieces if located.compressed is None else self._unpacked(pieces, block, located, documents)

    def _images(
        self, block: Block, located: _Located, documents: np.ndarray, layout: Layout
    ) -> tuple[list[memoryview], np.ndarray]:
        """The files of the images of pieces, and the names of their variations."""
        if not len(layout.image_place):
            return [], _NOTHING
        documents, number = documents[layout.image_piece], layout.image_number
        columns = (documents, number, located.batch[documents], block.entries.row[documents])
        found, files = [], {}
        for document, nth, batch, row in zip(*(column.tolist() for column in columns), strict=True):
            if batch not in files:
                source, *where = block.batch_of(document)
                files[batch] = self._corpora[source].columns(*where).files
            data, bounds, before = files[batch]
            at = before[row] + nth
            found.append(data[bounds[at] : bounds[at + 1]])
        varied = self._augment[block.source[documents]]
        if not varied.any():
            return found, np.zeros(len(found), np.uint64)
        names = mix(documents.astype(np.uint64) + key_of(self._seed, 2, block.number)) | np.uint64(1)
        return found, np.where(varied, key_of(names, number), np.uint64(0))

    def _unpacked(self, pieces: Pieces, block: Block, located: _Located, documents: np.ndarray) -> Pieces:
        """The same, where the tokens of compressed batches are, now that they are unpacked."""
        layout, held = pieces.layout, list(pieces.held)
        address, begins = layout.address.copy(), np.append(0, layout.last[:-1] + 1)
        for piece in np.flatnonzero(located.compressed[documents]).tolist():
            document = documents[piece]
            source, shard, batch = block.batch_of(document)
            columns = self._corpora[source].columns(shard, batch)
            held.append(columns)
            if located.end[document] > columns.tokens.nbytes:
                raise self._corpora[source].reader(shard).inconsistent()
            mine = address[begins[piece] : layout.last[piece] + 1]
            mine += np.where(mine == self._blank.image, 0, address_of(columns.tokens))
        return pieces._replace(layout=layout._replace(address=address), held=held)

    def _locate(self, block: Block) -> _Located:
        entries = block.entries
        readers, reader = self._readers(block)
        batch_begins = np.cumsum([0, *(len(one.checked) for one in readers)])
        batch = batch_begins[reader] + entries.batch
        compressed = self._compressed[block.source]
        begin = entries.first * self._blank.itemsize
        tokens_at = np.concatenate([one.tokens_at for one in readers])[batch]
        end, size = begin + entries.tokens * self._blank.itemsize, np.array([one.size for one in readers])[reader]
        outside = reader[~compressed & ((tokens_at < 0) | (tokens_at > size - end))]
        if len(outside):
            raise readers[outside[0]].inconsistent()
        begin += np.where(compressed, 0, tokens_at + np.array([one.address for one in readers])[reader])

        row = np.where(entries.plain, -1, np.concatenate([one.batch_begins for one in readers])[batch] + entries.row)
        unchecked = ~np.concatenate([*(one.checked for one in readers), [True]])
        return _Located(
            documents=np.stack([begin, entries.tokens, reader, row]),
            tables=np.stack([table_of(one) if one.mixed else PLAIN for one in readers]),
            source=np.append(block.source, -1).astype(np.int32),
            compressed=np.append(compressed, False) if compressed.any() else None,
            readers=readers,
            end=end,
            batch=np.append(batch, batch_begins[-1]),
            batch_begins=batch_begins.tolist(),
            unchecked=unchecked if unchecked.any() else None,
        )

    def _readers(self, block: Block) -> tuple[list[ShardReader], np.ndarray]:
        """The shards that a block needs, open, and of each of its documents which of them has it."""
        shards = self._first_shard[block.source] + block.entries.shard
        needed = np.bincount(shards, minlength=self._first_shard[-1]) > 0
        readers = []
        for corpus, first, last in zip(self._corpora, self._first_shard, self._first_shard[1:], strict=False):
            readers += [corpus.reader(shard) for shard in np.flatnonzero(needed[first:last]).tolist()]
        return readers, (np.cumsum(needed) - 1)[shards]
