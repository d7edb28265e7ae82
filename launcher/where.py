"""Which documents a step saw, and which step saw a document: from a run's events and its shards, nothing recorded."""

import bisect
from collections.abc import Iterator

from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.loader import Loader
from armillary.errors import JobError
from armillary.launcher.run import Run
from armillary.launcher.train import check_data
from armillary.training.checkpoint.manifest import read_manifest


class Where:
    """A run's steps and the documents behind them. `overrides`: data.path=..., where the shards have moved.

    DataError where the shards, or this version's order of them, are not the run's.
    """

    def __init__(self, run: Run, overrides: list[str] = ()):
        self._run, job = run, run.job(overrides).with_absolute_paths()
        if job.data.packing == "windows":
            raise JobError("a window is no document: it is cut from the token stream", run.path, "see data.packing")
        check_data(run, job, read_manifest(run.latest()).state if run.has_checkpoint else None)
        self.loader = Loader(job.data, job.image_shape)
        self._sources = [source.name for source in job.data.sources]
        curve = run.curve()
        self._steps = [event["step"] for event in curve]
        self._ends = [(event["cursor"]["block"], event["cursor"]["row"]) for event in curve]

    def step(self, step: int) -> list[dict]:
        """The documents of a step, in the order of its rows: row, source, number, name, and their part of the row's
        positions (start, stop). JobError where the run has not done that step."""
        if step not in self._steps:
            raise JobError(f"the run has not done step {step}", self._run.path, f"it has done {len(self._steps)} steps")
        place = self._steps.index(step)
        at = Cursor(block=self._ends[place - 1][0], row=self._ends[place - 1][1]) if place else Cursor()
        found, row = [], 0
        while (at.block, at.row) < self._ends[place]:
            rows, at = self.loader.plan.rows(at, 1)
            found += [{
                "row": row,
                "source": self._sources[piece.source],
                "number": piece.number,
                "name": piece.columns.names[piece.place].as_py(),
                "start": piece.start,
                "stop": piece.stop,
            } for piece in self.loader.documents(rows)]  # fmt: skip
            row += 1
        return found

    def document(self, source: str, number: int) -> Iterator[int]:
        """The steps that saw any part of document `number` of a source. JobError where there is no such document."""
        if source not in self._sources:
            raise JobError(
                f"there is no source {source}", self._run.path, f"the sources are: {', '.join(self._sources)}"
            )
        which, mixture = self._sources.index(source), self.loader.plan.mixture
        if not 0 <= number < mixture.orders[which].size:
            raise JobError(
                f"{source} has no document {number}", self._run.path, f"it has {mixture.orders[which].size:,}"
            )
        seen: set[int] = set()
        epoch = 0
        while self._ends:
            block = mixture.block_of(which, mixture.ordinal(which, number, epoch))
            if block is None or block > self._ends[-1][0]:
                return
            for row in self._rows_with(block, which, number):
                step = bisect.bisect_right(self._ends, (block, row))
                if step < len(self._steps) and self._steps[step] not in seen:
                    seen.add(self._steps[step])
                    yield self._steps[step]
            epoch += 1

    def _rows_with(self, number: int, source: int, document: int) -> list[int]:
        """Rows of a block that hold a part of the document."""
        block = self.loader.plan.block(number)
        of = block.packed.document
        mine = (of >= 0) & (block.source[of] == source) & (block.document[of] == document)
        ends = block.packed.row_ends.tolist()
        return sorted({bisect.bisect_right(ends, piece) for piece in mine.nonzero()[0].tolist()})
