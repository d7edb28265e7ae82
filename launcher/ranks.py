"""The ranks of one launch as Ray actors: starting them, asking how they are, and seeing how they end."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from armillary.errors import FaultError
from armillary.launcher.job import Job
from armillary.launcher.machines import Machines
from armillary.launcher.placement import Bundle, Failure
from armillary.launcher.run import Run
from armillary.launcher.waiting import Stop, wait_all
from armillary.storage import Storage
from armillary.training.checkpoint.manifest import read_manifest

REPORT_SECONDS = 5.0  # that a rank which trains may take to say where it is


@dataclass
class Ranks:
    """The actors of one generation."""

    generation: int
    workers: list = field(default_factory=list)
    results: list = field(default_factory=list)
    places: list[dict] = field(default_factory=list)  # each rank's node, address and process
    addresses: dict[int, str] = field(default_factory=dict)  # where each rank's metrics are
    heard: list[int] = field(default_factory=list)  # how many messages of each rank were taken in
    asked: dict = field(default_factory=dict)  # calls for news under way, and the rank of each


@dataclass(frozen=True)
class Plan:
    """What a launch is to do: the job with the layout that there is room for, which ranks go where, and from which
    checkpoint until which step; None: from the start."""

    job: Job
    bundles: list[Bundle]
    resume: Storage | None
    until: int

    @property
    def done(self) -> int:
        return 0 if self.resume is None else read_manifest(self.resume).state.step


def launch(
    ranks: Ranks, plan: Plan, machines: Machines, run: Run, before: list[dict], folder: Path, stop: Stop
) -> None:
    """Hold the machines, and give each rank its assignment.

    before: places of ranks that must be gone before these begin.
    """
    import ray

    job = plan.job
    limit, world = job.cluster.start_timeout, job.parallel.world_size
    try:
        machines.hold(plan.bundles, stop)
        prepared = []
        for rank, (bundle, _) in enumerate(_slots(plan.bundles)):
            ranks.workers.append(machines.worker(bundle.node))
            prepared.append(ranks.workers[-1].prepare.remote(rank, folder / "logs" / f"rank-{rank:05d}.log", before))
        ranks.places = wait_all(prepared, limit, stop)
        address = ranks.places[0]["address"]
        (port,) = wait_all([ranks.workers[0].free_port.remote(address)], limit, stop)
        run.event("placed", ranks=ranks.places)  # from now on a rank that dies is named
    except ray.exceptions.RayError as error:
        raise FaultError(
            f"a rank's process did not start: {first_line(error)}", folder / "logs", "see the logs there"
        ) from None
    train_job, done = job.train_job().model_dump(mode="json"), plan.done
    for rank, (worker, (bundle, local)) in enumerate(zip(ranks.workers, _slots(plan.bundles), strict=True)):
        assignment = {
            "run": run.path.name,
            "job": train_job,
            "job_hash": job.hash(),
            "rank": {"rank": rank, "world_size": world, "local_rank": local, "address": address, "port": port},
            "neighbours": bundle.count,
            "store": run.store_location(job.checkpoint),
            "resume": plan.resume.at() if plan.resume else None,
            "beyond": run.beyond(done).model_dump(),
            "until": plan.until,
            "generation": ranks.generation,
            "start_timeout": limit,
        }
        ranks.results.append(worker.run.remote(assignment))
    ranks.heard = [0] * world


def _slots(bundles: list[Bundle]) -> Iterator[tuple[Bundle, int]]:
    """Of every rank in order, its bundle and its number there."""
    for bundle in bundles:
        for local in range(bundle.count):
            yield bundle, local


def reports_of(ranks: Ranks) -> list[dict | None]:
    """Where each rank is, None for one that does not answer."""
    import ray

    calls = [worker.report.remote() for worker in ranks.workers]
    ready, _ = ray.wait(calls, num_returns=len(calls), timeout=REPORT_SECONDS)
    reports = []
    for call in calls:
        report = None
        with contextlib.suppress(ray.exceptions.RayError):
            report = ray.get(call) if call in ready else None
        reports.append(report)
    return reports


def failures_of(ranks: Ranks, done: list) -> list[Failure]:
    import ray

    found = []
    for ref in done:
        rank = ranks.results.index(ref)
        try:
            result = ray.get(ref)
        except ray.exceptions.RayActorError:
            found.append(Failure(rank, "died", "its process ended"))
        except ray.exceptions.RayError as error:
            found.append(Failure(rank, type(error).__name__, first_line(error)))
        else:
            if isinstance(result, Failure):
                found.append(result)
    return found


def kill(ranks: Ranks) -> None:
    import ray

    for worker in ranks.workers:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(worker)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
