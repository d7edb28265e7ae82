"""Runs in a Kubernetes cluster: what `armillary submit`, `status`, `logs`, `suspend`, `cancel` do there."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from armillary.errors import ClusterError, JobError
from armillary.k8s.client import POD, RAYJOB, WORKLOAD, Client, Kind, LogGone, NoSuchKind, NotFound, Unreachable
from armillary.k8s.phase import Phase, phase_of, saves
from armillary.k8s.rayjob import APP, PART, QUEUE, RUN, SUBMITTER
from armillary.k8s.rayjob import RAYJOB as OF
from armillary.launcher.job import Job, parse_toml, resolve
from armillary.launcher.submission import rayjob_of

LOOK_SECONDS = 2.0
PATIENCE = 600.0  # seconds that a cluster may not answer whom it is followed by
STALE = 60.0  # seconds after which figures that are told every ten seconds are old
LAST_TRIES = 3  # to read the end of a log: why a run failed is there
TAIL = 400  # lines of the log in which there is one that says how the run stands


@dataclass(frozen=True)
class Seen:
    """A run as the cluster has it at one moment."""

    run: str
    rayjob: dict | None
    workload: dict | None
    pods: list[dict]

    @property
    def phase(self) -> Phase:
        return phase_of(self.rayjob, self.workload, self.pods)

    @property
    def submitter(self) -> str:
        """The pod whose log is the driver's; "" where there is none."""
        found = [pod for pod in self.pods if pod["metadata"]["labels"].get(PART) == "submitter"]
        return _newest(found)["metadata"]["name"] if found else ""

    def log(self, client: Client, follow: bool = False, since: str = "", tail: int | None = None) -> Iterator[str]:
        """The driver's output, each line with its time. LogGone."""
        if not self.submitter:
            raise LogGone("no pod has a log of it now", f"the run {self.run}", "wait for its pods")
        yield from client.log(self.submitter, SUBMITTER, follow, tail, since)


def submit(client: Client, job: Job, run: str, where: str, allow_tag: bool = False, force: bool = False) -> str:
    """Start a run, or one that has ended anew: create a RayJob, once the server says that it would take it; its name.

    JobError and ClusterError; then nothing is left behind. where: the job file.
    """
    before = _rayjobs(client, run)
    if not all(phase_of(one).ended for one in before):
        raise ClusterError(f"the run {run} is in the cluster already", f"namespace {client.namespace}",
                           "name another with --run, or cancel that one")  # fmt: skip
    if any(map(saves, client.list(POD, {RUN: run}))):
        raise ClusterError(f"pods of the run {run} are still there", f"namespace {client.namespace}",
                           "they save: wait until they are gone")  # fmt: skip
    taken = {_name(one) for one in client.list(RAYJOB, {APP: "armillary"})}
    again = (f"{run}-r{number}" for number in itertools.count(2))
    name = next(one for one in again if one not in taken) if before else run
    rayjob = rayjob_of(job, run, name, where, allow_tag, force)
    client.create(RAYJOB, rayjob, dry_run=True)
    client.create(RAYJOB, rayjob)
    return name


def look(client: Client, run: str) -> Seen:
    """The run's newest RayJob, with what belongs to it. NotFound."""
    rayjob = _newest(_rayjobs(client, run))
    if rayjob is None and any(map(saves, client.list(POD, {RUN: run}))):
        raise NotFound(f"the run {run} is cancelled, and its pods save", f"namespace {client.namespace}",
                       f"when they are gone it may go on with `armillary submit JOB.toml --run {run}`")  # fmt: skip
    if rayjob is None:
        raise NotFound(
            f"there is no run {run}", f"namespace {client.namespace}",
            "`armillary list` has all; one that was cancelled, or has been gone for long, goes on from its checkpoint "
            f"with `armillary submit JOB.toml --run {run}`",
        )  # fmt: skip
    workload = None
    if QUEUE in rayjob["metadata"]["labels"]:
        workload = _newest(_if_known(client, WORKLOAD, {"kueue.x-k8s.io/job-uid": rayjob["metadata"]["uid"]}))
    return Seen(run, rayjob, workload, client.list(POD, {OF: _name(rayjob)}))


def status(client: Client, run: str, patient: bool = False) -> dict:
    """All that is known of a run; `progress` is None, with a reason, where its log does not tell. patient: see
    `watched`."""
    seen = watched(client, run) if patient else look(client, run)
    progress, reason = progress_of(client, seen)
    rayjob = seen.rayjob or {"metadata": {"labels": {}}}
    return {
        "run": run,
        "rayjob": rayjob["metadata"].get("name"),
        "namespace": client.namespace,
        "queue": rayjob["metadata"]["labels"].get(QUEUE),
        "phase": seen.phase.name,
        "reason": seen.phase.reason,
        "created": rayjob["metadata"].get("creationTimestamp"),
        "retries": max(0, (rayjob.get("status") or {}).get("failed", 0) or 0),
        "progress": progress,
        "progress_reason": reason,
    }


def progress_of(client: Client, seen: Seen) -> tuple[dict | None, str]:
    """(how the run stood when it last said so, "") or (None, why that is not known)."""
    found = None
    try:
        for line in seen.log(client, tail=TAIL):
            event = event_of(line.partition(" ")[2])
            if event is not None and event["event"] == "progress":
                found = event
    except LogGone as error:
        return found and up_to_date(found, seen.phase), "" if found else error.what
    return found and up_to_date(found, seen.phase), "" if found else "its driver has not said anything yet"


def up_to_date(progress: dict, phase: Phase, now: float | None = None) -> dict:
    """What was said some time ago, as it is now: ages grow, and a pace of long ago is none."""
    now = time.time() if now is None else now
    saved = progress["checkpoint_time"]
    found = progress | {"checkpoint_age_seconds": None if saved is None else round(now - saved, 1)}
    if phase.name != "running" or now - progress["time"] > STALE:
        found |= {"tokens_per_second": None, "eta_seconds": None}
    return found


def runs(client: Client) -> list[dict]:
    """Every run of the namespace: name, phase, reason, created; the newest first."""
    newest: dict[str, dict] = {}
    for one in sorted(client.list(RAYJOB, {APP: "armillary"}), key=_age):
        newest[one["metadata"]["labels"][RUN]] = one
    workloads = {one["metadata"].get("labels", {}).get("kueue.x-k8s.io/job-uid"): one
                 for one in _if_known(client, WORKLOAD, {"kueue.x-k8s.io/job-uid": ""})}  # fmt: skip
    pods: dict[str, list[dict]] = {}
    for one in client.list(POD, {APP: "armillary"}):
        pods.setdefault(one["metadata"]["labels"].get(OF, ""), []).append(one)
    found = [
        Seen(run, one, workloads.get(one["metadata"]["uid"]), pods.get(_name(one), [])) for run, one in newest.items()
    ]
    return [
        {"run": one.run, "phase": one.phase.name, "reason": one.phase.reason,
         "queue": one.rayjob["metadata"]["labels"].get(QUEUE),
         "created": one.rayjob["metadata"].get("creationTimestamp")}
        for one in sorted(found, key=lambda one: _age(one.rayjob), reverse=True)
    ]  # fmt: skip


def suspend(client: Client, run: str) -> None:
    """Let a run save, and give its machines to others until it is resumed."""
    seen = look(client, run)
    if seen.phase.ended:
        raise JobError(
            f"the run {run} has ended: {seen.phase.name}", f"namespace {client.namespace}", "nothing to suspend"
        )
    _set_running(client, seen, False)


def resume(client: Client, run: str) -> str:
    """Let a suspended run go on, or start one that has failed anew, from its last checkpoint; the RayJob's name."""
    seen = look(client, run)
    if seen.phase.name == "suspended":
        _set_running(client, seen, True)
        return _name(seen.rayjob)
    if not seen.phase.ended:
        raise JobError(
            f"the run {run} is {seen.phase.name}", f"namespace {client.namespace}", "wait for it, or cancel it"
        )
    if seen.phase.name == "done":
        raise JobError(f"the run {run} is done", f"namespace {client.namespace}",
                       f"for more steps: `armillary submit JOB.toml --run {run} training.steps=...`")  # fmt: skip
    return submit(client, job_of(seen.rayjob), run, f"RayJob {_name(seen.rayjob)}", allow_tag=True, force=True)


def job_of(rayjob: dict) -> Job:
    """The job that a RayJob was made of. All else in it may have been changed meanwhile, by Kueue for one."""
    head = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    (text,) = [one["value"] for one in head["env"] if one["name"] == "ARMILLARY_JOB"]
    where = f"RayJob {_name(rayjob)}"
    return resolve(parse_toml(text.replace("$$", "$"), where), where)


def cancel(client: Client, run: str) -> None:
    """Remove a run from the cluster; its pods save before they go."""
    look(client, run)  # which says what there is where there is no RayJob
    for rayjob in _rayjobs(client, run):
        client.delete(RAYJOB, _name(rayjob))


def _set_running(client: Client, seen: Seen, running: bool) -> None:
    """Kueue decides over what is queued: it is asked through its own object, never behind its back."""
    if QUEUE not in seen.rayjob["metadata"]["labels"]:
        client.patch(RAYJOB, _name(seen.rayjob), {"spec": {"suspend": not running}})
    elif seen.workload is None:
        raise ClusterError(
            f"Kueue has no Workload of the run {seen.run}", f"namespace {client.namespace}", seen.phase.reason
        )
    else:
        client.patch(WORKLOAD, _name(seen.workload), {"spec": {"active": running}})


def watched(client: Client, run: str) -> Seen:
    """`look`, for who follows: a cluster that cannot answer is asked again for PATIENCE seconds; a run that is gone
    was cancelled."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return look(client, run)
        except NotFound:
            return Seen(run, None, None, [])
        except Unreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_SECONDS)


def wait_for_start(client: Client, run: str, say: Callable[[str], None]) -> None:
    """Until the run has a log or has ended; every change of its phase is said."""
    before = None
    while True:
        seen = watched(client, run)
        if seen.phase != before:
            before = seen.phase
            say(f"{run} is {before.name}" + (f": {before.reason}" if before.reason else ""))
        if before.name == "running" or before.ended:
            return
        time.sleep(LOOK_SECONDS)


def log(client: Client, run: str, follow: bool) -> Iterator[str]:
    """The driver's output, line by line. Where it is followed: until the RayJob says that the run has ended, whatever
    becomes of the stream. LogGone where there is none, and it is not followed."""
    last, same = "", set()  # the time of the last line, and the lines of that time: a new stream begins with them
    tries = LAST_TRIES
    while True:
        seen = watched(client, run) if follow else look(client, run)
        ended = seen.phase.ended
        try:
            for line in seen.log(client, follow and not ended, last):
                at, _, text = line.partition(" ")
                if at < last or (at == last and text in same):
                    continue
                same = same | {text} if at == last else {text}
                last = at
                yield text
        except LogGone:
            if not follow:
                raise
            tries -= ended
            if tries:
                time.sleep(LOOK_SECONDS)
                continue
        if not follow or ended:
            return
        time.sleep(LOOK_SECONDS)


def event_of(line: str) -> dict | None:
    """The event that a line of a log is; None of what is for people."""
    if not line.startswith('{"'):
        return None
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and {"event", "time"} <= event.keys() else None


def _rayjobs(client: Client, run: str) -> list[dict]:
    return client.list(RAYJOB, {APP: "armillary", RUN: run})


def _if_known(client: Client, kind: Kind, labels: dict[str, str]) -> list[dict]:
    """Nothing where the cluster does not know the kind."""
    try:
        return client.list(kind, labels)
    except NoSuchKind:
        return []


def _name(thing: dict) -> str:
    return thing["metadata"]["name"]


def _age(thing: dict) -> tuple[str, str]:
    return thing["metadata"].get("creationTimestamp", ""), _name(thing)


def _newest(things: list[dict]) -> dict | None:
    return max(things, key=_age, default=None)
