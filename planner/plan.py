"""A plan: the memory and the time of one layout of a job on given machines, and what follows from them."""

from dataclasses import dataclass

from armillary.errors import JobError
from armillary.model.config import ModelConfig
from armillary.model.flops import hardware_flops, model_flops, work
from armillary.planner.hardware import Cluster
from armillary.planner.memory import StageMemory, memory
from armillary.planner.software import ARMILLARY, REFERENCES
from armillary.planner.stages import Step
from armillary.planner.time import StepTime, step_time
from armillary.training.config import TrainJob
from armillary.training.layout import Layout
from armillary.training.support import problems

GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """What a number of tokens takes: energy is that of the GPUs at full power, nothing around them."""

    tokens: float
    days: float
    gpu_hours: float
    cost: float  # in the currency of the price, 0 where the hardware file has none
    kwh: float


@dataclass(frozen=True)
class Plan:
    """One layout, planned. `memory` has a stage of each kind: the first, one between, the last."""

    model: ModelConfig
    layout: Layout
    step: Step
    cluster: Cluster
    memory: tuple[StageMemory, ...]
    time: StepTime
    checkpoint_every: int = 0  # steps; 0: never

    @property
    def peak_bytes(self) -> float:
        """Memory of the fullest GPU."""
        return max(stage.total for stage in self.memory)

    @property
    def fullest(self) -> StageMemory:
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.cluster.memory_bytes

    @property
    def tokens(self) -> int:
        """Positions of a step."""
        return self.step.global_batch * self.step.seq_length

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.time.total

    @property
    def tflops(self) -> float:
        """Model FLOP/s of one GPU, in 10^12 (model.flops): nothing that is computed again counts."""
        return model_flops(self.model, self._work) / self.time.total / self.cluster.gpus / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOP/s over the dense peak of the precision (Chowdhery et al. 2022, appendix B)."""
        return self.tflops * 1e12 / self.cluster.peak(self.step.precision)

    @property
    def hfu(self) -> float:
        """The same with what is computed again (Korthikanti et al. 2022, section 6)."""
        done = hardware_flops(self.model, self._work, self.layout.recompute)
        return done / self.time.total / self.cluster.gpus / self.cluster.peak(self.step.precision)

    @property
    def _work(self):
        return work(self.tokens, self.step.document, self.step.global_batch * self.step.images)

    def budget(self, tokens: float) -> Budget:
        """What training on `tokens` positions takes."""
        hours = tokens / self.tokens_per_second / 3600
        gpu_hours = hours * self.cluster.gpus
        return Budget(
            tokens, hours / 24, gpu_hours, gpu_hours * self.cluster.price_hour, gpu_hours * self.cluster.power_w / 1e3
        )

    def as_dict(self, tokens: float = 0) -> dict:
        """The whole plan, as JSON has it: bytes, seconds, shares; with a budget where `tokens` are given."""
        kinds = [("first", 0), ("middle", 1), ("last", self.layout.pipeline - 1)]
        kinds = kinds[:1] if self.layout.pipeline == 1 else kinds[::2] if self.layout.pipeline == 2 else kinds
        stages = [
            {"stage": stage, "kind": kind, **memory.as_dict()}
            for (kind, stage), memory in zip(kinds, self.memory, strict=True)
        ]
        return {
            "layout": self.layout.model_dump(mode="json"),
            "gpu": self.cluster.name,
            "gpus": self.cluster.gpus,
            "fits": self.fits,
            "memory_bytes": {"capacity": self.cluster.memory_bytes, "peak": self.peak_bytes, "stages": stages},
            "seconds": self.time.as_dict(),
            "tokens_per_second": self.tokens_per_second,
            "tflops_per_gpu": self.tflops,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "budget": vars(self.budget(tokens)) if tokens else None,
        }


def step_of(job: TrainJob, document: float = 0.0, images: float = 0.0) -> Step:
    """A step of the job. document: positions of a document (model.flops.work), 0: as many as a row has; images: of a
    row, on average."""
    length, training = job.data.seq_length, job.training
    return Step(
        length, training.global_batch, document or float(length), images, training.precision, training.deterministic,
        training.compile,
    )  # fmt: skip


def plan_layout(model: ModelConfig, layout: Layout, step: Step, cluster: Cluster, checkpoint_every: int = 0) -> Plan:
    """The plan of a layout that is allowed (training.support.problems) and has as many ranks as there are GPUs."""
    assert layout.world_size == cluster.gpus
    software = ARMILLARY if cluster.triton else REFERENCES
    return Plan(
        model, layout, step, cluster, tuple(memory(model, layout, step, software)),
        step_time(model, layout, step, cluster, checkpoint_every, software), checkpoint_every,
    )  # fmt: skip


def plan_job(job: TrainJob, cluster: Cluster, document: float = 0.0, images: float = 0.0) -> Plan:
    """The plan of the job's own layout on `cluster`, which is taken to have as many GPUs as the layout has ranks.

    JobError where the layout cannot run the model and batch, whatever the machines.
    """
    if found := problems(job.setting):
        reasons = "; ".join(f"{key}: {reason}" for key, reason in found)
        raise JobError(f"the layout cannot run this model: {reasons}", "[parallel]", "change the layout")
    machines = cluster.of(job.parallel.world_size)
    return plan_layout(job.model, job.parallel, step_of(job, document, images), machines, job.checkpoint.every)


def fits(job: TrainJob, cluster: Cluster, document: float = 0.0, images: float = 0.0) -> Plan:
    """The plan of the job's own layout, if it fits the GPUs' memory; JobError says what is largest, and what would fit.

    Pure: what training and submission ask before anything starts.
    """
    from armillary.planner.search import search

    plan = plan_job(job, cluster, document, images)
    if plan.fits:
        return plan
    parts = plan.fullest.as_dict()
    largest = max((part for part in parts if part != "total"), key=parts.__getitem__)
    found = search(job.model, plan.step, plan.cluster)
    if found.ranked:
        best = found.ranked[0].layout
        instead = f"this layout would fit: {described(best)}"
    else:
        instead = f"no layout fits {plan.cluster.gpus} of these GPUs; take more of them, or a smaller model or batch"
    raise JobError(
        f"the layout needs {plan.peak_bytes / GIB:.1f} GiB on a GPU with {plan.cluster.memory_bytes / GIB:.1f} GiB; "
        f"the largest part are {largest} with {parts[largest] / GIB:.1f} GiB",
        "[parallel]", f"{instead}; `armillary plan JOB.toml --explain` says more",
    )  # fmt: skip


def described(layout: Layout) -> str:
    """The keys of a layout that are not their defaults, as overrides: data=8 tensor=2 micro_batch=4."""
    plain = Layout.model_fields
    keys = (
        "data", "tensor", "pipeline", "virtual", "first_stage_layers", "last_stage_layers", "context", "expert", "zero",
        "engine", "offload", "recompute", "sequence_parallel", "micro_batch",
    )  # fmt: skip
    shown = [(key, getattr(layout, key)) for key in keys if getattr(layout, key) != plain[key].default]
    return " ".join(f"{key}={str(value).lower()}" for key, value in shown)
