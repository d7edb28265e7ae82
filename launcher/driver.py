"""The driver: plans a launch, watches its ranks, commits what they save, and goes on after a fault.

States: plan -> launch -> watch -> end; after a fault, a bad step or a machine that came back: plan again. What it
decides is in recovery.py and placement.py; this file, watcher.py, ranks.py, machines.py and growth.py carry it out.
"""

import contextlib
import time

from armillary.errors import ArmillaryError, ClusterError, FaultError, LossError, PreemptedError, RunError
from armillary.launcher import cluster
from armillary.launcher.arguments import counted
from armillary.launcher.growth import LOOK_SECONDS
from armillary.launcher.job import Job
from armillary.launcher.machines import Machines
from armillary.launcher.placement import no_room
from armillary.launcher.progress import View
from armillary.launcher.ranks import Plan, Ranks, kill, launch
from armillary.launcher.recovery import Outcome, largest, pause, rewind_to, still_there
from armillary.launcher.run import Run
from armillary.launcher.waiting import Stop, signals, sleep
from armillary.launcher.watcher import Watcher
from armillary.storage import Storage
from armillary.training.checkpoint.catalog import listed
from armillary.training.checkpoint.commit import sweep


def drive(
    run: Run, job: Job, until: int, resume: Storage | None, view: View, metrics: str, fewer: bool = False
) -> Outcome:
    """Train from `resume` (None: from the start) to step `until` on Ray; what a machine's fault ends goes on from the
    latest checkpoint, with new processes and as many ranks as there is room for. metrics: where the run's are
    served; fewer: whether the first launch too may do with fewer ranks.

    Raises the ArmillaryError of the rank that failed first, with its log named. All processes are gone when it
    returns.
    """
    # Ray prints what happens to its processes on standard output, which is for the command's own answer.
    with signals() as stop, open(run.path / "ray.log", "a") as log, contextlib.redirect_stdout(log):
        view.say("starting Ray" if not job.cluster.address else f"joining Ray at {job.cluster.address}")
        with cluster.connected(job.cluster.address, job.parallel.world_size) as gpus:
            stop.listen()  # again: ray.init puts its own handler on SIGTERM
            machines = Machines(job, gpus)
            try:
                return Driver(run, job, until, machines, view, stop, metrics).drive(resume, fewer)
            except RunError as error:
                if stop.terminated_at is None:
                    raise
                raise PreemptedError(error.what, error.where, error.fix) from error
            finally:
                machines.release()


class Driver:
    """One run's, from the first launch to the last."""

    def __init__(self, run: Run, job: Job, until: int, machines: Machines, view: View, stop: Stop, metrics: str):
        self._run, self._job, self._until, self._metrics = run, job, until, metrics
        self._machines, self._view, self._stop = machines, view, stop
        self._before: list[dict] = []  # places of the ranks of earlier launches, where none has come since
        self._done = 0  # the step that the last launch began after
        self._launches, self._in_vain = 0, 0  # in_vain: launches in a row that a fault ended without a new checkpoint
        self._back_to: int | None = None  # the step that the last rewind went back to
        self._rewinds = 0  # in a row without a new checkpoint

    def drive(self, resume: Storage | None, fewer: bool) -> Outcome:
        """See `drive`. However it ends, an event says so."""
        try:
            return self._drive(resume, fewer)
        except ArmillaryError as error:
            if self._stop.terminated_at is None:
                self._run.failed(error)
            else:  # who was told to make room has not failed
                self._run.event("ended", step=self._done, interrupted=True)
            raise

    def _drive(self, resume: Storage | None, fewer: bool) -> Outcome:
        least = self._job.cluster.min_ranks if fewer else self._job.parallel.world_size
        plan = self._placed(Plan(self._job, [], resume, self._until), least)
        while True:
            self._done, error = plan.done, None  # the checkpoint may be pruned meanwhile
            try:
                ended = self._launch(plan)
                if not ended.growing:
                    return ended
            except (FaultError, LossError, ClusterError) as failed:
                error = failed
            self._launches += 1
            plan = self._placed(self._next(self._done, error), self._job.cluster.min_ranks)

    def _next(self, done: int, error: ArmillaryError | None) -> Plan:
        """Where to go on from after a launch that began at step `done`; raises its error where that is enough."""
        resume = self._run.latest() if self._run.has_checkpoint else None
        plan = Plan(self._job, [], resume, self._until)
        if error is None:
            return plan
        if self._stop.count:
            raise self._stop.error(error.what, error.where)
        if isinstance(error, LossError):
            return self._rewound(plan, error)
        self._in_vain = 0 if plan.done > done else self._in_vain + 1
        seconds = pause(self._in_vain, self._job.cluster.max_restarts)
        # What never was there does not come back; machines and ports of a run that was under way do.
        if seconds is None or (isinstance(error, ClusterError) and self._launches == 1):
            raise error
        self._run.event("restart", seconds=seconds, from_step=plan.done, reason=error.what)
        when = f"in {seconds:.0f} s, " if seconds else ""
        self._view.say(f"{error.what}; starting again {when}from step {plan.done}")
        sleep(seconds, self._stop)
        return plan

    def _rewound(self, plan: Plan, error: LossError) -> Plan:
        """The plan from the checkpoint to go back to after a bad step, without the data since then."""
        verdict = self._run.last_bad_step()
        if self._job.training.bad_step != "rewind" or verdict is None or verdict["action"] != "rewind":
            raise error
        self._rewinds = self._rewinds + 1 if self._back_to is not None and plan.done <= self._back_to else 0
        if pause(self._rewinds, self._job.cluster.max_restarts) is None:
            fix = "lower optimizer.learning_rate, or resume with training.bad_step=skip"
            raise LossError(f"{error.what}, {self._rewinds} rewinds in vain", error.where, fix)
        steps = [one.state.step for one in listed(self._run.store()) if one.state is not None]
        self._back_to = rewind_to(steps, plan.done, self._back_to)
        if self._back_to != plan.done:
            self._run.rewind(self._back_to)
            plan = Plan(plan.job, [], self._run.checkpoint(self._back_to), plan.until)
        self._run.leave_out(self._back_to, verdict["step"], verdict["cursor"])
        self._view.say(f"{error.what}; going back to step {plan.done}, without the data since then")
        return plan

    def _placed(self, plan: Plan, least: int) -> Plan:
        """The plan on the nodes that are there, once there is room for `least` ranks: on a cluster more may be on their
        way. ClusterError after `cluster.start_timeout`."""
        cluster, said = self._job.cluster, False
        deadline = time.monotonic() + (cluster.start_timeout if cluster.address else 0)
        while True:
            nodes = self._machines.nodes()
            self._machines.keep({node.id for node in nodes})
            if found := largest(self._job, nodes, least, self._machines.fits):
                job, bundles = found
                return Plan(job, bundles, plan.resume, plan.until)
            if time.monotonic() >= deadline:
                raise no_room(nodes, least, self._job.parallel.tensor)
            if not said:
                reason = no_room(nodes, least, self._job.parallel.tensor).what
                self._run.event("waiting", reason=reason)
                self._view.say(f"{reason}: waiting for more machines")
                said = True
            sleep(LOOK_SECONDS, self._stop)

    def _launch(self, plan: Plan) -> Outcome:
        """One launch of the ranks, to its end. FaultError where a machine or a process was lost."""
        run, layout = self._run, plan.job.parallel
        number, folder = run.new_generation()
        run.event("launch", generation=number, layout=layout.model_dump(), from_step=plan.done, until=plan.until)
        ranks = Ranks(number)
        try:
            launch(ranks, plan, self._machines, run, self._before, folder, self._stop)
            fewer = f" of {self._job.parallel.world_size}" if plan.job != self._job else ""
            self._view.launched(f"{counted(layout.world_size, 'rank')}{fewer} started, logs in {folder / 'logs'}")
            watcher = Watcher(
                run, self._job, plan, ranks, self._machines, self._view, self._stop, folder, self._metrics
            )
            ended = watcher.watch()
        except ArmillaryError as error:
            if self._stop.terminated_at is None:
                run.failed(error)
            raise
        except OSError as error:
            raise RunError(
                f"a file of the run could not be written: {error.strerror}", error.filename or run.path,
                "free some space",
            ) from error  # fmt: skip
        finally:
            self._before = still_there(self._before, ranks.places)
            kill(ranks)
            with contextlib.suppress(ArmillaryError, OSError):  # what cannot be removed now is at the next start
                sweep(run.store())
        run.event("ended", generation=number, step=ended.step, interrupted=ended.interrupted)
        return ended
