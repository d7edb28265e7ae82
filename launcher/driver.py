"""The driver: plans a launch, watches its ranks, commits what they save, and goes on after a fault.

States: plan -> launch -> watch -> end; after a fault, a bad step or a machine that came back: plan again. What it
decides is in recovery.py and placement.py; this file, ranks.py, machines.py and growth.py only carry it out.
"""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from armillary.errors import ERRORS, ArmillaryError, ClusterError, FaultError, LossError, RunError
from armillary.launcher import cluster
from armillary.launcher.arguments import counted
from armillary.launcher.growth import LOOK_SECONDS, Growth
from armillary.launcher.job import Job
from armillary.launcher.machines import Machines
from armillary.launcher.placement import Failure, blame, is_fault, no_room
from armillary.launcher.progress import View
from armillary.launcher.ranks import Plan, Ranks, failures_of, kill, launch, reports_of
from armillary.launcher.recovery import hung, largest, lost, pause, rewind_to
from armillary.launcher.run import Run
from armillary.launcher.waiting import POLL_SECONDS, Stop, signals, sleep
from armillary.storage import Storage
from armillary.training.checkpoint.catalog import listed
from armillary.training.checkpoint.commit import sweep
from armillary.training.checkpoint.manifest import State
from armillary.training.health import Verdict, stuck

LAST_WORDS_SECONDS = (
    2.0  # that a rank may take to answer at the end: one that imports or connects may not answer at all
)
GRACE_SECONDS = 3.0  # for the peers of a failed rank to tell what they saw
USER_ERRORS = {name for name, kind in ERRORS.items() if kind.exit_code == 2}


@dataclass
class Outcome:
    """How a launch ended: the last step done, whether it was stopped before `until`, and whether by a SIGTERM."""

    step: int
    interrupted: bool
    preempted: bool = False
    growing: bool = False  # stopped to go on with more ranks


def drive(run: Run, job: Job, until: int, resume: Storage | None, view: View) -> Outcome:
    """Train from `resume` (None: from the start) to step `until` on Ray; what a machine's fault ends goes on from the
    latest checkpoint, with new processes and as many ranks as there is room for.

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
                return Driver(run, job, until, machines, view, stop).drive(resume)
            finally:
                machines.release()


class Driver:
    """One run's, from the first launch to the last."""

    def __init__(self, run: Run, job: Job, until: int, machines: Machines, view: View, stop: Stop):
        self._run, self._job, self._until = run, job, until
        self._machines, self._view, self._stop = machines, view, stop
        self._before: list[dict] = []  # places of the ranks of the launch before

    def drive(self, resume: Storage | None) -> Outcome:
        """See `drive`."""
        plan = self._placed(Plan(self._job, [], resume, self._until), self._job.parallel.world_size)
        launches, in_vain = 0, 0  # in_vain: launches in a row without a new checkpoint
        while True:
            done, reason = plan.done, None
            try:
                outcome = self._launch(plan)
                if not outcome.growing:
                    return outcome
            except (FaultError, LossError) as error:
                reason = error
            except ClusterError as error:  # machines and ports of a run that was under way come back
                if not launches:
                    raise
                reason = error
            launches += 1
            resume = self._run.latest() if self._run.has_checkpoint else None
            plan = Plan(self._job, [], resume, self._until)
            if reason is not None:
                in_vain = 0 if plan.done > done else in_vain + 1
                plan = self._after(reason, plan, in_vain)
            plan = self._placed(plan, self._job.cluster.min_ranks)

    def _after(self, error: ArmillaryError, plan: Plan, in_vain: int) -> Plan:
        """Where to go on from after a fault or a bad step; raises the error where that is enough."""
        bad = isinstance(error, LossError)
        seconds = pause(in_vain, self._job.cluster.max_restarts)
        if seconds is None or self._stop.count or (bad and self._job.training.bad_step != "rewind"):
            raise error
        if bad:
            cursor = [event["cursor"] for event in self._run.events("verdict") if event.get("action") == "rewind"][-1]
            plan = self._back(plan, in_vain)
            self._run.leave_out(plan.done, cursor)
            seconds = 0.0
        self._run.event("restart", seconds=seconds, from_step=plan.done, reason=error.what)
        when = f"in {seconds:.0f} s, " if seconds else ""
        self._view.say(f"{error.what}; starting again {when}from step {plan.done}")
        sleep(seconds, self._stop)
        return plan

    def _back(self, plan: Plan, in_vain: int) -> Plan:
        """The plan from the checkpoint to go back to after a bad step."""
        steps = [one.state.step for one in listed(self._run.store()) if one.state is not None]
        step = rewind_to([step for step in steps if step <= plan.done], in_vain)
        if step == plan.done:
            return plan
        if step:
            self._run.rewind(step)
        return Plan(plan.job, [], self._run.checkpoint(step) if step else None, plan.until)

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
                self._view.say(f"{no_room(nodes, least, self._job.parallel.tensor).what}: waiting for more machines")
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
            outcome = Watcher(run, self._job, plan, ranks, self._machines, self._view, self._stop, folder).watch()
        except ArmillaryError as error:
            run.event("failed", generation=number, error=str(error))
            raise
        except OSError as error:
            raise RunError(
                f"a file of the run could not be written: {error.strerror}", error.filename or run.path,
                "free some space",
            ) from error  # fmt: skip
        finally:
            self._before = ranks.places
            kill(ranks)
            with contextlib.suppress(ArmillaryError, OSError):  # what cannot be removed now is at the next start
                sweep(run.store())
        run.event("ended", generation=number, step=outcome.step, interrupted=outcome.interrupted)
        return outcome


class Watcher:
    """Of one launch: hears its ranks, commits their checkpoints, and finds out what is wrong with them."""

    def __init__(
        self, run: Run, job: Job, plan: Plan, ranks: Ranks, machines: Machines, view: View, stop: Stop, folder: Path
    ):
        self._run, self._job, self._plan, self._ranks = run, job, plan, ranks
        self._machines, self._view, self._stop, self._folder = machines, view, stop, folder
        self._growth = Growth(machines, job, plan)
        self._stepped = False
        # A rank that imports, builds its model and loads a checkpoint says nothing for long.
        self._quiet_until = time.monotonic() + job.cluster.start_timeout + job.cluster.hang_timeout

    def watch(self) -> Outcome:
        """Until all ranks have ended, or one has failed."""
        import ray

        ranks, stopping, growing = self._ranks, 0, False
        pending = list(ranks.results)
        while pending:
            self._ask()
            ready, _ = ray.wait([*pending, *ranks.asked], timeout=POLL_SECONDS)
            self._hear([ref for ref in ready if ref in ranks.asked])
            done = [ref for ref in ready if ref in pending]
            pending = [ref for ref in pending if ref not in done]
            if failures := failures_of(ranks, done):
                self._hear_all()
                self._fail(failures, pending)
            self._find_stuck()
            if self._stop.count > stopping:
                stopping = self._stop.count
                if stopping > 1:
                    raise self._stop.error("stopped at once, at the second request", self._run.path)
                self._view.say("stopping after this step, with a checkpoint (again to stop at once)")
                self._end_after_step()
            self._out_of_grace()
            if self._stepped and not stopping and not growing and self._growth.ready():
                growing = True
                self._run.event("growing", ranks=self._growth.ranks)
                self._view.say(f"going on with {counted(self._growth.ranks, 'rank')}: there is room again")
                self._end_after_step()
        self._hear_all()
        ended = [ray.get(result) for result in ranks.results]
        step, preempted = ended[0].step, any(one.preempted for one in ended) or self._stop.terminated_at is not None
        early = step < self._plan.until
        grow = early and growing and not preempted and not self._stop.count
        return Outcome(step, early and not grow, early and preempted, grow)

    def _end_after_step(self) -> None:
        for worker in self._ranks.workers:
            worker.stop.remote()

    def _out_of_grace(self) -> None:
        grace = self._job.cluster.grace
        if self._stop.terminated_at is not None and time.monotonic() > self._stop.terminated_at + grace:
            last = f"of step {self._run.latest_step()}" if self._run.has_checkpoint else "none"
            raise self._stop.error(
                f"no checkpoint could be saved within the grace of {grace:.0f} s; the last one is {last}",
                self._run.path, "resume from that one; raise cluster.grace where the platform allows it",
            )  # fmt: skip

    def _ask(self) -> None:
        """Ask the ranks for news, unless they have yet to answer.

        Every rank says where its metrics are; the rest of the run's news is rank 0's alone.
        """
        ranks = self._ranks
        for rank, worker in enumerate(ranks.workers):
            if rank not in ranks.asked.values() and (rank == 0 or rank not in ranks.addresses):
                ranks.asked[worker.messages.remote(ranks.heard[rank])] = rank

    def _hear(self, answers: list) -> None:
        """Take in what the ranks have to say; a rank that is gone says nothing."""
        import ray

        for ref in answers:
            rank = self._ranks.asked.pop(ref)
            try:
                messages = ray.get(ref, timeout=30)
            except ray.exceptions.RayError:
                continue  # its result tells how it ended
            self._ranks.heard[rank] += len(messages)
            for message in messages:
                self._take(rank, message)

    def _hear_all(self) -> None:
        """The answers under way, and what was said after them; of ranks that still answer."""
        import ray

        for _ in range(2):
            self._ask()
            asked = list(self._ranks.asked)
            ready, _ = ray.wait(asked, num_returns=len(asked), timeout=LAST_WORDS_SECONDS)
            self._hear(ready)

    def _take(self, rank: int, message: dict) -> None:
        run, ranks, view = self._run, self._ranks, self._view
        match message.pop("kind"):
            case "serving":
                host, _, port = message["address"].rpartition(":")
                node = ranks.places[rank]["address"]
                self._machines.memory = message["memory"]
                ranks.addresses[rank] = f"{node if host in ('0.0.0.0', '::') else host}:{port}"
                if len(ranks.addresses) == len(ranks.workers):
                    run.write_job(self._job)  # only now is it known that the layout fits, and that the ports are free
                    run.write_targets([ranks.addresses[r] for r in range(len(ranks.workers))])
                    view.say(f"metrics of every rank: {run.targets_file}")
            case "step":
                self._moved()
                run.event("step", **{key: value for key, value in message.items() if key not in ("time", "bad")})
                view.step(message)
            case "saved":
                state, problem = State.model_validate(message["state"]), None
                try:
                    run.commit(message["name"], state, ranks.generation, len(ranks.workers), self._job.checkpoint)
                    view.saved(state.step)
                except (ArmillaryError, OSError) as error:
                    problem = str(error)
                ranks.workers[rank].committed.remote(problem)
            case "not saved":
                run.event("not_saved", **message)
                view.say(f"warning: no checkpoint of step {message['step']}: {message['reason']}")
            case "verdict":
                self._judge(Verdict(**message["verdict"]))

    def _judge(self, verdict: Verdict) -> None:
        """Write down what is wrong, and say it."""
        if verdict.rank is not None and verdict.node is None:
            verdict = Verdict(**verdict.as_dict() | {"node": self._ranks.places[verdict.rank]["node"]})
        self._run.verdict(verdict)
        self._view.say(verdict.line())

    def _moved(self) -> None:
        if not self._stepped and self._job.cluster.standby:
            self._growth.stand_by()
        self._stepped = True
        self._quiet_until = time.monotonic() + self._job.cluster.hang_timeout

    def _find_stuck(self) -> None:
        """FaultError where no rank has moved for long."""
        if time.monotonic() < self._quiet_until:
            return
        limit = self._job.cluster.hang_timeout
        reports = reports_of(self._ranks)
        found = stuck(reports, limit)
        if found is None:
            self._quiet_until = time.monotonic() + limit / 4
            return
        verdict = hung(found, reports, [place["node"] for place in self._ranks.places], limit)
        self._judge(verdict)
        raise FaultError(verdict.what, self._folder / "logs", verdict.remedy)

    def _fail(self, failures: list[Failure], pending: list) -> None:
        """Raise the error that explains the failures, after a short wait for the other ranks' own."""
        import ray

        ranks, run = self._ranks, self._run
        if pending:
            done, _ = ray.wait(pending, num_returns=len(pending), timeout=GRACE_SECONDS)
            failures = failures + failures_of(ranks, done)
        first = blame(failures, USER_ERRORS)
        log = self._folder / "logs" / f"rank-{first.rank:05d}.log"
        if first.kind in ERRORS:
            raise ERRORS[first.kind](*first.message.split("\0"))
        if is_fault(first):
            node = ranks.places[first.rank]["node"]
            if first.kind == "died":
                alive = node in {node.id for node in self._machines.nodes()}
                self._judge(lost(first, node, alive, failures))
            raise FaultError(
                f"rank {first.rank} of {len(ranks.workers)} "
                + ("died" if first.kind == "died" else f"lost its peers: {first.message}"), log,
                "see its log and the machine's (out of memory?), then "
                + ("`armillary resume`" if run.has_checkpoint else "start it again"),
            )  # fmt: skip
        what = f"rank {first.rank} failed: {first.kind}: {first.message}"
        raise RunError(what, log, "the traceback is in that log")
