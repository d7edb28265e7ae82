"""`armillary submit`, `status`, `logs`, `list`, `suspend`, `cancel`: runs on this machine and in clusters alike.

A run is named by its directory, or by its name in a Kubernetes namespace.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from armillary.errors import ClusterError, JobError, RunError
from armillary.launcher import standing
from armillary.launcher.arguments import AsJson, Force, JobFile, Overrides

WATCH_SECONDS = 2.0
RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run's directory, or its name in a cluster")]
Context = Annotated[str, typer.Option(help="of the kubeconfig; default: its current one")]
Namespace = Annotated[str, typer.Option(help="of the cluster; default: the context's")]
Queue = Annotated[str, typer.Option(help="Kueue's LocalQueue; sets kubernetes.queue")]
Priority = Annotated[str, typer.Option(help="Kueue's WorkloadPriorityClass; sets kubernetes.priority")]
Named = Annotated[str, typer.Option("--run", help="the run's name; one that ended goes on; default NAME-TIME")]
AllowTag = Annotated[bool, typer.Option("--allow-tag", help="take an image that is not named by its digest")]


def submit(
    job_file: JobFile,
    overrides: Overrides = (),
    context: Context = "",
    namespace: Namespace = "",
    queue: Queue = "",
    priority: Priority = "",
    run: Named = "",
    allow_tag: AllowTag = False,
    force: Force = False,
    detach: Annotated[bool, typer.Option("--detach", help="do not follow the run")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a run in a Kubernetes cluster, and follow it: Ctrl-C leaves it there."""
    job, name = _job(job_file, overrides, queue, priority, run)
    from armillary.launcher.submission import rayjob_of

    rayjob_of(job, name, name, str(job_file), allow_tag, force)  # refused, if at all, before a cluster is asked
    if not job.kubernetes.gpu_model and job.kubernetes.gpu:
        _say("not planned: the planner does not know the GPUs (kubernetes.gpu_model)")
    from armillary.k8s.client import connected
    from armillary.launcher import remote

    with connected(context, namespace) as client:
        rayjob = remote.submit(client, job, name, str(job_file), allow_tag, force)
        _say(f"submitted as {rayjob}; how it stands: armillary status {name}")
        code = _seen_off(client, name, detach, as_json)
    sys.exit(code)


def render(
    job_file: JobFile,
    overrides: Overrides = (),
    queue: Queue = "",
    priority: Priority = "",
    run: Named = "",
    allow_tag: AllowTag = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Print the RayJob that `submit` would create, as YAML; no cluster is asked."""
    job, name = _job(job_file, overrides, queue, priority, run)
    from armillary.launcher.submission import rayjob_of, to_yaml

    rayjob = rayjob_of(job, name, name, str(job_file), allow_tag, force)
    print(json.dumps(rayjob) if as_json else to_yaml(rayjob), end="\n" if as_json else "")


def status(
    run: RunName,
    watch: Annotated[
        bool, typer.Option("--watch", help="again and again, until the run has ended or is suspended")
    ] = False,
    context: Context = "",
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """How a run stands: its phase and why, step, tokens/s, ETA, last checkpoint, restarts, last verdict."""
    with _run(run, context, namespace) as (client, here):
        while True:
            found = _status(client, here, run, patient=watch)
            if as_json:
                print(json.dumps(found), flush=True)
            else:
                _print_status(found)
            if not watch or found["phase"] in ("done", "failed", "cancelled", "suspended"):
                return
            time.sleep(WATCH_SECONDS)


def logs(
    run: RunName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="until the run has ended")] = False,
    context: Context = "",
    namespace: Namespace = "",
    as_json: Annotated[bool, typer.Option("--json", help="events, as lines of JSON")] = False,
) -> None:
    """What a run's driver said. Each rank's own output is in a file of the run's directory."""
    with _run(run, context, namespace) as (client, here):
        if here is not None:
            from armillary.launcher.local import events

            for event in events(here, follow):
                _print_event(event, as_json)
            return
        from armillary.launcher import remote

        for line in remote.log(client, run, follow):
            if (remote.event_of(line) is not None) == as_json:
                print(line, flush=True)


def list_(
    folder: Annotated[Path, typer.Argument(help="of runs on this machine")] = Path("runs"),
    cluster: Annotated[bool, typer.Option("--cluster", help="those of the cluster instead")] = False,
    context: Context = "",
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """Every run, here or (with --cluster, --context or --namespace) in a namespace of a cluster."""
    if cluster or context or namespace:
        from armillary.k8s.client import connected
        from armillary.launcher.remote import runs as of_cluster

        with connected(context, namespace) as client:
            found = of_cluster(client)
    else:
        from armillary.launcher.local import runs as of_folder

        found = of_folder(folder)
    if as_json:
        print(json.dumps({"runs": found}))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "phase", "reason"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "reason")
    for one in found:
        table.add_row(one["run"], one["phase"], one["reason"])
    Console().print(table)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the run's directory")],
    out: Annotated[Path | None, typer.Option(help="the page; default: report.html in the run's directory")] = None,
) -> None:
    """Write one page of a run: curves, where the time went, events, layout, data, checkpoints."""
    from armillary.launcher.run import Run

    opened = Run.open(run)
    from armillary.launcher.report import report as write

    path = out or opened.path / "report.html"
    try:
        write(opened, path)
    except OSError as error:
        raise JobError(f"the page cannot be written: {error.strerror}", path, "name another place with --out") from None
    print(path)


def suspend(run: RunName, context: Context = "", namespace: Namespace = "") -> None:
    """Let a run save a checkpoint and give its machines back; `armillary resume` goes on with it."""
    with _run(run, context, namespace) as (client, here):
        if here is not None:
            from armillary.launcher.local import suspend as end

            end(here)
        else:
            from armillary.launcher.remote import suspend as end

            end(client, run)
    _say(f"{run} saves and gives its machines back; it goes on with: armillary resume {run}")


def cancel(run: RunName, context: Context = "", namespace: Namespace = "") -> None:
    """End a run for good. Its checkpoints stay."""
    with _run(run, context, namespace) as (client, here):
        if here is not None:
            from armillary.launcher.local import cancel as end

            end(here)
        else:
            from armillary.launcher.remote import cancel as end

            end(client, run)
            _say("its pods save, and go")
    _say(f"{run} is cancelled; its checkpoints stay where they are")


def resume_in_cluster(run: str, context: str, namespace: str, detach: bool, as_json: bool) -> None:
    """`armillary resume` of a run that is not on this machine."""
    from armillary.launcher import remote

    with _cluster_of(run, context, namespace) as client:
        rayjob = remote.resume(client, run)
        _say(f"{run} goes on from its last checkpoint, as {rayjob}")
        code = _seen_off(client, run, detach, as_json)
    sys.exit(code)


def _seen_off(client, run: str, detach: bool, as_json: bool) -> int:
    """Follow a run that was just started, unless it is not to be, and say at last how it stands: the exit code."""
    from armillary.launcher import remote

    try:
        return 0 if detach else _follow(client, run)
    finally:
        if as_json:
            with contextlib.suppress(ClusterError):  # what is raised already is more to the point
                print(json.dumps(remote.status(client, run)), flush=True)


def is_here(run: str, context: str, namespace: str) -> bool:
    """Whether RUN names a directory of this machine."""
    return not context and not namespace and (Path(run).exists() or "/" in run)


@contextlib.contextmanager
def _run(run: str, context: str, namespace: str) -> Iterator[tuple]:
    """(a client, None), or (None, the run of this machine)."""
    if is_here(run, context, namespace):
        from armillary.launcher.run import Run

        yield None, Run.open(Path(run))
        return
    with _cluster_of(run, context, namespace) as client:
        yield client, None


@contextlib.contextmanager
def _cluster_of(run: str, context: str, namespace: str) -> Iterator:
    """A client, for a run that is not here."""
    from armillary.k8s.client import NoCluster, connected

    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(connected(context, namespace))
        except NoCluster as error:
            fix = f"start one with `armillary train JOB.toml`; for a run in a cluster {error.fix}"
            raise NoCluster(f"there is no run here, and {error.what}", run, fix) from None
        yield client


def _job(job_file: Path, overrides, queue: str, priority: str, run: str) -> tuple:
    """The job, and the run's name."""
    from armillary.launcher.job import load_job
    from armillary.launcher.submission import new_name

    given = {"queue": queue, "priority": priority}
    own = [f'kubernetes.{key}="{value}"' for key, value in given.items() if value]
    job = load_job(job_file, [*overrides, *own])
    return job, run or new_name(job)


def _status(client, here, run: str, patient: bool) -> dict:
    if here is not None:
        from armillary.launcher.local import status as of

        return of(here)
    from armillary.launcher.remote import status as of

    return of(client, run, patient)


def _print_status(found: dict) -> None:
    rows = {"run": found["run"], "phase": found["phase"] + (f": {found['reason']}" if found["reason"] else "")}
    if found["progress"] is not None:
        rows |= {key: value for key, value in standing.rows(found["progress"]).items() if key != "state"}
    if found["progress_reason"]:
        rows["progress"] = f"not known: {found['progress_reason']}"
    for name, value in rows.items():
        print(f"{name:>12}  {value}", flush=True)


def _print_event(event: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(event), flush=True)
    else:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        print(f"{at} {standing.told(event)}", flush=True)


def _follow(client, run: str) -> int:
    """Show what a run says until it has ended; the exit code: 1 where it failed, 130 after Ctrl-C."""
    from armillary.launcher import remote

    try:
        remote.wait_for_start(client, run, _say)
        for line in remote.log(client, run, follow=True):
            if remote.event_of(line) is None:
                _say(line)
        phase = remote.watched(client, run).phase
    except KeyboardInterrupt:
        _say(f"the run goes on without you: armillary logs -f {run}; to end it: armillary cancel {run}")
        return 130
    if phase.name == "failed":
        raise RunError(
            f"the run {run} failed: {phase.reason}", f"armillary logs {run}", f"then: armillary resume {run}"
        )
    _say(f"{run} is {phase.name}")
    return 0 if phase.name == "done" else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
