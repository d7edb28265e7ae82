"""Every layout that is allowed on so many GPUs, ranked by the time of a step."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from armillary.model.config import ModelConfig
from armillary.planner.hardware import Cluster
from armillary.planner.memory import memory
from armillary.planner.software import ARMILLARY, REFERENCES
from armillary.planner.stages import Step, setting
from armillary.planner.time import step_time
from armillary.training.layout import Layout
from armillary.training.support import problems

LEAST_POSITIONS = 256  # of a row on each context-parallel rank
MOST_ROWS = 64  # of a micro-batch
MARGIN = 0.05  # of the memory, which a layout that is proposed leaves free: the planner's own error
RECOMPUTE = ("none", "selective", "full")  # from fast to small


class Candidate(NamedTuple):
    """A layout that is allowed, its memory on the fullest GPU and the time of its step."""

    seconds: float
    peak_bytes: float
    layout: Layout


@dataclass(frozen=True)
class Found:
    """ranked: layouts that fit with a margin, the fastest first. smallest: what needs the least memory of all that is
    allowed, where nothing fits. allowed: how many layouts there are."""

    ranked: list[Candidate]
    smallest: Candidate | None
    allowed: int


def search(model: ModelConfig, step: Step, cluster: Cluster, checkpoint_every: int = 0) -> Found:
    """Rank every layout of `families`. Of layouts that differ in recomputation alone, the fastest that fits is kept: it
    costs time and gives nothing but memory. So does offload, which is kept where it saves recomputation."""
    software = ARMILLARY if cluster.triton else REFERENCES
    ranked, small, count = [], [], 0

    def peak(layout: Layout) -> float:
        return max(stage.total for stage in memory(model, layout, step, software))

    def candidate(layout: Layout, bytes: float) -> Candidate:
        return Candidate(step_time(model, layout, step, cluster, checkpoint_every, software).total, bytes, layout)

    for family in families(model, step, cluster):
        count += len(family)
        kept = ""  # what is computed again by the layout that was kept without offload
        for offload in (False, True):
            peaks = ((peak(layout), layout) for layout in family if layout.offload == offload)
            least, fitting = _first_within(peaks, usable(cluster))
            if fitting and (not kept or RECOMPUTE.index(fitting[1].recompute) < RECOMPUTE.index(kept)):
                ranked.append(candidate(fitting[1], fitting[0]))
                kept = fitting[1].recompute
            elif least and not kept:
                small.append(least)
    ranked.sort(key=lambda one: one[:2])
    if ranked or not small:
        return Found(ranked, None, count)
    least = min(small, key=lambda one: one[0])
    return Found([], candidate(least[1], least[0]), count)


def usable(cluster: Cluster) -> float:
    """Bytes of a GPU that a layout which is proposed may need."""
    return (1 - MARGIN) * cluster.memory_bytes


Sized = tuple[float, Layout]


def _first_within(peaks: Iterable[Sized], capacity: float) -> tuple[Sized | None, Sized | None]:
    """(the smallest looked at, the first that is no larger than `capacity`); nothing behind that is looked at."""
    least = None
    for one in peaks:
        least = one if least is None or one[0] < least[0] else least
        if one[0] <= capacity:
            return least, one
    return least, None


def families(model: ModelConfig, step: Step, cluster: Cluster) -> Iterator[list[Layout]]:
    """Every allowed layout of the cluster's GPUs, those that differ in recomputation and offload alone together.

    Tensor-parallel ranks lie in one node. Sequence parallelism is on wherever it is allowed: it moves as many bytes and
    keeps fewer. The engine is the one that a job gets which names none. Stages are even, or the first, the last or both
    have one layer less. Context-parallel ranks have LEAST_POSITIONS of a row at least, micro-batches MOST_ROWS rows at
    most.
    """
    for axes in _axes(model, step, cluster):
        for sharing in _sharing(axes, model.num_experts):
            family = [
                layout
                for offload in (False, True)
                for recompute in RECOMPUTE
                for layout in [Layout(**axes, **sharing, offload=offload, recompute=recompute)]
                if not problems(setting(layout, model, step))
            ]
            if family:
                yield family


def layouts(model: ModelConfig, step: Step, cluster: Cluster) -> Iterator[Layout]:
    """The layouts of `families`, one by one."""
    for family in families(model, step, cluster):
        yield from family


def _axes(model: ModelConfig, step: Step, cluster: Cluster) -> Iterator[dict]:
    """Sizes of the axes that multiply up to the number of GPUs and divide what they must."""
    shared = math.gcd(
        model.num_heads, model.num_query_groups, model.hidden_size, model.vocab_size, model.vision_num_heads,
        model.vision_ffn_hidden_size, 0 if model.num_experts else model.ffn_hidden_size,
    )  # fmt: skip
    for tensor in divisors(math.gcd(cluster.gpus, cluster.node_gpus, shared)):
        for pipeline in divisors(cluster.gpus // tensor):
            if pipeline > model.depth:
                break
            for context in divisors(cluster.gpus // tensor // pipeline):
                if context > 1 and step.seq_length < context * LEAST_POSITIONS:
                    break
                data = cluster.gpus // tensor // pipeline // context
                if step.global_batch % data:
                    continue
                for rows in divisors(step.global_batch // data, MOST_ROWS):
                    sizes = {"data": data, "tensor": tensor, "pipeline": pipeline, "context": context}
                    parts = 2 * context if context > 1 else 1
                    sequence = tensor > 1 and rows * step.seq_length % (parts * tensor) == 0
                    for cut in _cuts(model.depth, pipeline, step.global_batch // data // rows):
                        yield sizes | cut | {"micro_batch": rows, "sequence_parallel": sequence}


def _cuts(depth: int, pipeline: int, count: int) -> Iterator[dict]:
    """How the layers may be shared out over stages and their parts. Stages that differ by one layer share no divisor,
    and so have no parts; of two stages, both cannot have fewer."""
    ends = [(), ("first",), ("last",), ("first", "last")]
    for fewer in ends[:1] if pipeline == 1 else ends[:3] if pipeline == 2 else ends:
        layers, left = divmod(depth + len(fewer), pipeline)
        if left or (fewer and layers < 2):
            continue
        for virtual in [1] if fewer else divisors(layers):
            if virtual == 1 or (pipeline > 1 and count % pipeline == 0):
                yield {f"{end}_stage_layers": layers - 1 for end in fewer} | {"virtual": virtual}


def _sharing(axes: dict, experts: int) -> Iterator[dict]:
    """Who shares what among data-parallel ranks: the optimizer's state and more, and experts."""
    alone = axes["data"] * axes["context"] == 1
    for zero in (1,) if alone or axes["pipeline"] > 1 else (1, 2, 3):
        yield {"zero": zero}
    for expert in divisors(math.gcd(experts, axes["data"] * axes["context"] * axes["tensor"]))[1:] if experts else ():
        yield {"expert": expert}


def divisors(number: int, most: int = 0) -> list[int]:
    """Of `number`, from small to large; no larger than `most`, if that is given."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    found = small + [number // n for n in reversed(small) if n * n != number]
    return [n for n in found if not most or n <= most]
