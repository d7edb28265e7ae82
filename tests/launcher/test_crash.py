"""Whatever a save is killed at, the checkpoints that are listed load, and none is lost."""

import contextlib
import itertools

import pytest

from armillary.launcher.job import resolve
from armillary.launcher.run import Run
from armillary.training.checkpoint import saver, snapshot
from armillary.training.config import CheckpointConfig
from tests.chaos.disk import MODES, Disk, Killed
from tests.chaos.saves import found, latest, save
from tests.launcher.test_run import DATA

KEEP = CheckpointConfig(keep_last=2)
NEVER = lambda: False  # noqa: E731


def two_saves(root, tables) -> Run:
    run = Run.create(root, resolve(tables, "test"), DATA)
    with Disk(root / "checkpoints").patched():
        for number, step in enumerate((10, 20)):
            save(run, 0, step, number + 1, KEEP, NEVER)
    return run


def killed(run: Run, step: int, end: int, mode: str) -> Disk:
    """Kill a save of `step` at its operation number `end`; the disk."""
    disk = Disk(run.path / "checkpoints", end, mode, seed=end)
    with disk.patched(), contextlib.suppress(Killed):
        save(run, 1, step, 3, KEEP, lambda: disk.dead)
    return disk


def check(run: Run, step: int, disk: Disk) -> None:
    """What is listed loads, the newest is the old or the new one, and the next launch goes on and clears up."""
    held, now = found(run), latest(run)
    assert now == (step, 3) or (disk.dead and now == (20, 2))
    if now == (step, 3):
        assert held.items() >= {(20, 2), (30, 3)} if step == 30 else held == {10: 1, 20: 3}
    else:
        assert held[10] == 1
        assert held[20] in (2, 3)
    with Disk(run.path / "checkpoints").patched():
        run.new_generation()
        save(run, 2, 40, 4, KEEP, NEVER)
    assert latest(run) == (40, 4)
    assert len(found(run)) == 2
    rest = [name for name in run.store().sizes() if name.endswith((".tmp", "00000.json"))]
    assert not rest, "nothing half-written is left"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", [20, 30])
def test_a_save_killed_at_any_operation_loses_nothing(tables, tmp_path, monkeypatch, step, mode):
    monkeypatch.setattr(snapshot, "FILE_BYTES", 256)
    monkeypatch.setattr(saver, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    for end in itertools.count(1):
        run = two_saves(tmp_path / f"run-{end}", tables)
        disk = killed(run, step, end, mode)
        check(run, step, disk)
        if not disk.dead:
            break
    assert end > 40
