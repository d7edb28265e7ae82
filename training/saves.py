"""When a run's state is saved, and what becomes of it. All ranks decide alike: by flags that every step shares."""

import errno
import math
import sys
import time
from typing import Protocol

import torch
import torch.distributed as dist

from armillary.errors import CheckpointError, RunError
from armillary.model.coordinates import local_shape, placements
from armillary.storage import open_storage
from armillary.training.checkpoint.manifest import MOMENTS, State, folder_name
from armillary.training.checkpoint.saver import Saver
from armillary.training.health import Verdict, failed_save, heartbeat
from armillary.training.metrics import Metrics
from armillary.training.step import Flags

MOST_FAILURES = 3  # saves in a row that may fail before the run ends


class Observer(Protocol):
    """Whoever started the ranks. Only rank 0's observer is told of steps and saves."""

    def stop_requested(self) -> bool:
        """Whether to end after the step in hand; one rank's yes ends all."""

    def step_done(self, record: dict) -> None:
        """A step's figures: step, time, loss, source_loss (of the sources it has tokens of), grad_norm,
        learning_rate, tokens, model_flops (of this step, on all ranks), seconds and their parts."""

    def saved(self, name: str, state: State) -> None:
        """All ranks wrote a checkpoint into the folder `name` of the store; commit it. Called in the background."""

    def verdict(self, verdict: Verdict) -> None:
        """Something went wrong that training goes on from, or ends with right after this."""

    def not_saved(self, step: int, reason: str) -> None:
        """There is no checkpoint of this step: it failed, which a verdict tells too, or was left out."""


class Saves:
    """One rank's saves. `trainer` is a training.loop.Trainer."""

    def __init__(self, trainer, observer: Observer, metrics: Metrics):
        assignment, rank = trainer.assignment, trainer.rank
        self._trainer, self._observer, self._metrics = trainer, observer, metrics
        self._config, self._first = trainer.job.checkpoint, rank.rank == 0
        self._store = open_storage(assignment.store, CheckpointError)
        self._saver = Saver(
            self._store, assignment.generation, rank.rank, rank.world_size, rank.device.type == "cuda", observer.saved
        )
        own = (
            math.prod(local_shape(parameter)) / place.turns
            for parameter, place in placements(trainer.stages)
            if place.turn >= 0
        )
        self._size = self._sum(4 * (1 + len(MOMENTS)) * sum(own))  # bytes of a checkpoint
        self._failures = 0  # in a row
        self._began, self._step = 0.0, 0  # when the save under way did, 0: there is none; and of which step it is

    def flags(self, stop: bool) -> Flags:
        """What this rank has to say in the next step."""
        due = (self._trainer.step + 1) % self._config.every == 0
        free = self._store.free() if due and self._first else None
        return Flags(stop, self._saver.busy, self._saver.failed, free is not None and free < self._size)

    def after_step(self, flags: Flags, last: bool) -> None:
        """Save, where it is time to; the `last` step's checkpoint is committed, or RunError raised, when it returns."""
        step = self._trainer.step
        if flags.failed:
            self._end_failed()
        elif self._began and not flags.saving:
            self._end()
        if not last and step % self._config.every:
            return
        heartbeat.enter("checkpoint")
        before = time.perf_counter()
        if flags.full and not last:
            self._failed(step, f"there is no room for {self._size:,} bytes in {self._store.at()}", full=True)
        elif flags.saving and self._config.when_busy == "skip" and not last:
            self._tell(
                step, f"the one before it is still being written after {time.perf_counter() - self._began:.0f} s"
            )
        else:
            self._finish()
            self._begin()
            if last:
                self._finish()
        self._metrics.checkpoint_seconds.inc(time.perf_counter() - before)
        if last and self._failures:
            raise RunError(f"the last checkpoint could not be saved, at step {step}", self._store.at(), "see above")

    def _begin(self) -> None:
        trainer = self._trainer
        self._began, self._step = time.perf_counter(), trainer.step
        self._saver.save(folder_name(trainer.step), trainer.engine.state(), trainer.engine.live, trainer.state())

    def before_update(self) -> None:
        """What is being saved must not change before it is copied."""
        before = time.perf_counter()
        self._saver.wait_copied()
        self._metrics.checkpoint_seconds.inc(time.perf_counter() - before)

    def _finish(self) -> None:
        """Wait for the save under way, if there is one. Collective."""
        if not self._began:
            return
        self._saver.wait_written()
        if self._sum(self._saver.failed):
            self._saver.give_up()
        self._saver.wait()
        if self._sum(self._saver.failed):
            self._end_failed()
        else:
            self._end()

    def _end(self) -> None:
        self._metrics.checkpoint_duration.observe(time.perf_counter() - self._began)
        self._metrics.checkpoint_bytes.inc(self._saver.bytes)
        self._began, self._failures = 0.0, 0

    def _end_failed(self) -> None:
        self._saver.give_up()
        self._saver.wait()
        error, self._began = self._saver.failure(), 0.0
        if error is not None:
            print(f"no checkpoint of step {self._step}: {error}", file=sys.stderr, flush=True)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "another rank's part could not be written: see its log" if error is None else str(error)
        self._failed(self._step, reason, full=self._sum(full) > 0)

    def _failed(self, step: int, reason: str, full: bool) -> None:
        self._failures += 1
        self._metrics.checkpoint_failures.inc()
        self._tell(step, reason)
        verdict = failed_save(step, reason, full)
        if self._first:
            self._observer.verdict(verdict)
        if self._failures == MOST_FAILURES:
            what = f"{MOST_FAILURES} checkpoints in a row could not be saved: {reason}"
            raise RunError(what, self._store.at(), "see to the storage, then `armillary resume`")

    def _tell(self, step: int, reason: str) -> None:
        if self._first:
            self._observer.not_saved(step, reason)

    def _sum(self, number: float) -> int:
        """Of all ranks."""
        total = torch.tensor(number, dtype=torch.float64, device=self._trainer.rank.device)
        dist.all_reduce(total)
        return round(total.item())
