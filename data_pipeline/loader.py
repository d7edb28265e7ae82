"""From a cursor to packed batches: the plan of a step is global, each rank builds only its own rows."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np

from armillary.data_pipeline import pack
from armillary.data_pipeline.batch import PackedBatch, Pieces, assemble
from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.corpus import OPEN, Corpus, Entries, groups
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.images import ImageShape
from armillary.data_pipeline.mixture import Mixture, Stage
from armillary.data_pipeline.order import Order
from armillary.data_pipeline.prefetch import prefetch
from armillary.data_pipeline.shards import Columns, Manifest, read_manifest, schema_of
from armillary.data_pipeline.shuffle import key_of, mix
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.data_pipeline.windows import Windows, window_batch
from armillary.errors import DataError

BLOCK_ROWS = 1024  # a block draws documents for about so many rows, and is packed by itself


@dataclass(frozen=True)
class Block:
    """A block of the global order, packed: what its documents are, and which pieces of them make up its rows."""

    number: int
    source: np.ndarray  # int64 [documents]
    document: np.ndarray  # int64 [documents]: number in its source
    entries: Entries
    packed: pack.Packed


@dataclass(frozen=True)
class Rows:
    """Rows [first, last) of a block."""

    block: Block
    first: int
    last: int


@dataclass(frozen=True)
class Step:
    """One rank's share of a step: its micro-batches, and the cursor after the step."""

    micro_batches: list[PackedBatch]
    after: Cursor


class Loader:
    """Batches of a job's data. Pure in its cursor: the same cursor gives the same rows on any layout.

    `threads` decode images. DataError where the shards are missing, damaged or of another format.
    """

    def __init__(self, config: DataConfig, shape: ImageShape, threads: int = 1):
        folder = Path(config.path)
        manifest = read_manifest(folder)
        self.tokenizer = Tokenizer.from_json(manifest.tokenizer)
        self._config, self._shape = config, shape
        self._dtype = schema_of(self.tokenizer.size).field("tokens").type.value_type.to_pandas_dtype()
        if shape.positions > config.seq_length:
            raise DataError(
                f"an image takes {shape.positions} positions, a row has {config.seq_length}",
                "data.seq_length",
                f"set it to at least {shape.positions}, or take larger patches (model.patch_size)",
            )
        self.corpora = [self._corpus(folder, manifest, source.name) for source in config.sources]
        self.mixture = _mixture(config, self.corpora, shape)
        self._augment = np.array([source.augment for source in config.sources])
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None
        self.block = functools.lru_cache(4)(self._block)
        self._columns = functools.lru_cache(OPEN)(self._open_columns)

    def _corpus(self, folder: Path, manifest: Manifest, source: str) -> Corpus | Windows:
        corpus = Corpus(folder, manifest, source, self.tokenizer)
        if self._config.packing == "windows":
            if manifest.built_from.get("compression", "none") != "none":
                raise DataError(
                    "windows are not read from compressed shards", folder, 'build with compression = "none"'
                )
            return Windows(corpus, source, manifest.sources[source], self._config.seq_length)
        return corpus

    def plan(self, cursor: Cursor, rows: int) -> tuple[list[Rows], Cursor]:
        """The `rows` rows from `cursor` on, and the cursor after them."""
        found, block, row = [], cursor.block, cursor.row
        while rows:
            last = min(row + rows, self.block(block).packed.rows)
            if last > row:
                found.append(Rows(self.block(block), row, last))
                rows -= last - row
            row = last
            if row >= self.block(block).packed.rows:
                block, row = block + 1, 0
        return found, Cursor(block=block, row=row)

    def batch(self, rows: list[Rows], with_images: bool = True) -> PackedBatch:
        """Build rows into one PackedBatch; without patches where no stage of this rank sees them."""
        if self._config.packing == "windows":
            return self._window_batch(rows)
        pieces, count = self.pieces(rows)
        each = self._pool.map if self._pool else map
        return assemble(pieces, count, self._config.seq_length, self._shape, self.tokenizer.image, with_images, each)

    def steps(
        self, cursor: Cursor, rows: int, micro_batch: int, rank: int, ranks: int, with_images: bool = True
    ) -> Iterator[Step]:
        """Endless steps of `rows` rows from `cursor` on, built two ahead in a thread.

        Rank `rank` of `ranks` (data parallel) gets rows [rank * rows / ranks, ...) in micro-batches.
        """
        share = rows // ranks

        def make() -> Iterator[Step]:
            at = cursor
            while True:
                planned, after = self.plan(at, rows)
                starts = range(rank * share, (rank + 1) * share, micro_batch)
                yield Step([self.batch(_cut(planned, start, micro_batch), with_images) for start in starts], after)
                at = after

        return prefetch(make(), ahead=2)

    def _window_batch(self, rows: list[Rows]) -> PackedBatch:
        """A row is a window, and a window a document of its block."""
        sources, tokens, labels = [], [], []
        for part in rows:
            which = np.arange(part.first, part.last)
            source = part.block.source[which]
            found = [np.empty((len(which), self._config.seq_length), self._dtype) for _ in range(2)]
            for s, mine in groups(source):
                gathered = self.corpora[s].gather(part.block.entries, which[mine])
                if len(mine) == len(which):
                    found = gathered
                else:
                    found[0][mine], found[1][mine] = gathered
            sources.append(source.astype(np.int32))
            tokens.append(found[0])
            labels.append(found[1])
        joined = [one[0] if len(rows) == 1 else np.concatenate(one) for one in (tokens, labels, sources)]
        return window_batch(*joined, (self._shape.patches, self._shape.patch_dim))

    def pieces(self, rows: list[Rows]) -> tuple[Pieces, int]:
        """What rows are made of, for `assemble`, and how many they are."""
        count = sum(part.last - part.first for part in rows)
        parts, done = [], 0
        for part in rows:
            parts.append(self._pieces(part, done))
            done += part.last - part.first
        columns = [column for part in parts for column in part.columns]
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("row", "first", "start", "stop", "at", "source", "variation")
        }
        return Pieces(columns=columns, **joined), count

    def _pieces(self, rows: Rows, done: int) -> Pieces:
        """The pieces of rows that stand behind `done` others in a batch."""
        packed = rows.block.packed
        ends = packed.row_ends[rows.first : rows.last]
        begin = int(packed.row_ends[rows.first - 1]) if rows.first else 0
        which = slice(begin, int(ends[-1]))
        start, stop, of = packed.start[which], packed.stop[which], packed.document[which]
        row_of = np.searchsorted(ends, np.arange(begin, int(ends[-1])), side="right")
        before = np.cumsum(stop - start) - (stop - start)
        row_begins = np.concatenate([[begin], ends[:-1]]) - begin
        at = before - before[row_begins][row_of] + (row_of + done) * self._config.seq_length
        source, entries = rows.block.source[of], rows.block.entries
        places = zip(source.tolist(), entries.shard[of].tolist(), entries.batch[of].tolist(), strict=True)
        columns = [self._columns(*place) for place in places]
        variation = np.zeros(len(of), np.uint64)
        if self._augment.any():
            names = mix(of.astype(np.uint64) + key_of(self._config.seed, 2, rows.block.number)) | np.uint64(1)
            variation = np.where(self._augment[source], names, np.uint64(0))
        return Pieces(columns, entries.row[of], entries.first[of], start, stop, at, source.astype(np.int32), variation)

    def _block(self, number: int) -> Block:
        source, document = self.mixture.block(number)
        entries = Entries(*(np.empty(len(source), np.int64) for _ in fields(Entries)))
        for s, which in groups(source):
            found = self.corpora[s].look_up(document[which])
            for field in fields(Entries):
                getattr(entries, field.name)[which] = getattr(found, field.name)
        lengths = entries.tokens - 1 + entries.images * (self._shape.positions - 1)
        parts = self._parts(source, entries, lengths)
        seq_length, max_images = self._config.seq_length, self._config.max_images
        if self._config.packing == "best_fit":
            packed = pack.best_fit(parts, seq_length, max_images, key_of(self._config.seed, 3, number))
        else:
            packed = pack.greedy(parts, seq_length, max_images)
        return Block(number, source, document, entries, packed)

    def _parts(self, source: np.ndarray, entries: Entries, lengths: np.ndarray) -> pack.Parts:
        """The block's documents; those with images that do not fit in a row are cut between images."""
        filled = np.flatnonzero(lengths > 0)
        parts = pack.Parts(filled, np.zeros(len(filled), np.int64), lengths[filled], entries.images[filled])
        long = (parts.images > 0) & (
            (parts.length > self._config.seq_length) | (parts.images > self._config.max_images)
        )
        if not long.any():
            return parts
        cut = []
        for part in zip(*(column.tolist() for column in (*astuple(parts), long)), strict=True):
            document, start, length, images, too_long = part
            if too_long:
                place = (array[document] for array in (source, entries.shard, entries.batch))
                columns = self._columns(*map(int, place))
                cut += self._cut_document(columns, int(entries.row[document]), document, length, images)
            else:
                cut.append((document, start, length, images))
        return pack.Parts(*(np.array(column, np.int64) for column in zip(*cut, strict=True)))

    def _cut_document(
        self, columns: Columns, row: int, document: int, length: int, images: int
    ) -> list[tuple[int, int, int, int]]:
        width, config = self._shape.positions, self._config
        begin = int(columns.image_offsets[row])
        starts = columns.image_at[begin : begin + images].astype(np.int64) + np.arange(images) * (width - 1)
        cuts = pack.cut_between_images(length, starts.tolist(), width, config.seq_length, config.max_images)
        held = np.diff([*np.searchsorted(starts, cuts), images])
        sizes = np.diff([*cuts, length])
        return list(zip([document] * len(cuts), cuts, sizes.tolist(), held.tolist(), strict=True))

    def _open_columns(self, source: int, shard: int, batch: int) -> Columns:
        return self.corpora[source].columns(shard, batch)


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


def _cut(rows: list[Rows], start: int, count: int) -> list[Rows]:
    """Rows [start, start + count) of all `rows` together."""
    found, before = [], 0
    for part in rows:
        size = part.last - part.first
        low, high = max(start - before, 0), min(start + count - before, size)
        if low < high:
            found.append(Rows(part.block, part.first + low, part.first + high))
        before += size
    return found
