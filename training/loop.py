"""One rank's training, from joining the others to the last checkpoint. Runs under Ray actors and torchrun alike."""

import collections
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.mixture import ORDER
from armillary.errors import CheckpointError
from armillary.model.coordinates import initialize, placements
from armillary.model.flops import model_flops
from armillary.model.layers import compile_operations
from armillary.model.multimodal import MultimodalModel
from armillary.storage import open_storage
from armillary.training.checkpoint.load import Reader
from armillary.training.checkpoint.manifest import MOMENTS, State
from armillary.training.config import TrainJob
from armillary.training.delivery import Delivery
from armillary.training.engines.canonical import CanonicalSums
from armillary.training.engines.megatron import MegatronEngine
from armillary.training.engines.shared import Engine
from armillary.training.engines.zero import ZeroEngine
from armillary.training.health import RECENT, bad_step, heartbeat
from armillary.training.metrics import Metrics
from armillary.training.process_group import Rank
from armillary.training.saves import Observer, Saves
from armillary.training.step import NO_FLAGS, Flags, train_step
from armillary.training.watch import Watch

START = Cursor()


@dataclass(frozen=True)
class Assignment:
    """What one rank is to do: which part of which run, from where, until when.

    store: folder or URL of the run's checkpoints; resume: that of a committed one, or None for a new run; beyond: data
    up to there is left out, though no step had it; until: the step to stop after; peak_flops: dense FLOP/s of this
    rank's device in the job's precision, 0 if unknown.
    """

    run: str
    job: TrainJob
    job_hash: str
    rank: Rank
    store: str | Path
    resume: str | Path | None
    until: int
    generation: int = 0
    peak_flops: float = 0.0
    beyond: Cursor = START


class Trainer:
    """A rank's model, optimizer and data, at some step of a run. Needs `process_group.join` before."""

    def __init__(self, assignment: Assignment):
        job, rank = assignment.job, assignment.rank
        self.assignment, self.job, self.rank = assignment, job, rank
        self.stages = build_model(job, rank.device)
        if job.training.compile and rank.device.type == "cpu":  # on a GPU these are kernels
            for stage in self.stages:
                compile_operations(stage)
        self.engine = build_engine(self.stages, job)
        self.step, self.cursor, self.tokens, self.loss = 0, Cursor(), 0, None
        self.samples: tuple[int, ...] = ()  # of the last step, see DeviceStep
        self.skipped = 0  # steps whose update was left out
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=RECENT)  # loss, gradient norm
        if assignment.resume is not None:
            self._load(Reader(open_storage(assignment.resume, CheckpointError)))
        elif job.checkpoint.start:
            self._begin_with(Reader(open_storage(job.checkpoint.start, CheckpointError)))
        self.cursor = max(self.cursor, assignment.beyond, key=lambda cursor: (cursor.block, cursor.row))
        self.data = Delivery(job, self.cursor, rank.rank, rank.device)

    def train_step(
        self, flags: Flags = NO_FLAGS, before_update: Callable[[], None] = lambda: None
    ) -> tuple[dict, Flags]:
        """Do one step; its record, and the flags that any rank raised. A bad step leaves the weights as they were."""
        started = time.perf_counter()
        heartbeat.enter("data")
        step = next(self.data)
        waited = time.perf_counter() - started
        rate = self.job.optimizer.rate(self.step, self.job.training.steps)
        names = [source.name for source in self.job.data.sources]
        result = train_step(
            self.stages, self.engine, step, len(names), rate, self.rank.device, flags, before_update,
            lambda loss, grad_norm: not self._bad(loss, grad_norm),
        )  # fmt: skip
        bad = "" if result.accepted else self._bad(result.loss, result.grad_norm)
        self.step, self.cursor, self.samples = self.step + 1, step.after, step.samples
        heartbeat.step = self.step
        if bad:
            self.skipped += 1
        else:
            self.loss = result.loss
            self._recent.append((result.loss, result.grad_norm))
        self.tokens += self.job.tokens_per_step
        record = {
            "step": self.step,
            "loss": result.loss,
            "source_loss": {n: x for n, x in zip(names, result.source_losses, strict=True) if x is not None},
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "tokens": self.tokens,
            "model_flops": model_flops(self.job.model, result.work),
            "cursor": step.after.model_dump(),
            "time": time.time(),
            "seconds": time.perf_counter() - started,
            "data_wait_seconds": waited,
            "compute_seconds": result.compute_seconds,
            "collective_wait_seconds": result.collective_wait_seconds,
            "reduce_seconds": result.reduce_seconds,
            "bad": bad,
        }
        return record, result.flags

    def _bad(self, loss: float, grad_norm: float) -> str:
        return bad_step(loss, grad_norm, self._recent, self.job.training.spike)

    def state(self) -> State:
        """All but the tensors of a checkpoint of this step."""
        return State(
            step=self.step,
            cursor=self.cursor,
            data_order=ORDER,
            tokens=self.tokens,
            loss=self.loss,
            run=self.assignment.run,
            job_hash=self.assignment.job_hash,
            job=self.job.model_dump(mode="json"),
            saved_at=time.time(),
            skipped=self.skipped,
            recent=tuple(self._recent) if self.job.training.spike else (),
        )

    @property
    def first(self) -> bool:
        """Whether this is the rank that the observer hears from."""
        return self.rank.rank == 0

    def close(self) -> None:
        self.data.close()

    def _begin_with(self, checkpoint: Reader) -> None:
        """Take over a checkpoint's weights, and nothing else."""
        states = checkpoint.states(place for _, place in placements(self.stages))
        for parts in states.values():
            for moment in MOMENTS:
                parts[moment].zero_()
        self._put(states, 0)

    def _put(self, states: dict[str, dict[str, torch.Tensor]], updates: int) -> None:
        for parts in states.values():
            parts.update((part, tensor.to(self.rank.device)) for part, tensor in parts.items())
        self.engine.load_state(states, updates)

    def _load(self, checkpoint: Reader) -> None:
        state = checkpoint.manifest.state
        self.step, self.cursor, self.tokens, self.loss = state.step, state.cursor, state.tokens, state.loss
        self.skipped = state.skipped
        self._recent.extend(state.recent)
        self._put(checkpoint.states(place for _, place in placements(self.stages)), state.step - state.skipped)


def build_model(job: TrainJob, device: torch.device) -> list[MultimodalModel]:
    """This rank's part of the job's model with its initial weights, or its virtual stages' parts. Needs
    `process_group.join` before."""
    dtype = torch.bfloat16 if job.training.precision == "bf16" else torch.float32
    layout = job.parallel
    layers = layout.stage_layers(job.model.depth)
    stages = [
        MultimodalModel(job.model, layout.sequence_parallel, dtype, layout.recompute, layers, layout.virtual, number)
        for number in range(layout.virtual)
    ]
    initialize(stages, job.training.seed)
    return [stage.to(device) for stage in stages]


def build_engine(stages: list[MultimodalModel], job: TrainJob) -> Engine:
    """Who reduces gradients and updates weights, as the layout has it."""
    layout, sums = job.parallel, None
    if job.training.deterministic:
        parameters = [parameter for stage in stages for parameter in stage.parameters()]
        sums = CanonicalSums(parameters, job.training.global_batch // layout.micro_batch, layout.data)
    if layout.engine == "megatron":
        return MegatronEngine(stages, job.optimizer, sums, layout.data)
    return ZeroEngine(stages, job.optimizer, job.training.precision == "bf16", layout, sums)


def run(assignment: Assignment, observer: Observer, serving: Callable[[str], None] = lambda address: None) -> int:
    """Train from the assignment's start to its end; returns the last step done.

    `serving` is told where this rank's metrics are. A checkpoint is saved every `checkpoint.every` steps, at
    the end, and when the observer asks to stop.
    """
    heartbeat.enter("start")
    rank = assignment.rank
    metrics = Metrics(assignment.run, rank.rank, assignment.job.parallel, assignment.generation, rank.device)
    serving(metrics.serve(assignment.job.metrics))
    try:
        with contextlib.closing(Trainer(assignment)) as trainer:
            _train(trainer, observer, metrics)
            return trainer.step
    finally:
        metrics.close()


def _train(trainer: Trainer, observer: Observer, metrics: Metrics) -> None:
    """The step loop."""
    job, until = trainer.job, trainer.assignment.until
    saves, watch = Saves(trainer, observer, metrics), Watch(trainer, observer, metrics)
    started, start = time.time(), trainer.step
    while trainer.step < until:
        record, flags = trainer.train_step(saves.flags(observer.stop_requested()), saves.before_update)
        _count(metrics, record, job.tokens_per_step, job.parallel.world_size, trainer.assignment.peak_flops)
        for source, count in zip(job.data.sources, trainer.samples, strict=False):
            metrics.samples(source.name, count)
        metrics.checkpoint_interval.set((time.time() - started) / (trainer.step - start) * job.checkpoint.every)
        if trainer.first and not record["bad"]:
            observer.step_done(record)
        watch.after_step(record)
        saves.after_step(flags, last=flags.stop or trainer.step >= until)
        if flags.stop:
            break
    heartbeat.enter("end")


def _count(metrics: Metrics, record: dict, tokens: int, ranks: int, peak_flops: float) -> None:
    metrics.steps.inc()
    metrics.tokens.inc(tokens / ranks)
    metrics.model_flops.inc(record["model_flops"] / ranks)
    if peak_flops:
        metrics.mfu.set(record["model_flops"] / ranks / record["seconds"] / peak_flops)
    metrics.loss.set(record["loss"])
    for source, loss in record["source_loss"].items():
        metrics.source_loss(source, loss)
    metrics.grad_norm.set(record["grad_norm"])
    metrics.learning_rate.set(record["learning_rate"])
    metrics.data_wait_seconds.inc(record["data_wait_seconds"])
    metrics.compute_seconds.inc(record["compute_seconds"])
    metrics.collective_wait_seconds.inc(record["collective_wait_seconds"])
    metrics.reduce_seconds.inc(record["reduce_seconds"])
    metrics.step_duration.observe(record["seconds"])
    metrics.data_block.set(record["cursor"]["block"])
    metrics.data_row.set(record["cursor"]["row"])
