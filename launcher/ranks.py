"""The ranks of one launch as Ray actors: placing them, starting them, and seeing how they end."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from armillary.errors import ClusterError, RunError
from armillary.launcher import cluster
from armillary.launcher.job import Job
from armillary.launcher.placement import Bundle, Failure, place
from armillary.launcher.run import Run
from armillary.storage import Storage

POLL_SECONDS = 0.1


class Stop:
    """Counts Ctrl-C and SIGTERM: the first asks for a checkpoint and an end, the second ends at once."""

    def __init__(self):
        self.count = 0

    def listen(self) -> dict:
        """Take over both signals; returns the handlers that were there."""
        return {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}

    def _heard(self, number, frame) -> None:
        self.count += 1


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    stop = Stop()
    before = stop.listen()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Ranks:
    """The actors of one generation."""

    generation: int
    group: object = None  # the placement group
    workers: list = field(default_factory=list)
    results: list = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)  # each rank's network address
    addresses: dict[int, str] = field(default_factory=dict)  # where each rank's metrics are
    heard: list[int] = field(default_factory=list)  # how many messages of each rank were taken in
    asked: dict = field(default_factory=dict)  # calls for news under way, and the rank of each


def _place(ranks: Ranks, job: Job, gpus: bool, folder: Path, stop: Stop) -> list[Bundle]:
    """Start one actor per rank in a placement group, its bundles one a node; which ranks each bundle takes."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from armillary.launcher.worker import Worker

    world = job.parallel.world_size
    cpus = job.cluster.cpus_per_rank or (max(1, (os.cpu_count() or 1) // world) if not job.cluster.address else 1)
    demand = {"CPU": cpus if not gpus else 1, **({"GPU": 1} if gpus else {})}
    bundles = place(cluster.nodes(gpus, cpus), world, job.parallel.tensor)
    group = ranks.group = placement_group(
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


def launch(
    ranks: Ranks,
    job: Job,
    gpus: bool,
    run: Run,
    folder: Path,
    until: int,
    resume: Storage | None,
    stop: Stop,
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
            f"a rank's process did not start: {first_line(error)}", folder / "logs", "see the logs there"
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
            "generation": ranks.generation,
            "start_timeout": job.cluster.start_timeout,
        }  # fmt: skip
        ranks.results.append(worker.run.remote(assignment))
    ranks.heard = [0] * world


def _get(refs: list, seconds: float, stop: Stop) -> list:
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
    if ranks.group is not None:
        ray.util.remove_placement_group(ranks.group)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
