"""The driver: places the ranks, launches them, watches them, and commits what they save.

States: place -> launch -> run -> end. What it decides is in placement.py; this file only carries it out.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from armillary.errors import ERRORS, ArmillaryError, ClusterError, RunError
from armillary.launcher import cluster
from armillary.launcher.arguments import counted
from armillary.launcher.job import Job
from armillary.launcher.placement import Bundle, Failure, blame, place
from armillary.launcher.progress import View
from armillary.launcher.run import Run
from armillary.storage import Storage
from armillary.training.checkpoint.commit import sweep
from armillary.training.checkpoint.manifest import State, read_manifest

POLL_SECONDS = 0.1
GRACE_SECONDS = 3.0  # for the peers of a failed rank to tell what they saw
USER_ERRORS = {name for name, kind in ERRORS.items() if kind.exit_code == 2}


@dataclass
class Outcome:
    """How a launch ended: the last step done, and whether it was stopped before `until`."""

    step: int
    interrupted: bool


class _Stop:
    """Counts Ctrl-C and SIGTERM: the first asks for a checkpoint and an end, the second ends at once."""

    def __init__(self):
        self.count = 0

    def listen(self) -> dict:
        """Take over both signals; returns the handlers that were there."""
        return {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}

    def _heard(self, number, frame) -> None:
        self.count += 1


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop()
    before = stop.listen()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Ranks:
    """The actors of one generation."""

    generation: int
    workers: list = field(default_factory=list)
    results: list = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)  # each rank's network address
    addresses: dict[int, str] = field(default_factory=dict)  # where each rank's metrics are
    heard: list[int] = field(default_factory=list)  # how many messages of each rank were taken in
    asked: dict = field(default_factory=dict)  # calls for news under way, and the rank of each


def drive(run: Run, job: Job, until: int, resume: Storage | None, view: View) -> Outcome:
    """Train from `resume` (None: from the start) to step `until` on Ray.

    Raises the ArmillaryError of the rank that failed first, with its log named. All processes are gone when it
    returns.
    """
    number, folder = run.new_generation()
    done = read_manifest(resume).state.step if resume else 0
    run.event("launch", generation=number, layout=job.parallel.model_dump(), from_step=done, until=until)
    with _signals() as stop:
        view.say("starting Ray" if not job.cluster.address else f"joining Ray at {job.cluster.address}")
        try:
            with cluster.connected(job.cluster.address, job.parallel.world_size) as gpus:
                stop.listen()  # again: ray.init puts its own handler on SIGTERM
                ranks = _Ranks(number)
                try:
                    _launch(ranks, job, gpus, run, number, folder, until, resume, stop)
                    view.say(f"{counted(job.parallel.world_size, 'rank')} started, logs in {folder / 'logs'}")
                    outcome = _watch(ranks, job, run, view, stop, until, folder)
                finally:
                    _kill(ranks)
        except ArmillaryError as error:
            run.event("failed", generation=number, error=str(error))
            raise
        except OSError as error:
            raise RunError(
                f"a file of the run could not be written: {error.strerror}",
                error.filename or run.path,
                "free some space",
            ) from error
        finally:
            with contextlib.suppress(ArmillaryError, OSError):  # what cannot be removed now is at the next start
                sweep(run.store())
    run.event("ended", generation=number, step=outcome.step, interrupted=outcome.interrupted)
    return outcome


def _place(ranks: _Ranks, job: Job, gpus: bool, folder: Path, stop: _Stop) -> list[Bundle]:
    """Start one actor per rank in a placement group, its bundles one a node; which ranks each bundle takes."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from armillary.launcher.worker import Worker

    world = job.parallel.world_size
    cpus = job.cluster.cpus_per_rank or (max(1, (os.cpu_count() or 1) // world) if not job.cluster.address else 1)
    demand = {"CPU": cpus if not gpus else 1, **({"GPU": 1} if gpus else {})}
    bundles = place(cluster.nodes(gpus, cpus), world, job.parallel.tensor)
    group = placement_group(
        [{name: amount * bundle.count for name, amount in demand.items()} for bundle in bundles],
        strategy="STRICT_SPREAD",
        bundle_label_selector=[{"ray.io/node-id": bundle.node} for bundle in bundles],
    )
    try:
        _get([group.ready()], job.cluster.start_timeout, stop)
    except ray.exceptions.GetTimeoutError:
        raise ClusterError(
            f"the machines for {world} ranks were not free within {job.cluster.start_timeout:.0f} s",
            job.cluster.address or "this machine",
            "wait for other jobs to end, or raise cluster.start_timeout",
        ) from None
    visible = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    environment = visible | {"OMP_NUM_THREADS": str(cpus), "PYTHONWARNINGS": "ignore", "DS_LOG_LEVEL": "warning"}
    if not job.cluster.address:
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    for rank, (index, _) in enumerate(_slots(bundles)):
        actor = ray.remote(Worker).options(
            num_cpus=demand["CPU"],
            num_gpus=demand.get("GPU", 0),
            max_concurrency=4,
            max_restarts=0,
            runtime_env={"env_vars": environment},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        )
        ranks.workers.append(actor.remote(rank, folder / "logs" / f"rank-{rank:05d}.log"))
    return bundles


def _launch(
    ranks: _Ranks,
    job: Job,
    gpus: bool,
    run: Run,
    number: int,
    folder: Path,
    until: int,
    resume: Storage | None,
    stop: _Stop,
) -> None:
    """Place the ranks, and give each its assignment."""
    import ray

    world = job.parallel.world_size
    bundles = _place(ranks, job, gpus, folder, stop)
    try:
        places = _get([worker.where.remote() for worker in ranks.workers], job.cluster.start_timeout, stop)
        ranks.nodes = [place["address"] for place in places]
        address = ranks.nodes[0]
        (port,) = _get([ranks.workers[0].free_port.remote(address)], job.cluster.start_timeout, stop)
        run.event("placed", ranks=places)  # from now on a rank that dies is named
    except ray.exceptions.RayError as error:
        raise RunError(
            f"a rank's process did not start: {_first_line(error)}", folder / "logs", "see the logs there"
        ) from None
    train_job = job.train_job().model_dump(mode="json")
    for rank, (worker, (_, local)) in enumerate(zip(ranks.workers, _slots(bundles), strict=True)):
        assignment = {
            "run": run.path.name,
            "job": train_job,
            "job_hash": job.hash(),
            "rank": {"rank": rank, "world_size": world, "local_rank": 0 if gpus else local, "address": address,
                     "port": port},
            "store": run.store_location(job.checkpoint),
            "resume": resume.at() if resume else None,
            "until": until,
            "generation": number,
            "start_timeout": job.cluster.start_timeout,
        }  # fmt: skip
        ranks.results.append(worker.run.remote(assignment))
    ranks.heard = [0] * world


def _get(refs: list, seconds: float, stop: _Stop) -> list:
    """ray.get with a time limit that a request to stop cuts short."""
    import ray

    deadline, pending = time.monotonic() + seconds, list(refs)
    while pending:
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_SECONDS)
        if stop.count:
            raise RunError("stopped before training began", "launch", "start it again")
        if pending and time.monotonic() > deadline:
            raise ray.exceptions.GetTimeoutError(f"no answer within {seconds:.0f} s")
    return ray.get(refs)


def _slots(bundles: list[Bundle]) -> Iterator[tuple[int, int]]:
    """(bundle, number within it) of every rank in order."""
    for index, bundle in enumerate(bundles):
        for local in range(bundle.count):
            yield index, local


def _watch(ranks: _Ranks, job: Job, run: Run, view: View, stop: _Stop, until: int, folder: Path) -> Outcome:
    import ray

    asked, pending = 0, list(ranks.results)
    while pending:
        _ask(ranks)
        ready, _ = ray.wait([*pending, *ranks.asked], timeout=POLL_SECONDS)
        _hear(ranks, [ref for ref in ready if ref in ranks.asked], job, run, view)
        done = [ref for ref in ready if ref in pending]
        pending = [ref for ref in pending if ref not in done]
        failures = _failures(ranks, done)
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


def _ask(ranks: _Ranks) -> None:
    """Ask the ranks for news, unless they have yet to answer.

    Every rank says where its metrics are; the rest of the run's news is rank 0's alone.
    """
    for rank, worker in enumerate(ranks.workers):
        if rank not in ranks.asked.values() and (rank == 0 or rank not in ranks.addresses):
            ranks.asked[worker.messages.remote(ranks.heard[rank])] = rank


def _hear(ranks: _Ranks, answers: list, job: Job, run: Run, view: View) -> None:
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


def _hear_all(ranks: _Ranks, job: Job, run: Run, view: View) -> None:
    """The answers under way, and what was said after them."""
    _hear(ranks, list(ranks.asked), job, run, view)
    _ask(ranks)
    _hear(ranks, list(ranks.asked), job, run, view)


def _take(ranks: _Ranks, rank: int, message: dict, job: Job, run: Run, view: View) -> None:
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


def _failures(ranks: _Ranks, done: list) -> list[Failure]:
    import ray

    found = []
    for ref in done:
        rank = ranks.results.index(ref)
        try:
            result = ray.get(ref)
        except ray.exceptions.RayActorError:
            found.append(Failure(rank, "died", "its process ended"))
        except ray.exceptions.RayError as error:
            found.append(Failure(rank, type(error).__name__, _first_line(error)))
        else:
            if isinstance(result, Failure):
                found.append(result)
    return found


def _fail(ranks: _Ranks, failures: list[Failure], pending: list, folder: Path, run: Run) -> None:
    """Raise the error that explains the failures, after a short wait for the other ranks' own."""
    import ray

    if pending:
        done, _ = ray.wait(pending, num_returns=len(pending), timeout=GRACE_SECONDS)
        failures = failures + _failures(ranks, done)
    first = blame(failures, USER_ERRORS)
    log = folder / "logs" / f"rank-{first.rank:05d}.log"
    if first.kind in ERRORS:
        raise ERRORS[first.kind](*first.message.split("\0"))
    if first.kind == "died":
        raise RunError(
            f"rank {first.rank} of {len(ranks.workers)} died", log,
            "see its log and the machine's (out of memory?), then "
            + ("`armillary resume`" if run.has_checkpoint else "start it again"),
        )  # fmt: skip
    raise RunError(f"rank {first.rank} failed: {first.kind}: {first.message}", log, "the traceback is in that log")


def _kill(ranks: _Ranks) -> None:
    import ray

    for worker in ranks.workers:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(worker)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
