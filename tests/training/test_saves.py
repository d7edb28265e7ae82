"""When checkpoints are saved, and what happens where they cannot be."""

import errno
import json
import threading
import time

import pytest
import torch

from armillary.errors import RunError
from armillary.launcher.job import resolve
from armillary.model.coordinates import Block
from armillary.storage import LocalStorage
from armillary.training.checkpoint.commit import commit
from armillary.training.checkpoint.load import Reader
from armillary.training.checkpoint.saver import Saver
from armillary.training.checkpoint.snapshot import Snapshot
from armillary.training.loop import Assignment, run
from armillary.training.process_group import Rank, join
from tests.conftest import free_port
from tests.groups import in_group

STEPS = 6


class Watcher:
    """Commits, and remembers what it was told. Asks to stop after `stop_after` steps."""

    def __init__(self, folder, ranks=1, stop_after=STEPS):
        self.folder, self.ranks, self.stop_after = folder, ranks, stop_after
        self.steps, self.saved_steps, self.missed, self.verdicts = [], [], [], []

    def stop_requested(self):
        return len(self.steps) + 1 >= self.stop_after

    def step_done(self, record):
        self.steps.append(record)

    def saved(self, name, state):
        commit(LocalStorage(self.folder / name), state, 0, self.ranks)
        self.saved_steps.append(state.step)

    def not_saved(self, step, reason):
        self.missed.append((step, reason))

    def verdict(self, verdict):
        self.verdicts.append(verdict)


def train(tables, folder, rank=Rank(), watcher=None, steps=STEPS, **checkpoint):  # noqa: B008 - a frozen one
    job = resolve(
        tables | {"checkpoint": {"every": 2} | checkpoint, "parallel": {"data": rank.world_size}}, "test"
    ).train_job()
    watcher = watcher or Watcher(folder, rank.world_size)
    join(rank, job.parallel)
    run(Assignment("saves", job, "hash", rank, folder, None, steps), watcher)
    return watcher


def test_a_bad_step_is_a_verdict_and_no_step(tables, tmp_path):
    training = tables["training"] | {"steps": 120, "spike": 2.5, "bad_step": "skip"}
    watcher = Watcher(tmp_path, stop_after=10_000)
    train(tables | {"training": training}, tmp_path, watcher=watcher, steps=120, every=1000)
    bad = [verdict.step for verdict in watcher.verdicts]
    assert bad
    assert {verdict.action for verdict in watcher.verdicts} == {"skip"}
    assert sorted([record["step"] for record in watcher.steps] + bad) == list(range(1, 121))


def full(monkeypatch, times):
    """A disk on which `times` files cannot be written."""
    real, left = LocalStorage.put, [None] * times

    def put(self, name, content):
        if left:
            left.pop()
            raise OSError(errno.ENOSPC, "No space left on device", self.at(name))
        real(self, name, content)

    monkeypatch.setattr(LocalStorage, "put", put)


def contents(folder, step):
    reader = Reader(LocalStorage(folder / f"step-{step:08d}"))
    return {key: reader.content(key) for key in reader.keys}


def test_a_save_that_fails_is_told_and_training_goes_on(tables, tmp_path, monkeypatch):
    full(monkeypatch, 1)
    watcher = train(tables, tmp_path)
    assert watcher.saved_steps == [4, 6]
    assert [(one.kind, one.step, one.phase) for one in watcher.verdicts] == [("full storage", 2, "checkpoint")]
    assert len(watcher.steps) == STEPS
    ((step, reason),) = watcher.missed
    assert step == 2
    assert "No space left on device" in reason


def test_three_in_a_row_that_fail_end_the_run(tables, tmp_path, monkeypatch):
    full(monkeypatch, 3)
    watcher = Watcher(tmp_path)
    with pytest.raises(RunError, match=r"3 checkpoints in a row could not be saved: .*No space left"):
        train(tables, tmp_path, watcher=watcher)
    assert watcher.saved_steps == []
    assert len(watcher.steps) == STEPS


def test_the_last_must_be_saved(tables, tmp_path, monkeypatch):
    full(monkeypatch, 1)
    with pytest.raises(RunError, match="the last checkpoint could not be saved, at step 3"):
        train(tables, tmp_path, watcher=Watcher(tmp_path, stop_after=3), every=100)


def test_no_save_is_begun_without_room_for_it(tables, tmp_path, monkeypatch):
    watcher, rooms = Watcher(tmp_path), iter([10, 1 << 40, 1 << 40])
    monkeypatch.setattr(LocalStorage, "free", lambda self: next(rooms))
    train(tables, tmp_path, watcher=watcher)
    ((step, reason),) = watcher.missed
    assert step == 2
    assert "there is no room for" in reason
    assert watcher.saved_steps == [4, 6]
    assert not (tmp_path / "step-00000002").exists()


@pytest.mark.parametrize("when_busy", ["skip", "wait"])
def test_a_slow_save_holds_what_was_true_at_its_step(tables, tmp_path, monkeypatch, when_busy):
    train(tables, tmp_path / "quick")
    real, slow, watcher = LocalStorage.put, threading.Event(), Watcher(tmp_path / "slow")

    def put(self, name, content):
        if when_busy == "wait" and len(watcher.steps) == 4:
            slow.set()  # or the wait would have no end
        if "step-00000002" in self.at(name) and not slow.wait(0 if when_busy == "wait" else 60):
            threading.Timer(0.2, slow.set).start()
            slow.wait()
        if len(watcher.steps) > 4:
            slow.set()
        real(self, name, content)

    def step_done(record):
        watcher.steps.append(record)
        if record["step"] == 5:
            slow.set()

    monkeypatch.setattr(LocalStorage, "put", put)
    watcher.step_done = step_done
    train(tables, tmp_path / "slow", watcher=watcher, when_busy=when_busy)
    if when_busy == "skip":
        assert [step for step, _ in watcher.missed] == [4]
        assert watcher.saved_steps == [2, 6]
    else:
        assert watcher.saved_steps == [2, 4, 6]
        assert watcher.missed == []
    for step in watcher.saved_steps:
        assert contents(tmp_path / "slow", step) == contents(tmp_path / "quick", step)


def test_nothing_changes_before_it_is_copied(tables, tmp_path, monkeypatch):
    train(tables, tmp_path / "quick")
    real = Snapshot.copy

    def copy(self):
        time.sleep(0.3)
        real(self)

    monkeypatch.setattr(Snapshot, "copy", copy)
    watcher = train(tables, tmp_path / "slow")
    assert watcher.saved_steps == [2, 4, 6]
    for step in watcher.saved_steps:
        assert contents(tmp_path / "slow", step) == contents(tmp_path / "quick", step)


def test_a_state_that_cannot_be_had_leaves_no_save_under_way(tmp_path):
    def tensors():
        yield "weight", Block("name", (3,), (0,), torch.ones(3))
        raise RuntimeError("no more")

    saver = Saver(LocalStorage(tmp_path), 0, 0, 1, False, lambda name, state: pytest.fail("nothing to commit"))
    with pytest.raises(RuntimeError, match="no more"):
        saver.save("step", tensors(), False, None)
    saver.wait()
    assert not saver.busy
    assert list(tmp_path.iterdir()) == []


def one_rank_fails(rank, tables, folder):
    patch = pytest.MonkeyPatch()
    if rank.rank == 1:
        full(patch, 1)
    watcher = train(tables, folder, rank)
    if rank.rank == 0:
        (folder / "told.json").write_text(json.dumps([watcher.saved_steps, watcher.missed]))


def test_where_one_rank_fails_all_go_on(tables, tmp_path):
    in_group(2, free_port(), one_rank_fails, tables, tmp_path)
    saved, ((step, reason),) = json.loads((tmp_path / "told.json").read_text())
    assert saved == [4, 6]
    assert step == 2
    assert "rank 1 did not write its part" in reason
