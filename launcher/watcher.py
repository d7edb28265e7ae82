"""What one launch of the ranks says and does: heard, committed, judged."""

import time
from pathlib import Path

from armillary.errors import ERRORS, ArmillaryError, FaultError, RunError
from armillary.launcher.arguments import counted
from armillary.launcher.growth import Growth
from armillary.launcher.job import Job
from armillary.launcher.machines import Machines
from armillary.launcher.placement import Failure, blame, is_fault
from armillary.launcher.progress import View
from armillary.launcher.ranks import Plan, Ranks, failures_of, reports_of
from armillary.launcher.recovery import Outcome, hung, lost, outcome
from armillary.launcher.run import Run
from armillary.launcher.waiting import POLL_SECONDS, Stop
from armillary.training.checkpoint.manifest import State
from armillary.training.health import Verdict, stuck

LAST_WORDS_SECONDS = (
    2.0  # that a rank may take to answer at the end: one that imports or connects may not answer at all
)
GRACE_SECONDS = 3.0  # for the peers of a failed rank to tell what they saw
USER_ERRORS = {name for name, kind in ERRORS.items() if kind.exit_code == 2}


class Watcher:
    """Of one launch: hears its ranks, commits their checkpoints, and finds out what is wrong with them."""

    def __init__(
        self, run: Run, job: Job, plan: Plan, ranks: Ranks, machines: Machines, view: View, stop: Stop, folder: Path,
        metrics: str,
    ):  # fmt: skip
        self._run, self._job, self._plan, self._ranks = run, job, plan, ranks
        self._machines, self._view, self._stop, self._folder = machines, view, stop, folder
        self._metrics = metrics
        self._growth = Growth(machines, job, plan)
        self._stepped = self._growing = False
        # A rank that imports, builds its model and loads a checkpoint says nothing for long.
        self._quiet_until = time.monotonic() + job.cluster.start_timeout + job.cluster.hang_timeout

    def watch(self) -> Outcome:
        """Until all ranks have ended, or one has failed."""
        import ray

        ranks, stopping = self._ranks, 0
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
            if self._stepped and not stopping and not self._growing and self._growth.ready():
                self._growing = True
                self._run.event("growing", ranks=self._growth.ranks)
                self._view.say(f"going on with {counted(self._growth.ranks, 'rank')}: there is room again")
                self._end_after_step()
        self._hear_all()
        ended = [ray.get(result) for result in ranks.results]
        preempted = any(one.preempted for one in ended) or self._stop.terminated_at is not None
        return outcome(ended[0].step, self._plan.until, self._growing, bool(self._stop.count), preempted)

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
                    run.write_targets(self._metrics, [ranks.addresses[r] for r in range(len(ranks.workers))])
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
                self._moved()  # nothing else was looked at meanwhile
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
            self._hear_all()
        first = blame(failures, USER_ERRORS)
        log = self._folder / "logs" / f"rank-{first.rank:05d}.log"
        if is_fault(first):
            verdict = lost(failures, [place["node"] for place in ranks.places], self._alive())
            self._judge(verdict)
            then = "`armillary resume`" if run.has_checkpoint else "start it again"
            raise FaultError(verdict.what, log, f"see its log and the machine's, then {then}")
        if first.kind in ERRORS:
            error = ERRORS[first.kind](*first.message.split("\0"))
            if self._growing and type(error) is RunError:  # the checkpoint that it was to begin with could not be saved
                raise FaultError(error.what, error.where, error.fix)
            raise error
        what = f"rank {first.rank} failed: {first.kind}: {first.message}"
        raise RunError(what, log, "the traceback is in that log")

    def _alive(self) -> set[str]:
        return {node.id for node in self._machines.nodes()}
