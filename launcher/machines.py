"""The machines that a run holds: their resources, and processes that wait there with their imports done."""

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from armillary.errors import ClusterError, FaultError
from armillary.launcher import cluster
from armillary.launcher.job import Job
from armillary.launcher.placement import Bundle, Node
from armillary.launcher.plan_commands import rows_of
from armillary.launcher.waiting import Stop, wait_all
from armillary.planner.memory import memory
from armillary.planner.plan import step_of
from armillary.planner.search import MARGIN

BUSY_SECONDS = 30.0  # that a node may take to become ours, once the run is under way
BUSY_PAUSE = 60.0
LOOK_SECONDS = 2.0  # between two looks whether a node that is waited for is still there


@dataclass
class Held:
    """So many ranks' resources of a node."""

    count: int
    group: object  # the placement group, of one bundle
    ready: object  # the call that ends when it is ours, with what CUDA_VISIBLE_DEVICES has to be there
    asked: float  # when, monotonic
    waiting: list = field(default_factory=list)  # (actor, the call that does its imports)


class Machines:
    """What a run holds, from the first launch to its end: a launch's ranks come and go, the machines stay.

    A group for each node: when one is lost the others are as they were.
    """

    def __init__(self, job: Job, gpus: bool):
        self._job, self._gpus = job, gpus
        world = job.parallel.world_size
        shared = max(1, (os.cpu_count() or 1) // world) if not job.cluster.address else 1
        self.cpus = job.cluster.cpus_per_rank or shared
        self._held: dict[str, Held] = {}
        self._hold_before = False  # whether all that a launch needs was ours once
        self._busy: dict[str, float] = {}  # nodes that others have, and until when they are not asked for again
        self.memory = 0.0  # bytes that a rank has, as one has told; 0: none has yet

    def fits(self, job: Job) -> bool:
        """Whether the planner says that a rank's memory is enough for this layout."""
        rows = rows_of(job)
        step = step_of(job, rows.document, rows.images)
        peak = max(stage.total for stage in memory(job.model, job.parallel, step))
        return peak <= (1 - MARGIN) * self.memory

    def nodes(self) -> list[Node]:
        """The nodes that answer now, and are not known to be others'."""
        now = time.monotonic()
        return [
            node for node in cluster.nodes(self._gpus, self.cpus)
            if node.id in self._held or self._busy.get(node.id, now) <= now
        ]  # fmt: skip

    def hold(self, bundles: Iterable[Bundle], stop: Stop) -> None:
        """Take what these ranks need, and let go of nodes that have none. ClusterError where that is not free within
        `cluster.start_timeout`, FaultError where a node goes meanwhile; a RayError of its own."""
        import ray

        bundles = list(bundles)
        wanted = {bundle.node for bundle in bundles}
        for node in self._held.keys() - wanted:
            self._let_go(node)
        self.request(bundles)
        limit, ready = self._job.cluster.start_timeout, [self._held[node].ready for node in wanted]
        deadline, where = time.monotonic() + limit, self._job.cluster.address or "this machine"
        while True:
            with contextlib.suppress(ray.exceptions.GetTimeoutError):
                wait_all(ready, LOOK_SECONDS, stop)
                self._hold_before = True
                return
            if not wanted <= {node.id for node in self.nodes()}:
                raise FaultError("a machine went before its ranks had begun", where, "see to that machine")
            late = [node for node in wanted if not self._is_ready(node)]
            if self._hold_before and self._give_up_busy(late):
                raise FaultError("a machine that was free is another job's", where, "wait for that job, or end it")
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the machines for {sum(bundle.count for bundle in bundles)} ranks were not free within "
                    f"{limit:.0f} s", where, "wait for other jobs to end, or raise cluster.start_timeout",
                )  # fmt: skip

    def request(self, bundles: Iterable[Bundle]) -> None:
        """Ask for what these ranks need beside what is held."""
        import ray
        from ray.util.placement_group import placement_group

        for bundle in bundles:
            held = self._held.get(bundle.node)
            if held is not None and held.count >= bundle.count:
                continue
            if held is not None:
                self._let_go(bundle.node)
            demand = {"CPU": self.cpus * bundle.count} | ({"GPU": bundle.count} if self._gpus else {})
            group = placement_group([demand], bundle_label_selector=[{"ray.io/node-id": bundle.node}])
            gpus = bundle.count if self._gpus else 0
            own = ray.remote(_gpu_ids).options(
                num_cpus=0, num_gpus=gpus, max_retries=0, scheduling_strategy=_within(group)
            )
            self._held[bundle.node] = Held(bundle.count, group, own.remote(), time.monotonic())

    def _is_ready(self, node: str) -> bool:
        import ray

        return bool(ray.wait([self._held[node].ready], timeout=0)[0])

    def _give_up_busy(self, late: Iterable[str]) -> bool:
        """Let go of nodes that did not become ours in BUSY_SECONDS, to ask for others a while; whether there were."""
        now = time.monotonic()
        busy = [node for node in late if now - self._held[node].asked > BUSY_SECONDS]
        for node in busy:
            self._let_go(node)
            self._busy[node] = now + BUSY_PAUSE
        return bool(busy)

    def could_hold(self, bundles: Iterable[Bundle]) -> bool:
        """Whether that leaves everything that is held as it is."""
        held = ((self._held.get(bundle.node), bundle) for bundle in bundles)
        return all(one is None or one.count >= bundle.count for one, bundle in held)

    def worker(self, node: str):
        """A process for a rank on a node that is held: one that waits there, or a new one."""
        held = self._held[node]
        _drop_failed(held)
        return held.waiting.pop(0)[0] if held.waiting else self._new(held)

    def warm(self, bundles: Iterable[Bundle]) -> bool:
        """Let as many processes wait on each node as it is to have ranks; whether all of them are ready."""
        import ray

        calls, late = [], []
        for bundle in bundles:
            held = self._held[bundle.node]
            if not self._is_ready(bundle.node):
                late.append(bundle.node)
                continue
            try:
                _drop_failed(held)
                while len(held.waiting) < bundle.count:
                    worker = self._new(held)
                    held.waiting.append((worker, worker.warm.remote()))
            except ray.exceptions.RayError:  # the node is gone again
                self._let_go(bundle.node)
                return False
            calls += [call for _, call in held.waiting]
        self._give_up_busy(late)
        return not late and len(ray.wait(calls, num_returns=len(calls), timeout=0)[0]) == len(calls)

    def keep(self, alive: set[str]) -> None:
        """Forget the nodes that are gone."""
        for node in self._held.keys() - alive:
            self._let_go(node)

    def release(self) -> None:
        self.keep(set())

    def _let_go(self, node: str) -> None:
        import ray

        held = self._held.pop(node)
        for worker, _ in held.waiting:
            ray.kill(worker)
        ray.util.remove_placement_group(held.group)

    def _new(self, held: Held):
        """Start a process in a group that is ours by now."""
        import ray

        from armillary.launcher.worker import Worker

        environment = {"OMP_NUM_THREADS": str(self.cpus), "PYTHONWARNINGS": "ignore", "DS_LOG_LEVEL": "warning",
                       "CUDA_VISIBLE_DEVICES": ray.get(held.ready)}  # fmt: skip
        # The group has the resources; two generations of ranks, one of which waits, share them.
        actor = ray.remote(Worker).options(
            num_cpus=0,
            num_gpus=0,
            max_concurrency=4,
            max_restarts=0,
            runtime_env={"env_vars": environment},
            scheduling_strategy=_within(held.group),
        )
        return actor.remote()


def _within(group):
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)


def _drop_failed(held: Held) -> None:
    """Forget the processes that ended while they waited, or never came so far."""
    import ray

    for one in list(held.waiting):
        worker, call = one
        if ray.wait([call], timeout=0)[0]:
            try:
                ray.get(call)
            except ray.exceptions.RayError:
                held.waiting.remove(one)
                ray.kill(worker)


def _gpu_ids() -> str:
    import ray

    return ",".join(sorted(map(str, ray.get_gpu_ids())))
