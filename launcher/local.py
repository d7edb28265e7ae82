"""Runs on this machine: what `armillary status`, `logs`, `list`, `suspend` and `cancel` do with a run's directory."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from armillary.errors import JobError
from armillary.launcher.follow import follow
from armillary.launcher.run import Run
from armillary.launcher.standing import Standing

LOOK_SECONDS = 0.2


def standing(run: Run) -> Standing:
    """By all events that there are."""
    found = Standing(run.job().training.steps)
    for event in run.events():
        found.add(event)
    return found


def phase(found: Standing, driver: dict | None) -> tuple[str, str]:
    """(phase, reason), by the events and by whether somebody drives the run."""
    if driver is not None:
        reason = f"process {driver['pid']} on {driver['host']} drives it"
        return ("starting" if found.state == "new" else "running"), reason
    if found.state in ("done", "failed", "cancelled"):
        return found.state, found.error or ""
    if found.state == "stopped":
        return "suspended", "`armillary resume` goes on"
    return "failed", "its driver is gone, without a word: `armillary resume` goes on from the last checkpoint"


def status(run: Run) -> dict:
    """What a run in a cluster has too."""
    found = standing(run)
    name, reason = phase(found, run.driver())
    progress = found.as_dict()
    if name != "running":
        progress |= {"tokens_per_second": None, "eta_seconds": None}
    return {"run": str(run.path), "phase": name, "reason": reason, "progress": progress, "progress_reason": ""}


def runs(folder: Path) -> list[dict]:
    """Every run in a folder: name, phase, reason; the newest first."""
    found = sorted(folder.glob("*/job.toml"), key=lambda path: path.parent.stat().st_mtime, reverse=True)
    return [
        {key: one[key] for key in ("run", "phase", "reason")}
        for one in (status(Run.open(path.parent)) for path in found)
    ]


def events(run: Run, following: bool) -> Iterator[dict]:
    """So far, or until nobody drives the run any more."""
    ended = threading.Event()
    if not following:
        ended.set()
    for event in follow(run.events_file, ended):
        if event is not None:
            yield event
        elif run.driver() is None:
            ended.set()


def suspend(run: Run) -> None:
    """Let a run save and end."""
    _end(run, [signal.SIGTERM])


def cancel(run: Run) -> None:
    """End a run at once, for good."""
    if run.driver() is not None:
        _end(run, [signal.SIGTERM, signal.SIGINT])
    if standing(run).state == "done":
        raise JobError("the run is done", run.path, "there is nothing to cancel")
    run.event("cancelled")


def _end(run: Run, signals: list[int]) -> None:
    """Send them to the driver, and wait until it is gone."""
    driver = run.driver()
    if driver is None:
        raise JobError("nobody drives this run", run.path, "`armillary resume` goes on with it")
    if not driver["here"]:
        raise JobError(f"its driver is a process on {driver['host']}", run.path, "do it there, or by the run's name")
    for number in signals:
        try:
            os.kill(driver["pid"], number)
        except ProcessLookupError:
            break
        except PermissionError:
            raise JobError(
                f"its driver, process {driver['pid']}, is another user's", run.path, "ask that user"
            ) from None
        time.sleep(LOOK_SECONDS)
    while run.driver() == driver:
        time.sleep(LOOK_SECONDS)
