"""From a cursor to packed batches: the plan of a step is global, each rank builds only its own rows."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from armillary.data_pipeline.batch import ImageShape, PackedBatch, Sequence, assemble
from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.corpus import Corpus
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.mixture import Mixture
from armillary.data_pipeline.pack import Piece, pack
from armillary.data_pipeline.shards import read_manifest
from armillary.data_pipeline.shuffle import key_of
from armillary.data_pipeline.tokenizer import Tokenizer


@dataclass(frozen=True)
class StepPlan:
    """The rows of one global batch, what they count for, and where the data stands after them."""

    rows: list[list[Piece]]
    learned_tokens: int
    after: Cursor


@dataclass(frozen=True)
class Step:
    """One rank's share of a step: its micro-batches, the learned tokens of the *global* batch, the cursor after."""

    micro_batches: list[PackedBatch]
    learned_tokens: int
    after: Cursor


class Loader:
    """Batches of a job's data. Pure in its cursor: the same cursor gives the same rows on any layout."""

    def __init__(self, config: DataConfig, shape: ImageShape):
        folder = Path(config.path)
        manifest = read_manifest(folder)
        self.tokenizer = Tokenizer.from_json(manifest.tokenizer)
        self._shape, self._seq_length, self._seed = shape, config.seq_length, config.seed
        self._augment = [source.augment for source in config.sources]
        kinds = [source.kind for source in config.sources]
        self._corpora = [Corpus(folder, manifest, kind, shape, self.tokenizer) for kind in kinds]
        for kind, corpus in zip(kinds, self._corpora, strict=True):
            corpus.check_fits(kind, config.seq_length)
        # Weights are shares of the positions, so a source of long documents is drawn from less often.
        rates = [s.weight / c.lengths.mean() for s, c in zip(config.sources, self._corpora, strict=True)]
        self._mixture = Mixture(tuple(map(len, self._corpora)), tuple(map(float, rates)), config.seed)

    def plan(self, cursor: Cursor, rows: int) -> StepPlan:
        """Which samples make up the `rows` rows of the global batch that starts at `cursor`."""
        packed, after = pack(cursor, rows, self._seq_length, self._lengths)
        return StepPlan(packed, sum(self._learned(piece) for row in packed for piece in row), after)

    def batch(self, rows: list[list[Piece]], with_images: bool = True) -> PackedBatch:
        """Build rows into one PackedBatch; without images where no stage of this rank sees them."""
        sequences = [[self._sequence(p.sample).part(p.start, p.stop) for p in row] for row in rows]
        return assemble(sequences, self._seq_length, self._shape, with_images)

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
                plan = self.plan(at, rows)
                mine = plan.rows[rank * share : (rank + 1) * share]
                chunks = [mine[i : i + micro_batch] for i in range(0, share, micro_batch)]
                yield Step([self.batch(chunk, with_images) for chunk in chunks], plan.learned_tokens, plan.after)
                at = plan.after

        return prefetch(make(), ahead=2)

    def _lengths(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        source, document = self._mixture.samples(start, count)
        lengths, cuttable = np.empty(count, np.int64), np.empty(count, bool)
        for s, corpus in enumerate(self._corpora):
            lengths[source == s] = corpus.lengths[document[source == s]]
            cuttable[source == s] = ~corpus.has_images[document[source == s]]
        return lengths, cuttable

    def _locate(self, sample: int) -> tuple[int, int]:
        """The sample's source and its document there."""
        source, document = self._mixture.samples(sample, 1)
        return int(source[0]), int(document[0])

    def _sequence(self, sample: int) -> Sequence:
        source, document = self._locate(sample)
        variation = int(key_of(self._seed, 2, sample)) if self._augment[source] else None
        return replace(self._corpora[source].sequence(document), source=source, variation=variation)

    def _learned(self, piece: Piece) -> int:
        source, document = self._locate(piece.sample)
        corpus = self._corpora[source]
        if piece.start == 0 and piece.stop == corpus.lengths[document]:
            return int(corpus.learned[document])
        return int(corpus.sequence(document).loss_mask[piece.start : piece.stop].sum())


def prefetch(items: Iterator, ahead: int) -> Iterator:
    """Run `items` in a thread, at most `ahead` items before the reader; its exception is raised here."""
    ready: queue.Queue = queue.Queue(ahead)
    closed = threading.Event()

    def fill():
        try:
            for item in items:
                if not _put(ready, (item, None), closed):
                    return
        except BaseException as error:
            _put(ready, (None, error), closed)

    thread = threading.Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()


def _put(ready: queue.Queue, item: object, closed: threading.Event) -> bool:
    while not closed.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
