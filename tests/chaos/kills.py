"""Saves that are killed, and what must be true afterwards. An AssertionError says what was lost, or is wrong."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from armillary.errors import ArmillaryError
from armillary.launcher.job import Job
from armillary.launcher.run import Run
from armillary.training.config import CheckpointConfig
from tests.chaos.disk import Disk, Killed
from tests.chaos.saves import found, latest, save
from tests.conftest import ROOT
from tests.launcher.test_run import DATA
from tests.s3 import Proxy

KEEP = CheckpointConfig(keep_last=2)
FIRST_SAVE = 60.0  # seconds that a process may take until it has saved something


def alive() -> bool:
    """Whether the process is dead: no."""
    return False


def two_saves(root: Path, job: Job) -> Run:
    """A new run with checkpoints of the steps 10 and 20."""
    run = Run.create(root, job, DATA)
    with Disk(root / "checkpoints").patched():
        for number, step in enumerate((10, 20)):
            save(run, 0, step, number + 1, KEEP, alive)
    return run


def at_operation(root: Path, job: Job, step: int, end: int, mode: str) -> Disk:
    """Kill a save of `step`, 20 again or 30, at its operation number `end`; the disk, which is dead if it came so far.
    What is listed loads, the newest is the old or the new one, and the next launch goes on and clears up."""
    run, disk = two_saves(root, job), Disk(root / "checkpoints", end, mode, seed=end)
    with disk.patched(), contextlib.suppress(Killed):
        save(run, 1, step, 3, KEEP, lambda: disk.dead)
    with Disk(run.path / "checkpoints").patched():
        _whole(run, step, disk.dead)
    return disk


def at_request(proxy: Proxy, root: Path, job: Job, step: int, end: int, passed: bool) -> bool:
    """The same for a store behind the proxy, which dies at a request that changes something; whether it came so far."""
    run = two_saves(root, job)
    proxy.die_at(end, passed)
    with contextlib.suppress(ArmillaryError):
        save(run, 1, step, 3, KEEP, lambda: proxy.dead)
    dead = proxy.dead
    proxy.die_at(0, False)
    _whole(run, step, dead)
    return dead


def _whole(run: Run, step: int, dead: bool) -> None:
    """What must be true after a save of `step` that may have been killed, and of the next launch."""
    held, now = found(run), latest(run)
    assert now == (step, 3) or (dead and now == (20, 2))
    if now == (step, 3):
        assert held.items() >= {(20, 2), (30, 3)} if step == 30 else held == {10: 1, 20: 3}
    else:
        assert held[10] == 1
        assert held[20] in (2, 3)
    run.new_generation()
    save(run, 2, 40, 4, KEEP, alive)
    assert latest(run) == (40, 4)
    assert len(found(run)) == 2
    rest = [name for name in run.store().sizes() if name.endswith((".tmp", "00000.json"))]
    assert not rest, "nothing half-written is left"


def at_random(root: Path, seconds: float) -> int:
    """Kill -9 a process that saves step after step, `seconds` after its first; the newest step, which loads."""
    before = latest(Run(root))[0]
    command = [sys.executable, "-m", "tests.chaos.kills", root]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + FIRST_SAVE
    while latest(Run(root))[0] == before:
        assert time.monotonic() < deadline, "it saved nothing"
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.005)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    held, (step, value) = found(Run(root)), latest(Run(root))
    assert step > before
    assert held[step] == value
    return step


def _save_on(run: Run) -> None:
    generation, _ = run.new_generation()
    step, value = latest(run)
    while True:
        step, value = step + 10, value + 1
        save(run, generation, step, value, KEEP, alive)


if __name__ == "__main__":
    _save_on(Run(Path(sys.argv[1])))
