"""From a cursor to packed batches: the plan of a step is global, each rank builds only its own rows."""

import collections
import contextlib
import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from armillary.data_pipeline.batch import Laid, PackedBatch, Pieces, Stretches, assemble, blank
from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.corpus import OPEN, Corpus, groups
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.folder import Folder, is_url, open_folder
from armillary.data_pipeline.images import ImageShape
from armillary.data_pipeline.plan import Planner, Rows, cut
from armillary.data_pipeline.shards import Columns, Manifest, ShardReader, read_manifest, schema_of
from armillary.data_pipeline.shuffle import key_of, mix
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.data_pipeline.windows import Windows
from armillary.errors import DataError

FETCHES = 8  # files that are fetched at once
OPEN_FETCHED = 16  # shards from a URL that are held open beside those of the blocks in hand


@dataclass(frozen=True)
class Step:
    """One rank's share of a step: its micro-batches, and the cursor after the step."""

    micro_batches: list[PackedBatch]
    after: Cursor


class Piece(NamedTuple):
    """A piece of a document in a row: input positions [start, stop) of document `number` of a source."""

    row: int  # of those that were asked for
    at: int  # the position of all their rows where it begins
    source: int
    number: int
    start: int
    stop: int
    columns: Columns  # the document
    place: int  # is number `place` in them


class Loader:
    """Batches of a job's data. Pure in its cursor: the same cursor gives the same rows on any layout.

    `threads` decode images. DataError where the shards are missing, damaged or of another format.
    """

    def __init__(self, config: DataConfig, shape: ImageShape, threads: int = 1):
        folder = open_folder(config.path, config.cache, config.cache_bytes)
        manifest = read_manifest(folder)
        self.tokenizer = Tokenizer.from_json(manifest.tokenizer)
        self._config, self._shape = config, shape
        self._dtype = np.dtype(schema_of(self.tokenizer.size).field("tokens").type.value_type.to_pandas_dtype())
        if shape.positions > config.seq_length:
            raise DataError(
                f"an image takes {shape.positions} positions, a row has {config.seq_length}",
                "data.seq_length",
                f"set it to at least {shape.positions}, or take larger patches (model.patch_size)",
            )
        self._remote, self._closed = is_url(config.path), threading.Event()
        self.corpora = [self._corpus(folder, manifest, source.name) for source in config.sources]
        self.plan = Planner(config, self.corpora, shape)
        if self._remote:
            self._check_cache()
        self._augment = np.array([source.augment for source in config.sources])
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None
        self._located = functools.lru_cache(2)(self._locate)  # a step may end one block and begin another

    def _corpus(self, folder: Folder, manifest: Manifest, source: str) -> Corpus | Windows:
        corpus = Corpus(folder, manifest, source, self.tokenizer, OPEN_FETCHED if self._remote else OPEN)
        if self._config.packing == "windows":
            return Windows(corpus, source, manifest.sources[source], self._config.seq_length)
        return corpus

    def batch(self, rows: list[Rows], with_tokens: bool = True, with_images: bool = True) -> PackedBatch:
        """Build rows into one PackedBatch; for a pipeline stage that needs less, without patches, or without all but
        the pieces' bounds: then no shard is read."""
        if not with_tokens:
            return self._bounds(rows)
        parts = [self._pieces(part) for part in rows]
        each = self._pool.map if self._pool else map
        return assemble(
            _joined(parts), self._dtype, self._shape, self.tokenizer.image, with_images=with_images, each=each
        )

    def steps(
        self,
        cursor: Cursor,
        rows: int,
        micro_batch: int,
        rank: int,
        ranks: int,
        with_tokens: bool = True,
        with_images: bool = True,
    ) -> Iterator[Step]:
        """Endless steps of `rows` rows from `cursor` on, see `batch`.

        Rank `rank` of `ranks` (data parallel) gets rows [rank * rows / ranks, ...) in micro-batches.
        """
        starts = range(rank * rows // ranks, (rank + 1) * rows // ranks, micro_batch)
        fetched = cursor.block - 1
        while True:
            if self._remote and cursor.block > fetched:
                fetched = cursor.block
                self._fetch(fetched, not with_tokens)
                ahead = threading.Thread(target=self._fetch_ahead, args=(fetched + 1, not with_tokens), daemon=True)
                ahead.start()
            planned, cursor = self.plan.rows(cursor, rows)
            micro_batches = [self.batch(cut(planned, start, micro_batch), with_tokens, with_images) for start in starts]
            yield Step(micro_batches, cursor)

    def _bounds(self, rows: list[Rows]) -> PackedBatch:
        parts = [slice(*part.pieces) for part in rows]
        packed = [part.block.packed for part in rows]
        lengths = [(one.stop - one.start)[which] for one, which in zip(packed, parts, strict=True)]
        none, shape = np.empty(0, self._dtype), self._shape
        return PackedBatch(
            tokens_T=none,
            last_labels=none,
            loss_mask_T=np.empty(0, np.float32),
            cu_seqlens=np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int32),
            piece_sources=np.empty(0, np.int32),
            patches_IND=np.empty((0, shape.patches, shape.patch_dim), np.uint8),
            image_starts_I=np.empty(0, np.int64),
        )

    def close(self) -> None:
        """Fetch nothing more."""
        self._closed.set()

    def _fetch(self, block: int, index_only: bool) -> None:
        """Have the shards of a block on this machine before they are needed; DataError at the first that fails."""

        def fetch(place: tuple[int, int]) -> None:
            if not self._closed.is_set():
                self.corpora[place[0]].fetch(place[1], index_only)

        with ThreadPoolExecutor(FETCHES, "fetch") as pool:
            collections.deque(pool.map(fetch, self._shards_of(block)), maxlen=0)

    def _fetch_ahead(self, block: int, index_only: bool) -> None:
        with contextlib.suppress(DataError):  # it is raised when the block's turn comes
            self._fetch(block, index_only)

    def _shards_of(self, block: int) -> list[tuple[int, int]]:
        """(source, shard) of all documents of a block."""
        source, document = self.plan.mixture.block(block)
        return [(s, n) for s, which in groups(source) for n in self.corpora[s].shards_of(document[which]).tolist()]

    def _check_cache(self) -> None:
        """DataError where the cache cannot hold a block and the next: shards would be fetched again and again."""
        shards = {*self._shards_of(0), *self._shards_of(1)}
        needed, held = sum(self.corpora[s].bytes_of(shard) for s, shard in shards), self._config.cache_bytes
        if needed > held:
            raise DataError(
                f"the {len(shards)} shards that are in use at a time have {needed:,} bytes, the cache holds {held:,}",
                "data.cache_bytes",
                "raise it, or set data.shuffle_shards lower (0 shuffles all of a source)",
            )

    def documents(self, rows: list[Rows]) -> Iterator[Piece]:
        """The pieces of rows in their order, padding left out: for looking at, one by one."""
        seq_length, before = self._config.seq_length, 0
        for part in rows:
            block, (first, last) = part.block, part.pieces
            packed = block.packed
            of, start, stop = packed.document[first:last], packed.start[first:last], packed.stop[first:last]
            at = before + np.cumsum(stop - start) - (stop - start)
            before += (part.last - part.first) * seq_length
            filled = (of >= 0).nonzero()[0]
            documents, entries = of[filled], block.entries
            pieces = (at[filled], start[filled], stop[filled])
            places = (block.source, block.document, entries.shard, entries.batch, entries.row)
            for place, low, high, source, number, shard, batch, row in zip(
                *(column.tolist() for column in pieces), *(column[documents].tolist() for column in places), strict=True
            ):
                columns = self.corpora[source].columns(shard, batch)
                yield Piece(place // seq_length, place, source, number, low, high, columns, row)

    def _pieces(self, rows: Rows) -> Pieces:
        """What rows are made of. The batches that they need are checked here."""
        first, last = rows.pieces
        block, located = rows.block, self._located(rows.block.number)
        packed = block.packed
        unchecked = first + located.unchecked[first:last].nonzero()[0]
        for number in unchecked.tolist():
            located.readers[located.reader[number]].check(block.batch_of(packed.document[number])[2])
        located.unchecked[unchecked] = False
        laid = {}
        for number in (first + located.laid[first:last].nonzero()[0]).tolist():
            source, shard, batch = block.batch_of(packed.document[number])
            laid[number - first] = Laid(
                self.corpora[source].columns(shard, batch),
                int(block.entries.row[packed.document[number]]),
                int(packed.start[number]),
                int(packed.stop[number]),
                int(located.variation[number]),
            )
        bounds = located.bounds[first : last + 1] - located.bounds[first]
        return Pieces(bounds, located.source[first:last], located.stretches.cut(first, last), laid)

    def _locate(self, number: int) -> "_Located":
        block = self.plan.block(number)
        packed, entries, of = block.packed, block.entries, block.packed.document
        source = np.where(of < 0, -1, block.source[of]).astype(np.int32)
        compressed = np.array([corpus.compressed for corpus in self.corpora])
        laid = (of >= 0) & ((entries.first[of] < 0) | compressed[source])
        begins, unchecked = np.zeros(len(of), np.int64), np.zeros(len(of), bool)
        readers, reader_of = [], np.full(len(of), -1)
        plain = np.flatnonzero((of >= 0) & ~laid)
        for s, of_source in groups(source[plain]):
            for shard, mine in groups(entries.shard[of[plain[of_source]]]):
                which = plain[of_source[mine]]
                reader, batch = self.corpora[s].reader(shard), entries.batch[of[which]]
                begins[which] = reader.tokens_at[batch] + entries.first[of[which]] + packed.start[which]
                unchecked[which] = ~reader.checked[batch]
                reader_of[which] = len(readers)
                readers.append(reader)
        lengths = packed.stop - packed.start
        ends = begins + np.where(laid, 0, lengths)
        files = [*(reader.token_view for reader in readers), blank(self._config.seq_length, self._dtype)]
        stretches = Stretches([files[number] for number in reader_of.tolist()], begins.tolist(), ends.tolist())
        variation = np.zeros(len(of), np.uint64)
        if self._augment.any():
            names = mix(of.astype(np.uint64) + key_of(self._config.seed, 2, number)) | np.uint64(1)
            variation = np.where(self._augment[source], names, np.uint64(0))
        bounds = np.cumsum(np.concatenate([[0], lengths]))
        return _Located(stretches, readers, reader_of, bounds, source, laid, unchecked, variation)


@dataclass(frozen=True)
class _Located:
    """Of each piece of a block, where its tokens are and what else is to be done with it."""

    stretches: Stretches
    readers: list[ShardReader]  # that the files are views of
    reader: np.ndarray  # int64: which of them; -1: none
    bounds: np.ndarray  # int64 [pieces + 1]: positions up to each piece, and in all
    source: np.ndarray  # int32; -1: padding
    laid: np.ndarray  # bool: it is made of more than its tokens
    unchecked: np.ndarray  # bool: its batch has not been compared with its checksum
    variation: np.ndarray  # uint64: see batch.Laid


def _joined(parts: list[Pieces]) -> Pieces:
    """Pieces of several blocks behind each other."""
    if len(parts) == 1:
        return parts[0]
    stretches, laid, bounds, before = Stretches([], [], []), {}, [np.zeros(1, np.int64)], 0
    for part in parts:
        laid |= {len(stretches.files) + number: piece for number, piece in part.laid.items()}
        stretches.extend(part.stretches)
        bounds.append(before + part.bounds[1:])
        before += int(part.bounds[-1])
    return Pieces(np.concatenate(bounds), np.concatenate([part.source for part in parts]), stretches, laid)
