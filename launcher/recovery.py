"""What to do about a fault: pure decisions."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from armillary.errors import JobError
from armillary.launcher.job import Job, resolve
from armillary.launcher.placement import Bundle, Failure, Node, place
from armillary.planner.search import divisors
from armillary.training.health import Verdict

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds
MOST_NAMED = 8  # ranks in a verdict


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


def rewind_to(steps: Sequence[int], latest: int, before: int | None) -> int:
    """The step to go back to after a bad one: of the latest checkpoint or, where the rewind to the step `before`
    brought no new one, of one before that, if there is one. steps: of all checkpoints; 0: the start."""
    if before is None or latest > before:
        return latest
    return max((step for step in steps if step < before), default=before)


@dataclass
class Outcome:
    """How a launch ended: the last step done, whether it was stopped before it was due and whether by a SIGTERM; or
    whether it was only stopped to go on with more ranks."""

    step: int
    interrupted: bool
    preempted: bool = False
    growing: bool = False


def outcome(step: int, until: int, growing: bool, stopped: bool, preempted: bool) -> Outcome:
    """Of a launch whose ranks ended well. stopped: the driver was told to; preempted: it, or a rank, by SIGTERM."""
    early = step < until
    grow = early and growing and not stopped and not preempted
    return Outcome(step, early and not grow, early and preempted, grow)


def still_there(before: Sequence[dict], placed: Sequence[dict]) -> list[dict]:
    """Places of ranks that the next launch has to end before its own begin: those of a launch, and of the launches
    before it those on nodes where it has none. It ended the others itself."""
    nodes = {place["node"] for place in placed}
    return [*placed, *(place for place in before if place["node"] not in nodes)]


def lost(failures: Sequence[Failure], nodes: Sequence[str], alive: set[str]) -> Verdict:
    """Of ranks that ended, or lost contact. nodes: each rank's; alive: those that answer."""
    died = [failure.rank for failure in failures if failure.kind == "died"]
    gone = [rank for rank, node in enumerate(nodes) if node not in alive]
    phase, step = next(((one.phase, one.step) for one in failures if one.phase), (None, None))
    if gone:
        rank = next((rank for rank in died if rank in gone), gone[0])
        remedy = "nothing: the run goes on without that machine, and takes it back when it returns"
        return Verdict("lost node", f"the machine of rank {rank} is gone", remedy, rank, nodes[rank], phase, step)
    if died:
        remedy = "see its log; if it was out of memory (`dmesg`), use a smaller micro-batch or more recomputation"
        return Verdict(
            "lost process", f"rank {died[0]} of {len(nodes)} died", remedy, died[0], nodes[died[0]], phase, step
        )
    first = failures[0]
    remedy = "see its log, and the network and the devices of its machine"
    what = f"rank {first.rank} lost its peers or its device: {first.message.partition(chr(0))[0]}"
    return Verdict("lost contact", what, remedy, first.rank, nodes[first.rank], phase, step)


def hung(ranks: Sequence[int], reports: Sequence[dict | None], nodes: Sequence[str], seconds: float) -> Verdict:
    """Of ranks that training.health.stuck has found; none: none of them is behind another."""
    told = next((one for one in reports if one is not None), None)
    at = f"{told['waits'] or 'something of their own'} at {told['line']}" if told else ""
    phase, step = (told["phase"], told["step"]) if told else (None, None)
    if not ranks:
        what = f"no rank has moved for {seconds:.0f} s: all are in {at}"
        return Verdict("hung rank", what, "look at the network and the storage that they share", phase=phase, step=step)
    rank = ranks[0]
    named = f"rank {rank}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:MOST_NAMED]))}"
    if (report := reports[rank]) is None:
        what = f"{named} does not answer any more" + (f"; others are in {at}" if told else "")
    else:
        what, phase, step = f"{named} is stuck at {report['line']}", report["phase"], report["step"]
    remedy = "nothing if it does not happen again: the run starts anew; else look at that machine's device and disk"
    return Verdict("hung rank", what, remedy, rank, nodes[rank], phase, step)
