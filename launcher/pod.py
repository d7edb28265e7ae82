"""What the containers of a run's pods do.

    python -m armillary.launcher.pod submit     in the submitter's: has Ray's head do the next, and shows its output
    python -m armillary.launcher.pod train      in the head's, by Ray: the run ARMILLARY_RUN of the job ARMILLARY_JOB
    python -m armillary.launcher.pod stop       before a pod ends: its driver or ranks save, and this waits for them
    python -m armillary.launcher.pod metrics    beside both: all metrics of the pod on one port

`train` may be called any number of times, by the operator's retries too: what is there of the run goes on from its last
checkpoint. It prints the run's events, a line of JSON each, and every ten seconds how it stands.
"""

import argparse
import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from armillary.errors import ArmillaryError, CheckpointError, JobError, PreemptedError
from armillary.k8s.rayjob import ENTRYPOINT
from armillary.launcher.exporter import signed_in
from armillary.launcher.follow import follow
from armillary.launcher.job import Job, apply_overrides, parse_toml, resolve
from armillary.launcher.run import Run
from armillary.launcher.standing import Standing
from armillary.storage import open_storage

DRIVER = "driver"  # as which `train` signs in
PROGRESS_SECONDS = 10.0
AGAIN_SECONDS = 5.0  # that a pod which has to go may take until Ray knows
OTHER_SECONDS = 300.0  # beside its grace, that a run's pods of before may take to go, and a lost one's lock to lapse
LINES = 100  # of what a launch says that are kept where it fails
LINGER_SECONDS = 20.0  # after the end, so that Prometheus, which comes every fifteen, sees it


def main() -> None:
    """Entry point."""
    options = argparse.ArgumentParser(prog="armillary.launcher.pod")
    options.add_argument("command", choices=("submit", "train", "launch", "stop", "metrics"))
    options.add_argument("--folder", type=Path, help="of the files that say where metrics are")
    options.add_argument("--fewer", action="store_true", help="do with fewer ranks if there is no room for all")
    options.add_argument("--port", type=int, default=0, help="of all metrics of the pod")
    args = options.parse_args()
    try:
        match args.command:
            case "submit":
                from armillary.launcher.submitter import submit

                submit(ENTRYPOINT)
            case "train":
                sys.exit(train())
            case "launch":
                sys.exit(launch(args.fewer))
            case "stop":
                stop(Path(os.environ["ARMILLARY_METRICS"]))
            case "metrics":
                from armillary.launcher.exporter import serve

                serve(args.folder, args.port)
    except ArmillaryError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def train() -> int:
    """Keep the run going until it ends or is told to: its exit code.

    Where single ranks were told to end, as when one pod has to make room, the run goes on with those that are left.
    Who tells the run to end sends SIGTERM to this process and to its child, as Ray does and `stop`: a second one to the
    child would end it at once.
    """
    from armillary.launcher.run_metrics import serving
    from armillary.training.metrics import sign_in, sign_out

    job, path = job_of_pod()
    told, ended = threading.Event(), threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    signed = sign_in(DRIVER)
    reporter = threading.Thread(target=report, args=(path / "events.jsonl", job.training.steps, ended))
    reporter.start()
    with serving(Run(path.resolve()), job.metrics, job.training.steps, job.parallel.world_size):
        try:
            return _only_once(job, path, lambda said: _train(told, said))
        finally:
            ended.set()
            reporter.join()
            sign_out(signed)
            time.sleep(LINGER_SECONDS)


def _train(told: threading.Event, said: collections.deque[str]) -> int:
    """What its launches say to people is passed on, and the last of it kept in `said`."""
    # The run's metrics are served here, where they outlive the driver.
    environment = {key: value for key, value in os.environ.items() if key != "ARMILLARY_METRICS"}
    again: list[str] = []
    while True:
        command = [sys.executable, "-m", "armillary.launcher.pod", "launch", *again]
        child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
        if told.is_set():  # before it was there
            child.terminate()
        for line in child.stderr:
            said.append(line)
            print(line, end="", file=sys.stderr, flush=True)
        code = child.wait()
        if code != PreemptedError.exit_code or told.wait(AGAIN_SECONDS):
            return code if code >= 0 else 128 - code
        again = ["--fewer"]


def _only_once(job: Job, path: Path, act: Callable[[collections.deque[str]], int]) -> int:
    """`act`, unless this submission has ended before: the operator starts its command again whatever the reason was
    that it ended, which only makes sense where it was lost with its pod. What it said then is said again, since the
    operator removes the log of before. act: takes what keeps the last lines that are said."""
    store, name = open_storage(job.checkpoint.path or str(path.parent), CheckpointError), f".{path.name}.ended"
    submission = os.environ["ARMILLARY_SUBMISSION"]
    with contextlib.suppress(FileNotFoundError):
        if (before := json.loads(bytes(store.read(name))))["submission"] == submission:
            print(f"it has ended before, and said:\n{before['said']}", file=sys.stderr, flush=True)
            return before["code"]
    said: collections.deque[str] = collections.deque(maxlen=LINES)
    code = act(said)
    if code not in (0, PreemptedError.exit_code) and code < 128:
        ended = {"submission": submission, "code": code, "said": "".join(said)}
        try:
            store.put(name, json.dumps(ended).encode())
        except (OSError, CheckpointError) as error:
            print(f"that it ended cannot be written down: {error}", file=sys.stderr, flush=True)
    return code


def launch(fewer: bool) -> int:
    """Start the run, or go on with what is there of it: its exit code."""
    from rich.console import Console

    from armillary.launcher.train import go_on

    job, path = job_of_pod()
    path.parent.mkdir(exist_ok=True)
    summary = go_on(path, job, Console(stderr=True, width=120), fewer, job.cluster.grace + OTHER_SECONDS)
    print(json.dumps({"time": time.time(), "event": "summary"} | summary.as_dict()), flush=True)
    return PreemptedError.exit_code if summary.preempted else 0


def job_of_pod() -> tuple[Job, Path]:
    """This pod's run: its job, on this pod's cluster, and its directory. Goes to where relative paths begin."""
    try:
        text, run, root = (os.environ[f"ARMILLARY_{name}"] for name in ("JOB", "RUN", "ROOT"))
    except KeyError as error:
        raise JobError(f"the pod's environment has no {error.args[0]}", "", "submit with `armillary submit`") from None
    os.chdir(root)
    tables = parse_toml(text, "ARMILLARY_JOB")
    cpus = resolve(tables, "ARMILLARY_JOB").kubernetes.cpus_per_rank
    own = ['cluster.address="auto"', f"cluster.cpus_per_rank={cpus}", "metrics.port=0"]
    return resolve(apply_overrides(tables, own), "ARMILLARY_JOB"), Path("runs") / run


def report(events: Path, steps: int, ended: threading.Event) -> None:
    """Print the events from now on, but of steps only where the run stands, until `ended` is set."""
    began, standing, due = time.time(), Standing(steps), 0.0
    for event in follow(events, ended):
        if event is not None:
            standing.add(event)
            if event["event"] != "step" and event["time"] >= began:
                print(json.dumps(event), flush=True)
        if time.monotonic() >= due or ended.is_set():
            due = time.monotonic() + PROGRESS_SECONDS
            print_standing(standing)
    print_standing(standing)


def print_standing(standing: Standing) -> None:
    now = time.time()
    print(json.dumps({"time": round(now, 3), "event": "progress"} | standing.as_dict(now)), flush=True)


def stop(folder: Path) -> None:
    """Tell the driver and the ranks of this pod to save and end, and wait until they are gone."""
    found = []
    for name, one in signed_in(folder).items():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(one["pid"])
            if process.create_time() != one["began"]:
                continue  # another one has its number by now
            if name == DRIVER or name.startswith("rank-"):
                found.append(process)
            if name == DRIVER:
                found += process.children(recursive=True)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(found)


if __name__ == "__main__":
    main()
