"""What to do about a fault: pure decisions."""

import itertools
from collections.abc import Callable, Sequence

from armillary.errors import JobError
from armillary.launcher.job import Job, resolve
from armillary.launcher.placement import Bundle, Failure, Node, place
from armillary.planner.search import divisors
from armillary.training.health import Verdict

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds


def pause(in_vain: int, most: int) -> float | None:
    """Seconds to wait before the next launch, when `in_vain` in a row ended without a new checkpoint; None: give up.

    most: how many launches may end so and still be followed by one.
    """
    if in_vain > most or not most:
        return None
    return min(FIRST_PAUSE * 2 ** (in_vain - 1), LONGEST_PAUSE) if in_vain else 0.0


Placed = tuple[Job, list[Bundle]]  # a job, and where its ranks go


def largest(job: Job, nodes: Sequence[Node], least: int, fits: Callable[[Job], bool]) -> Placed | None:
    """The job on as many ranks as these nodes have room for, its own number at most, and where they go; None where
    there is room for fewer than `least`.

    As long as there is room for one copy of the model, only the number of data-parallel copies changes, and the global
    batch does not: so the weights are those that the whole layout would have had. For less room the tensor and pipeline
    sizes are divided, where a rank's memory has room for what it has to hold then (`fits`).
    """
    layout = job.parallel
    if found := _most_copies(job, layout.tensor, layout.pipeline, nodes, least):
        return found
    sizes = itertools.product(divisors(layout.tensor), divisors(layout.pipeline))
    found = [_most_copies(job, *size, nodes, least) for size in sizes if size != (layout.tensor, layout.pipeline)]
    fitting = [one for one in found if one is not None and fits(one[0])]
    return max(fitting, key=_size, default=None)


def _size(placed: Placed) -> tuple[int, int, int]:
    """More ranks are better; of as many, larger shares of them for a copy of the model, as the job has it."""
    layout = placed[0].parallel
    return layout.world_size, layout.tensor, layout.pipeline


def _most_copies(job: Job, tensor: int, pipeline: int, nodes: Sequence[Node], least: int) -> Placed | None:
    """The job with these sizes, on as many ranks as there is room for."""
    copy = tensor * pipeline * job.parallel.context
    for data in range(job.parallel.world_size // copy, 0, -1):
        if data * copy < least:
            return None
        bundles = place(nodes, data * copy, tensor)
        if bundles and (smaller := with_layout(job, data, tensor, pipeline)):
            return smaller, bundles
    return None


def with_layout(job: Job, data: int, tensor: int, pipeline: int) -> Job | None:
    """The job with these sizes; None where the model, its batch or its experts cannot be shared out so."""
    layout = job.parallel
    if (data, tensor, pipeline) == (layout.data, layout.tensor, layout.pipeline):
        return job
    changed = {"data": data, "tensor": tensor, "pipeline": pipeline}
    changed["world_size"] = data * tensor * pipeline * layout.context
    if pipeline != layout.pipeline:
        changed |= {"virtual": 1, "first_stage_layers": 0, "last_stage_layers": 0}
    if tensor == 1:
        changed["sequence_parallel"] = False
    tables = job.model_dump(mode="json")
    tables["parallel"] |= changed
    try:
        return resolve(tables, "job.toml")
    except JobError:
        return None


def rewind_to(steps: Sequence[int], in_vain: int) -> int:
    """The step to go back to after a bad one: of the last checkpoint or, when that was `in_vain` so many times, one
    before it; 0: the start. steps: of all checkpoints."""
    older = sorted(steps)
    return older[-1 - in_vain] if in_vain < len(older) else 0


def lost(failure: Failure, node: str, node_lives: bool, others: Sequence[Failure]) -> Verdict:
    """Of a rank whose process ended. others: failures of ranks that noticed, whose phase says where it was."""
    phase, step = next(((other.phase, other.step) for other in (failure, *others) if other.phase), (None, None))
    if node_lives:
        remedy = "see its log; if it was out of memory (`dmesg`), use a smaller micro-batch or more recomputation"
        return Verdict("lost process", f"rank {failure.rank} died", remedy, failure.rank, node, phase, step)
    remedy = "nothing: the run goes on without that machine, and takes it back when it returns"
    return Verdict("lost node", f"the machine of rank {failure.rank} is gone", remedy, failure.rank, node, phase, step)


def hung(ranks: Sequence[int], reports: Sequence[dict | None], nodes: Sequence[str], seconds: float) -> Verdict:
    """Of ranks that training.health.stuck has found; none: all wait for each other."""
    if not ranks:
        report = next(filter(None, reports))
        what = f"no rank has moved for {seconds:.0f} s: all wait in {report['collective']} at {report['line']}"
        remedy = "look at the network between the machines, and its switches"
        return Verdict("hung rank", what, remedy, phase=report["phase"], step=report["step"])
    rank, report = ranks[0], reports[ranks[0]]
    named = f"rank {rank}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:8]))}"
    if report is None:
        waiting = next((one for one in reports if one is not None), None)
        others = f"; others wait in {waiting['collective'] or waiting['line']}" if waiting else ""
        what, phase = f"{named} does not answer any more{others}", waiting["phase"] if waiting else None
        step = waiting["step"] if waiting else None
    else:
        at = f"in {report['collective']} " if report["collective"] else ""
        what, phase, step = f"{named} is stuck {at}at {report['line']}", report["phase"], report["step"]
    remedy = "nothing if it does not happen again: the run starts anew; else look at that machine's device and disk"
    return Verdict("hung rank", what, remedy, rank, nodes[rank], phase, step)
