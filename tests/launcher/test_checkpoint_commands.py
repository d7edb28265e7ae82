"""`armillary checkpoint`, as a user sees it."""

import json
import re

import pytest
from rich.console import Console

from armillary.errors import ArmillaryError, CheckpointError, JobError
from armillary.launcher.job import resolve
from armillary.launcher.run import Run
from armillary.launcher.train import resume
from armillary.storage import LocalStorage, check_writable
from armillary.training.checkpoint.catalog import Entry, kept, verify
from armillary.training.checkpoint.manifest import State
from armillary.training.config import CheckpointConfig
from tests.chaos.saves import found, latest, save
from tests.conftest import refused
from tests.launcher.test_run import DATA

ALL = CheckpointConfig()


@pytest.fixture
def run(tables, tmp_path):
    """A run with checkpoints of the steps 10, 20 and 30; of 20 and 30 the numbers are the same."""
    run = Run.create(tmp_path / "run", resolve(tables, "test"), DATA)
    for step, value in ((10, 1), (20, 2), (30, 2)):
        save(run, 0, step, value, ALL, lambda: False)
    return run


def test_list_and_show(run, armillary):
    done = armillary("checkpoint", "list", "run", "--json")
    rows = json.loads(done.stdout)["checkpoints"]
    assert [(row["step"], row["latest"]) for row in rows] == [(10, False), (20, False), (30, True)]
    assert {row["bytes"] for row in rows} == {3 * 4 * (40 + 21)}
    damaged = run.path / "checkpoints/step-00000010/manifest.json"
    damaged.write_text(damaged.read_text()[:-3])
    said = armillary("checkpoint", "list", "run").stdout
    assert "step-00000030 (latest)" in said
    assert re.search("step-00000010: .*damaged", said)
    shown = json.loads(armillary("checkpoint", "show", "run", "--json").stdout)
    assert shown["state"]["step"] == 30
    assert shown["tensors"]["exp_avg/split"] == [8, 5]


def test_verify_finds_what_is_wrong(run, armillary, tmp_path):
    assert "is whole: 732 bytes" in armillary("checkpoint", "verify", "run").stdout
    file = tmp_path / "run/checkpoints/step-00000020/g000-r00001-000.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    refused(armillary("checkpoint", "verify", file.parent), "damaged", "exp_avg_sq/whole is corrupted", "--from-step")
    done = armillary("checkpoint", "verify", file.parent, "--json")
    assert len(json.loads(done.stdout)["problems"]) == 1
    file.unlink()
    refused(armillary("checkpoint", "verify", file.parent), "g000-r00001-000.bin is missing")
    refused(armillary("checkpoint", "verify", tmp_path), "no run and no checkpoint here")


def test_any_flipped_byte_is_found(run):
    """500 of them, over all files of a checkpoint and the pointer to it."""
    store = run.path / "checkpoints"
    files = [*(store / "step-00000030").iterdir(), store / "latest"]
    places = [(file, place) for file in files for place in range(file.stat().st_size)]
    for file, place in places[:: max(1, len(places) // 500)]:
        good = file.read_bytes()
        file.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        with pytest.raises((AssertionError, ArmillaryError)):
            assert verify(run.latest())[1] == []
        file.write_bytes(good)
    assert verify(run.latest())[1] == []


def test_diff_says_which_tensors_changed_and_warns_of_the_same_bits(run, armillary, tmp_path):
    at = {step: tmp_path / f"run/checkpoints/step-{step:08d}" for step in (10, 20, 30)}
    done = armillary("checkpoint", "diff", at[10], at[20])
    assert "weight/split: 1.000e+03 at most" in done.stdout
    assert "6 of 6 tensors differ between step 10 and step 20" in done.stdout
    done = armillary("checkpoint", "diff", at[20], "run", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"steps": [20, 30], "tensors": 6, "differences": []}
    assert "WARNING: steps 20 and 30 have the same bits" in done.stderr
    assert armillary("checkpoint", "diff", "run", at[30]).returncode == 0


def test_prune_keeps_what_is_asked_for_and_what_a_resume_needs(run, armillary):
    done = armillary("checkpoint", "prune", "run", "--keep-last", 1, "--keep-every", 20, "--dry-run")
    assert "step-00000010" in done.stdout
    assert found(run).keys() == {10, 20, 30}
    run.rewind(10)
    assert latest(run) == (10, 1)
    armillary("checkpoint", "prune", "run", "--keep-last", 1)
    assert found(run).keys() == {10, 30}
    with run.locked():
        refused(armillary("checkpoint", "prune", "run", "--keep-last", 1), "being trained already")


def state(step, loss):
    return State(step=step, cursor={"block": 0, "row": 0}, data_order=1, tokens=0, loss=loss, run="", job_hash="",
                 job={}, saved_at=step)  # fmt: skip


@pytest.mark.parametrize(
    ("last", "every", "best", "steps"),
    [(0, 0, 0, [1, 2, 3, 4, 5, 6]), (1, 0, 0, [6]), (2, 0, 0, [5, 6]), (1, 2, 0, [2, 4, 6]), (1, 0, 2, [2, 3, 6]),
     (9, 0, 0, [1, 2, 3, 4, 5, 6])],
)  # fmt: skip
def test_the_keep_policy(last, every, best, steps):
    losses = {1: 5.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 3.0, 6: 9.0}
    entries = [Entry(str(step), state(step, loss)) for step, loss in losses.items()] + [
        Entry("torn", problem="damaged")
    ]
    assert kept(entries, last, every, best) == {str(step) for step in steps} | {"torn"}


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_writable(LocalStorage(tmp_path / "file" / "checkpoints"))


def test_a_resume_that_is_refused_moves_nothing(run):
    console = Console(quiet=True)
    with pytest.raises(JobError, match=r"another model\.depth"):
        resume(run.path, ["model.depth=9"], 0, console, from_step=10)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        resume(run.path, [], 0, console, from_step=15)
    assert latest(run) == (30, 2)


@pytest.mark.parametrize(("end", "said"), [("manifest.json", "damaged"), ("r00001-000.bin", "bytes where")])
def test_latest_moves_only_when_what_was_written_is_there(run, monkeypatch, end, said):
    """A storage that keeps less than it was given."""
    real = LocalStorage.put
    monkeypatch.setattr(LocalStorage, "put", lambda self, name, content: real(self, name, _less(name, end, content)))
    with pytest.raises(CheckpointError, match=said):
        save(run, 0, 40, 4, ALL, lambda: False)
    monkeypatch.undo()
    assert latest(run) == (30, 2)
    save(run, 1, 40, 5, ALL, lambda: False)
    assert latest(run) == (40, 5)
    assert found(run)[40] == 5


def _less(name, end, content):
    return content[:-4] if name.endswith(end) else content
