"""What binds a plan and what would help: it is planned again on better machines, and with one thing changed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from armillary.planner.plan import Plan, described, plan_layout
from armillary.planner.search import RECOMPUTE, divisors
from armillary.planner.stages import setting
from armillary.training.layout import Layout
from armillary.training.support import problems

BETTER = 1.1
RESOURCES = {
    "products of matrices": ("bf16", "fp32"),
    "attention kernels": ("attention_forward", "attention_backward"),
    "memory bandwidth": ("memory_bytes_s",),
    "links inside a node": ("link",),
    "network between nodes": ("network",),
    "link to the host": ("host",),
    "starting kernels": ("kernel_s",),
}


@dataclass(frozen=True)
class Binding:
    """A resource of the machines, and the share of the step's time that a tenth more of it would save."""

    resource: str
    saved: float


@dataclass(frozen=True)
class Change:
    """A neighbour of the layout: what is changed, its step's seconds and the fullest GPU's bytes."""

    change: str
    layout: Layout
    seconds: float
    peak_bytes: float
    fits: bool


@dataclass(frozen=True)
class Explanation:
    """bindings: the strongest first; changes: those that fit and are faster, the fastest first; where the plan does not
    fit, those that need less memory, the smallest first."""

    bindings: list[Binding]
    changes: list[Change]
    tried: int


def explain(plan: Plan) -> Explanation:
    """Plan every neighbour of `plan`, and `plan` with a tenth more of each resource."""
    tried = list(neighbours(plan))
    if plan.fits:
        better = sorted((c for c in tried if c.fits and c.seconds < plan.time.total), key=lambda c: c.seconds)
    else:
        better = sorted((c for c in tried if c.peak_bytes < plan.peak_bytes), key=lambda c: c.peak_bytes)
    return Explanation(bindings(plan), better, len(tried))


def bindings(plan: Plan) -> list[Binding]:
    """How much a tenth more of each resource would save."""
    found = []
    for resource, names in RESOURCES.items():
        changes = {}
        for name in names:
            value = getattr(plan.cluster, name)
            if name in ("link", "network", "host"):
                changes[name] = value._replace(bytes_s=value.bytes_s * BETTER, latency_s=value.latency_s / BETTER)
            else:
                changes[name] = value / BETTER if name == "kernel_s" else value * BETTER
        again = plan_layout(plan.model, plan.layout, plan.step, replace(plan.cluster, **changes), plan.checkpoint_every)
        found.append(Binding(resource, 1 - again.time.total / plan.time.total))
    return sorted(found, key=lambda one: -one.saved)


def neighbours(plan: Plan) -> Iterator[Change]:
    """Allowed layouts of as many GPUs that differ from the plan's by one step of one key (and `data`, to keep their
    number)."""
    layout, seen = plan.layout, {plan.layout}
    for changes in _changes(plan):
        try:
            other = Layout(**layout.model_dump() | {"world_size": 0, "engine": ""} | changes)
        except ValueError:  # sizes that do not multiply up to the number of GPUs
            continue
        refused = problems(setting(other, plan.model, plan.step))
        if other in seen or other.world_size != plan.cluster.gpus or refused:
            continue
        seen.add(other)
        again = plan_layout(plan.model, other, plan.step, plan.cluster, plan.checkpoint_every)
        was, now = described(layout).split(), described(other).split()
        gone = [key for key in was if key not in now and key.split("=")[0] not in {k.split("=")[0] for k in now}]
        said = [word for word in now if word not in was] + [f"{key.split('=')[0]} as by default" for key in gone]
        yield Change(" ".join(said), other, again.time.total, again.peak_bytes, again.fits)


def _changes(plan: Plan) -> Iterator[dict]:
    layout = plan.layout
    for axis in ("tensor", "pipeline", "context"):
        size, shards = getattr(layout, axis), layout.data * getattr(layout, axis)
        for other in _beside(size, shards):
            change = {axis: other, "data": shards // other}
            if axis == "tensor":
                change["sequence_parallel"] = other > 1
            if axis == "pipeline":
                change |= {"virtual": 1, "first_stage_layers": 0, "last_stage_layers": 0, "zero": 1}
            yield change
    rows = plan.step.global_batch // layout.data
    yield from ({"micro_batch": other} for other in _beside(layout.micro_batch, rows))
    yield from ({"virtual": other} for other in _beside(layout.virtual, max(layout.stage_layers(plan.model.depth))))
    yield from ({"recompute": other} for other in RECOMPUTE)
    yield from ({"zero": other} for other in (1, 2, 3))
    yield {"offload": not layout.offload}
    yield {"sequence_parallel": not layout.sequence_parallel}
    if plan.model.num_experts:
        for other in _beside(layout.expert, plan.model.num_experts):
            yield {"expert": other}


def _beside(size: int, whole: int) -> list[int]:
    """The divisors of `whole` next to `size`, below and above."""
    found = divisors(whole)
    below, above = [n for n in found if n < size], [n for n in found if n > size]
    return below[-1:] + above[:1]
