"""From a cursor to rows: which documents a block of the global order has, and which pieces of them make up its rows.

The plan is the same on every rank, and reads indexes alone.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from armillary.data_pipeline import pack
from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.corpus import Corpus, Entries, inverse, joined
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.images import ImageShape
from armillary.data_pipeline.mixture import BLOCK_ROWS, Mixture, Stage
from armillary.data_pipeline.order import Order
from armillary.data_pipeline.shuffle import key_of
from armillary.data_pipeline.windows import Windows


@dataclass(frozen=True, eq=False)
class Block:
    """A block of the global order, packed: what its documents are, and which pieces of them make up its rows."""

    number: int
    source: np.ndarray  # int64 [documents]
    document: np.ndarray  # int64 [documents]: number in its source
    entries: Entries
    packed: pack.Packed

    def batch_of(self, document: int) -> tuple[int, int, int]:
        """(source, shard, batch) that hold one of its documents."""
        return int(self.source[document]), int(self.entries.shard[document]), int(self.entries.batch[document])


class Rows(NamedTuple):
    """Rows [first, last) of a block."""

    block: Block
    first: int
    last: int

    @property
    def pieces(self) -> tuple[int, int]:
        """The first piece of theirs, and the first behind them."""
        ends = self.block.packed.row_ends
        return int(ends[self.first - 1]) if self.first else 0, int(ends[self.last - 1])


class Planner:
    """Blocks and rows of a job's data: pure functions of their numbers."""

    def __init__(self, config: DataConfig, corpora: list[Corpus | Windows], shape: ImageShape):
        self._config, self._corpora, self._shape = config, corpora, shape
        self.mixture = _mixture(config, corpora, shape)
        self.block = functools.lru_cache(4)(self._block)

    def rows(self, cursor: Cursor, count: int) -> tuple[list[Rows], Cursor]:
        """The `count` rows from `cursor` on, and the cursor after them."""
        found, number, row = [], cursor.block, cursor.row
        while count:
            block = self.block(number)
            last = min(row + count, block.packed.rows)
            if last > row:
                found.append(Rows(block, row, last))
                count -= last - row
            row = last
            if row >= block.packed.rows:
                number, row = number + 1, 0
        return found, Cursor(block=number, row=row)

    def _block(self, number: int) -> Block:
        source, document = self.mixture.block(number)
        entries = self._look_up(source, document)
        return Block(number, source, document, entries, self._packed(number, source, entries))

    def _packed(self, number: int, source: np.ndarray, entries: Entries) -> pack.Packed:
        seq_length, max_images = self._config.seq_length, self._config.max_images
        if self._config.packing == "windows":
            return pack.one_a_row(len(source), seq_length)
        parts = self._parts(source, entries)
        if self._config.packing == "best_fit":
            return pack.best_fit(parts, seq_length, max_images, key_of(self._config.seed, 3, number))
        return pack.greedy(parts, seq_length, max_images)

    def _look_up(self, source: np.ndarray, document: np.ndarray) -> Entries:
        if len(self._corpora) == 1:
            return self._corpora[0].look_up(document)
        order = np.argsort(source.astype(np.uint16), kind="stable")
        ends = np.searchsorted(source[order], np.arange(len(self._corpora)), side="right")
        parts = np.split(document[order], ends[:-1])
        found = [corpus.look_up(part) for corpus, part in zip(self._corpora, parts, strict=True)]
        return joined(found).take(inverse(order))

    def _parts(self, source: np.ndarray, entries: Entries) -> pack.Parts:
        """The block's documents; those with images that do not fit in a row are cut between images."""
        lengths = entries.tokens - 1 + entries.images * (self._shape.positions - 1)
        filled = np.flatnonzero(lengths > 0)
        parts = pack.Parts(filled, np.zeros(len(filled), np.int64), lengths[filled], entries.images[filled])
        config = self._config
        long = np.flatnonzero(
            (parts.images > 0) & ((parts.length > config.seq_length) | (parts.images > config.max_images))
        )
        if not len(long):
            return parts
        starts = self._image_starts(source, entries, filled[long])
        return pack.cut_between_images(parts, long, starts, self._shape.positions, config.seq_length, config.max_images)

    def _image_starts(self, source: np.ndarray, entries: Entries, documents: np.ndarray) -> np.ndarray:
        """The first position of each image of some documents of a block, in its document; int64."""
        found, columns = [], (source, entries.shard, entries.batch, entries.row, entries.images)
        for of, shard, batch, row, images in zip(*(column[documents].tolist() for column in columns), strict=True):
            reader = self._corpora[of].reader(shard)
            begin = int(reader.image_offsets[reader.batch_begins[batch] + row])
            found.append(reader.image_at[begin : begin + images])
            if len(found[-1]) != images:
                raise reader.inconsistent()
        counts = entries.images[documents]
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.concatenate(found).astype(np.int64) + number * (self._shape.positions - 1)


def _mixture(config: DataConfig, corpora: list[Corpus | Windows], shape: ImageShape) -> Mixture:
    """Weights are shares of the positions, so a source of long documents is drawn from less often."""
    positions = [(c.tokens - c.documents + c.images * (shape.positions - 1)) / c.documents for c in corpora]
    per_block = BLOCK_ROWS * config.seq_length
    stages = []
    for start, weights in config.stages():
        rates = [w / sum(weights) * per_block / max(mean, 1) for w, mean in zip(weights, positions, strict=True)]
        stages.append(Stage(-(-start // per_block), tuple(rates)))
    orders = [
        Order(corpus.shard_sizes, int(key_of(config.seed, 1, number)), config.shuffle_shards)
        for number, corpus in enumerate(corpora)
    ]
    return Mixture(tuple(orders), tuple(stages), config.seed)


def cut(rows: list[Rows], start: int, count: int) -> list[Rows]:
    """Rows [start, start + count) of all `rows` together."""
    found, before = [], 0
    for part in rows:
        size = part.last - part.first
        low, high = max(start - before, 0), min(start + count - before, size)
        if low < high:
            found.append(Rows(part.block, part.first + low, part.first + high))
        before += size
    return found
