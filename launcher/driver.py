"""The driver: places the ranks, launches them, watches them, and commits what they save.

States: place -> launch -> run -> end, or after a fault pause -> place. What it decides is in placement.py and
recovery.py; this file and ranks.py only carry it out.
"""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from armillary.errors import ERRORS, ArmillaryError, ClusterError, FaultError, RunError
from armillary.launcher import cluster
from armillary.launcher.arguments import counted
from armillary.launcher.job import Job
from armillary.launcher.placement import Failure, blame, is_fault
from armillary.launcher.progress import View
from armillary.launcher.ranks import POLL_SECONDS, Ranks, Stop, failures_of, kill, launch, signals
from armillary.launcher.recovery import pause
from armillary.launcher.run import Run
from armillary.storage import Storage
from armillary.training.checkpoint.commit import sweep
from armillary.training.checkpoint.manifest import State, read_manifest

LAST_WORDS_SECONDS = (
    2.0  # that a rank may take to answer at the end: one that imports or connects may not answer at all
)
GRACE_SECONDS = 3.0  # for the peers of a failed rank to tell what they saw
USER_ERRORS = {name for name, kind in ERRORS.items() if kind.exit_code == 2}


@dataclass
class Outcome:
    """How a launch ended: the last step done, and whether it was stopped before `until`."""

    step: int
    interrupted: bool


def drive(run: Run, job: Job, until: int, resume: Storage | None, view: View) -> Outcome:
    """Train from `resume` (None: from the start) to step `until` on Ray; what a machine's fault ends goes on from the
    latest checkpoint, with new processes.

    Raises the ArmillaryError of the rank that failed first, with its log named. All processes are gone when it
    returns.
    """
    # Ray prints what happens to its processes on standard output, which is for the command's own answer.
    with signals() as stop, open(run.path / "ray.log", "a") as log, contextlib.redirect_stdout(log):
        view.say("starting Ray" if not job.cluster.address else f"joining Ray at {job.cluster.address}")
        with cluster.connected(job.cluster.address, job.parallel.world_size) as gpus:
            stop.listen()  # again: ray.init puts its own handler on SIGTERM
            launches, in_vain = 0, 0  # in_vain: launches in a row that ended without a new checkpoint
            while True:
                done = read_manifest(resume).state.step if resume else 0
                try:
                    return _generation(run, job, gpus, until, resume, done, view, stop)
                except (FaultError, ClusterError) as fault:
                    if isinstance(fault, ClusterError) and not launches:
                        raise  # these machines were never there; later they are gone, and may come back
                    resume = run.latest() if run.has_checkpoint else None
                    step = read_manifest(resume).state.step if resume else 0
                    launches, in_vain = launches + 1, 0 if step > done else in_vain + 1
                    seconds = pause(in_vain, job.cluster.max_restarts)
                    if seconds is None or stop.count:
                        raise
                    run.event("restart", seconds=seconds, from_step=step, reason=fault.what)
                    view.say(f"{fault.what}; starting again in {seconds:.0f} s, from step {step}")
                    _sleep(seconds, stop)


def _sleep(seconds: float, stop: Stop) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if stop.count:
            raise RunError("stopped between two launches", "", "resume from the last checkpoint")
        time.sleep(POLL_SECONDS)


def _generation(
    run: Run, job: Job, gpus: bool, until: int, resume: Storage | None, done: int, view: View, stop: Stop
) -> Outcome:
    """One launch of the ranks, to its end. FaultError where a machine or a process was lost."""
    number, folder = run.new_generation()
    run.event("launch", generation=number, layout=job.parallel.model_dump(), from_step=done, until=until)
    ranks = Ranks(number)
    try:
        launch(ranks, job, gpus, run, folder, until, resume, stop)
        view.launched(f"{counted(job.parallel.world_size, 'rank')} started, logs in {folder / 'logs'}")
        outcome = _watch(ranks, job, run, view, stop, until, folder)
    except ArmillaryError as error:
        run.event("failed", generation=number, error=str(error))
        raise
    except OSError as error:
        raise RunError(
            f"a file of the run could not be written: {error.strerror}", error.filename or run.path, "free some space"
        ) from error
    finally:
        kill(ranks)
        with contextlib.suppress(ArmillaryError, OSError):  # what cannot be removed now is at the next start
            sweep(run.store())
    run.event("ended", generation=number, step=outcome.step, interrupted=outcome.interrupted)
    return outcome


def _watch(ranks: Ranks, job: Job, run: Run, view: View, stop: Stop, until: int, folder: Path) -> Outcome:
    import ray

    asked, pending = 0, list(ranks.results)
    while pending:
        _ask(ranks)
        ready, _ = ray.wait([*pending, *ranks.asked], timeout=POLL_SECONDS)
        _hear(ranks, [ref for ref in ready if ref in ranks.asked], job, run, view)
        done = [ref for ref in ready if ref in pending]
        pending = [ref for ref in pending if ref not in done]
        failures = failures_of(ranks, done)
        if failures:
            _hear_all(ranks, job, run, view)
            _fail(ranks, failures, pending, folder, run)
        if stop.count > asked:
            asked = stop.count
            if asked > 1:
                raise RunError("stopped at once, at the second request", run.path, "resume from the last checkpoint")
            view.say("stopping after this step, with a checkpoint (again to stop at once)")
            for worker in ranks.workers:
                worker.stop.remote()
    _hear_all(ranks, job, run, view)
    step = ray.get(ranks.results[0])
    return Outcome(step, interrupted=bool(asked) and step < until)


def _ask(ranks: Ranks) -> None:
    """Ask the ranks for news, unless they have yet to answer.

    Every rank says where its metrics are; the rest of the run's news is rank 0's alone.
    """
    for rank, worker in enumerate(ranks.workers):
        if rank not in ranks.asked.values() and (rank == 0 or rank not in ranks.addresses):
            ranks.asked[worker.messages.remote(ranks.heard[rank])] = rank


def _hear(ranks: Ranks, answers: list, job: Job, run: Run, view: View) -> None:
    """Take in what the ranks have to say; a rank that is gone says nothing."""
    import ray

    for ref in answers:
        rank = ranks.asked.pop(ref)
        try:
            messages = ray.get(ref, timeout=30)
        except ray.exceptions.RayError:
            continue  # its result tells how it ended
        ranks.heard[rank] += len(messages)
        for message in messages:
            _take(ranks, rank, message, job, run, view)


def _hear_all(ranks: Ranks, job: Job, run: Run, view: View) -> None:
    """The answers under way, and what was said after them; of ranks that still answer."""
    import ray

    for _ in range(2):
        _ask(ranks)
        ready, _ = ray.wait(list(ranks.asked), num_returns=len(ranks.asked), timeout=LAST_WORDS_SECONDS)
        _hear(ranks, ready, job, run, view)


def _take(ranks: Ranks, rank: int, message: dict, job: Job, run: Run, view: View) -> None:
    match message.pop("kind"):
        case "serving":
            host, _, port = message["address"].rpartition(":")
            ranks.addresses[rank] = f"{ranks.nodes[rank] if host in ('0.0.0.0', '::') else host}:{port}"
            if len(ranks.addresses) == len(ranks.workers):
                run.write_job(job)  # only now is it known that the layout fits the machines, and the ports are free
                run.write_targets([ranks.addresses[r] for r in range(len(ranks.workers))])
                view.say(f"metrics of every rank: {run.targets_file}")
        case "step":
            run.event("step", **{key: value for key, value in message.items() if key != "time"})
            view.step(message)
        case "saved":
            state, problem = State.model_validate(message["state"]), None
            try:
                run.commit(message["name"], state, ranks.generation, len(ranks.workers), job.checkpoint)
                view.saved(state.step)
            except (ArmillaryError, OSError) as error:
                problem = str(error)
            ranks.workers[rank].committed.remote(problem)
        case "not saved":
            run.event("not_saved", **message)
            view.say(f"warning: no checkpoint of step {message['step']}: {message['reason']}")


def _fail(ranks: Ranks, failures: list[Failure], pending: list, folder: Path, run: Run) -> None:
    """Raise the error that explains the failures, after a short wait for the other ranks' own."""
    import ray

    if pending:
        done, _ = ray.wait(pending, num_returns=len(pending), timeout=GRACE_SECONDS)
        failures = failures + failures_of(ranks, done)
    first = blame(failures, USER_ERRORS)
    log = folder / "logs" / f"rank-{first.rank:05d}.log"
    if first.kind in ERRORS:
        raise ERRORS[first.kind](*first.message.split("\0"))
    if first.kind == "died":
        raise FaultError(
            f"rank {first.rank} of {len(ranks.workers)} died", log,
            "see its log and the machine's (out of memory?), then "
            + ("`armillary resume`" if run.has_checkpoint else "start it again"),
        )  # fmt: skip
    kind = FaultError if is_fault(first) else RunError
    raise kind(f"rank {first.rank} failed: {first.kind}: {first.message}", log, "the traceback is in that log")
