"""Whatever a save is killed at, what is listed loads, and nothing is lost. `make chaos` tries every point."""

import itertools

import pytest

from armillary.launcher.job import resolve
from armillary.training.checkpoint import saver, snapshot
from tests.chaos.disk import MODES
from tests.chaos.kills import at_operation, at_random, two_saves

STRIDE = 4  # operations; each mode begins at another one


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", [20, 30])
def test_a_save_killed_at_an_operation_loses_nothing(tables, tmp_path, monkeypatch, step, mode):
    monkeypatch.setattr(snapshot, "FILE_BYTES", 256)
    monkeypatch.setattr(saver, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    job = resolve(tables, "test")
    for end in itertools.count(1 + MODES.index(mode), STRIDE):
        if not at_operation(tmp_path / f"run-{end}", job, step, end, mode).dead:
            break
    assert end > 40


def test_a_process_killed_while_it_saves_loses_nothing(tables, tmp_path):
    run = two_saves(tmp_path / "run", resolve(tables, "test"))
    steps = [at_random(run.path, seconds) for seconds in (0.0, 0.02, 0.05)]
    assert steps == sorted(set(steps))
