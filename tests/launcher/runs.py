"""Runs as processes of their own, which tests look into, stop and kill."""

import subprocess
import time

import psutil

from armillary.launcher.run import Run
from tests.conftest import ARMILLARY


def started(tmp_path, *words) -> subprocess.Popen:
    """A command in a session of its own, as a terminal gives it."""
    return subprocess.Popen(
        [ARMILLARY, *map(str, words)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return found


def placed(run: Run):
    return next(run.events("placed"), None)


def assert_gone(ranks: list[dict]) -> None:
    """No process of the run outlives its command."""
    deadline = time.monotonic() + 10
    pids = {rank["pid"] for rank in ranks}
    while alive := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.1)
