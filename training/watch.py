"""What a rank makes of each step: bad ones are skipped or end the launch, and slow ranks are named."""

import collections
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from armillary.errors import LossError
from armillary.training.health import MOST_SKIPPED, PROBES, Verdict, bad_verdict, stragglers
from armillary.training.metrics import Metrics
from armillary.training.saves import Observer

if TYPE_CHECKING:
    from armillary.training.loop import Trainer

PROBE_EVERY = 20  # steps between two probes
PROBE_SIDE, PROBE_PRODUCTS = 256, 8  # a few milliseconds of a processor


class Watch:
    """One rank's; all ranks see the same figures and come to the same verdicts, which rank 0's observer is told."""

    def __init__(self, trainer: "Trainer", observer: Observer, metrics: Metrics):
        self._trainer, self._observer, self._metrics = trainer, observer, metrics
        self._skipped = 0  # in a row
        self._probes: collections.deque[list[float]] = collections.deque(maxlen=PROBES)
        self._slow: set[int] = set()  # that were told of

    def after_step(self, record: dict) -> None:
        """Collective at every PROBE_EVERY-th step. LossError where training cannot go on from here."""
        if record["bad"]:
            self._bad(record)
        else:
            self._skipped = 0
        if record["step"] % PROBE_EVERY == 0:
            self._compare(record["step"])

    def _bad(self, record: dict) -> None:
        trainer, kind = self._trainer, record["bad"]
        self._skipped += 1
        action = trainer.job.training.bad_step
        if action == "skip" and self._skipped > MOST_SKIPPED:
            action = "stop"
        verdict = bad_verdict(kind, record["loss"], record["grad_norm"], record["step"], action, trainer.cursor)
        self._tell(verdict)
        if action != "skip":
            raise LossError(verdict.what, f"data up to row {trainer.cursor.row} of block {trainer.cursor.block}",
                            verdict.remedy)  # fmt: skip

    def _compare(self, step: int) -> None:
        seconds = probe(self._trainer.rank.device)
        self._metrics.probe_seconds.set(seconds)
        self._probes.append(of_all_ranks(seconds, self._trainer.rank.device))
        slow = stragglers(self._probes)
        for rank in slow.keys() - self._slow:
            what = f"rank {rank} computes {slow[rank]:.1f} times slower than others, who wait for it"
            remedy = "see what else its machine runs, and its temperature; drain it if that stays"
            self._tell(Verdict("straggler", what, remedy, rank, phase="compute", step=step))
        self._slow = set(slow)

    def _tell(self, verdict: Verdict) -> None:
        if self._trainer.first:
            self._observer.verdict(verdict)


def probe(device: torch.device) -> float:
    """Seconds that this rank's device takes for a piece of work of its own, in which no rank waits for another."""
    a = torch.ones(PROBE_SIDE, PROBE_SIDE, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(PROBE_PRODUCTS):
        a = a @ a * (1 / PROBE_SIDE)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def of_all_ranks(number: float, device: torch.device) -> list[float]:
    """Every rank's number, by rank. Collective."""
    every = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    every[dist.get_rank()] = number
    dist.all_reduce(every)
    return every.tolist()
