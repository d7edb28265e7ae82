"""From a cursor to packed batches: the plan of a step is global, each rank builds only its own rows."""

import collections
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from armillary.data_pipeline.batch import PackedBatch, assemble, joined
from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.corpus import OPEN, Corpus
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.folder import Folder, open_folder
from armillary.data_pipeline.images import ImageShape
from armillary.data_pipeline.locate import Locator
from armillary.data_pipeline.plan import Planner, Rows, cut
from armillary.data_pipeline.shards import Columns, Manifest, read_manifest, schema_of
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.data_pipeline.windows import Windows
from armillary.errors import DataError
from armillary.storage import is_url

FETCHES = 8  # files that are fetched at once
AHEAD = "fetch ahead"  # name of the thread that has the next block fetched
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
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None
        self.locator = Locator(config, self.corpora, shape, self._dtype, self.tokenizer.image)

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
        pieces = joined([self.locator.pieces(part, with_images) for part in rows])
        return assemble(pieces, self._dtype, self._shape, self._pool.map if self._pool else map)

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
                wanted = (fetched + 1, not with_tokens)
                threading.Thread(target=self._fetch_ahead, name=AHEAD, args=wanted, daemon=True).start()
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
            mask_bounds=np.zeros(1, np.int32),
            mask_values=np.empty(0, np.float32),
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
        return [
            (number, shard)
            for number, corpus in enumerate(self.corpora)
            for shard in corpus.shards_of(document[source == number]).tolist()
        ]

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
