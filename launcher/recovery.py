"""What to do about a fault: pure decisions."""

from collections.abc import Sequence

from armillary.errors import JobError
from armillary.launcher.job import Job, resolve
from armillary.launcher.placement import Bundle, Failure, Node, place
from armillary.training.health import Verdict

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds


def pause(in_vain: int, most: int) -> float | None:
    """Seconds to wait before the next launch, when `in_vain` in a row ended without a new checkpoint; None: give up.

    most: how many launches may end so and still be followed by one.
    """
    if in_vain > most or not most:
        return None
    return min(FIRST_PAUSE * 2 ** (in_vain - 1), LONGEST_PAUSE) if in_vain else 0.0


def largest(job: Job, nodes: Sequence[Node], least: int) -> tuple[Job, list[Bundle]] | None:
    """The job on as many ranks as these nodes have room for, its own number at most, and where they go; None where
    there is room for fewer than `least`.

    Only the number of data-parallel copies changes, and the global batch does not: so the weights are those that the
    whole layout would have had.
    """
    layout = job.parallel
    copy = layout.world_size // layout.data
    for data in range(layout.data, 0, -1):
        if data * copy < least:
            return None
        bundles = place(nodes, data * copy, layout.tensor)
        if bundles and (smaller := job if data == layout.data else with_layout(job, data)):
            return smaller, bundles
    return None


def with_layout(job: Job, data: int) -> Job | None:
    """The job with so many data-parallel copies; None where its batch or its experts cannot be shared out so."""
    tables = job.model_dump(mode="json")
    tables["parallel"] |= {"data": data, "world_size": data * (job.parallel.world_size // job.parallel.data)}
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
