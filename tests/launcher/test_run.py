import json
import os
import socket
import threading

import pytest

from armillary.data_pipeline.shards import Manifest
from armillary.errors import CheckpointError, JobError
from armillary.launcher import local
from armillary.launcher.job import resolve
from armillary.launcher.run import LOCK_SECONDS, Run
from tests.chaos.saves import latest, save
from tests.data_pipeline.test_tokenizer import TOKENIZER

DATA = Manifest(
    format=1,
    arrow_schema="",
    built_from={},
    tokenizer=TOKENIZER.to_json(),
    tokenizer_xxh3="",
    sources={},
    reports={},
    substrings={},
).sealed()


@pytest.fixture
def run(tables, tmp_path):
    return Run.create(tmp_path / "run", resolve(tables | {"parallel": {"tensor": 2}}, "test"), DATA)


def test_a_run_is_made_once(run, tables):
    with pytest.raises(JobError, match="exists already"):
        Run.create(run.path, resolve(tables, "test"), DATA)
    assert Run.open(run.path) == run
    assert run.data() == DATA
    assert run.tokenizer().encode("blue") == TOKENIZER.encode("blue")
    (run.path / "data_manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run.tokenizer()


def test_nothing_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="no run here"):
        Run.open(tmp_path)
    with pytest.raises(CheckpointError, match="no run here"):
        Run.open(tmp_path / "missing")


def test_a_run_without_checkpoint_says_so(run):
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        run.latest()
    (run.path / "checkpoints").mkdir()
    for text in ("../../elsewhere 0123456789abcdef\n", "step-00000001 0123456789abcdef\n", "", "\xff"):
        (run.path / "checkpoints" / "latest").write_text(text)
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            run.latest()


def test_overrides_change_the_layout_and_the_world_size_follows(run):
    assert run.job().parallel.world_size == 2
    assert run.job(["parallel.tensor=1"]).parallel.world_size == 1
    assert run.job(["parallel.data=2"]).parallel.world_size == 4
    job = run.job(["parallel.world_size=4"]).parallel
    assert (job.data, job.tensor, job.world_size) == (2, 2, 4)
    with pytest.raises(JobError, match="world_size=3"):
        run.job(["parallel.world_size=3"])


def test_an_event_after_a_torn_line_is_not_lost(run):
    run.event("step", step=1, loss=5.0)
    with open(run.events_file, "a") as file:
        file.write('{"event": "step", "st')
    run.event("launch", from_step=1)
    run.event("checkpoint", step=2)
    assert [e["event"] for e in run.events()] == ["step", "launch", "checkpoint"]
    assert [e["step"] for e in run.events("checkpoint")] == [2]


def test_a_launch_drops_the_steps_that_its_checkpoint_does_not_hold(run):
    run.event("launch", from_step=0)
    for step in range(1, 36):
        run.event("step", step=step, loss=1.0)
    run.event("launch", from_step=20)
    for step in range(21, 31):
        run.event("step", step=step, loss=2.0)
    assert [(e["step"], e["loss"]) for e in run.curve()] == [(s, 1.0 if s <= 20 else 2.0) for s in range(1, 31)]
    run.event("launch", from_step=0)
    assert run.curve() == []


def test_one_driver_at_a_time(run):
    with run.locked(), pytest.raises(JobError, match="being trained already"), run.locked():
        pass
    with run.locked():
        pass


def test_targets_keep_their_series_when_ports_change(run):
    for port in (5001, 6001):
        run.write_targets("127.0.0.1:5000", [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"])
        targets = json.loads(run.targets_file.read_text())
        assert [t["targets"] for t in targets] == [[f"127.0.0.1:{n}"] for n in (5000, port, port + 1)]
        assert [t["labels"]["instance"] for t in targets] == ["run/driver", "run/0", "run/1"]


def test_a_run_held_on_another_machine_is_not_ended_from_here(run):
    assert run.driver() is None
    with run.locked():
        assert run.driver() == {"host": socket.gethostname(), "pid": os.getpid(), "here": True}
        held = json.loads((run.path / "lock").read_text())
        for change in ({"host": "elsewhere"}, {"began": held["began"] - 1}, {"pid": 1}):
            (run.path / "lock").write_text(json.dumps(held | change))
            assert run.driver()["here"] is False
            with pytest.raises(JobError, match="its driver is a process on"):
                local.cancel(run)
        with pytest.raises(JobError, match="being trained already"), run.locked():
            pass
    assert run.driver() is None


def test_only_a_start_that_was_cut_off_is_removed(tmp_path):
    begun = Run(tmp_path / "begun")
    begun.remove_begun()
    begun.path.mkdir()
    (begun.path / "data_manifest.json").write_text("{}")
    begun.remove_begun()
    assert not begun.path.exists()
    begun.path.mkdir()
    (begun.path / "thesis.tex").write_text("years of work")
    with pytest.raises(JobError, match="no run"):
        begun.remove_begun()
    assert (begun.path / "thesis.tex").exists()


def test_generations_count_up(run):
    numbers = [run.new_generation() for _ in range(3)]
    assert [number for number, _ in numbers] == [0, 1, 2]
    assert [folder.name for _, folder in numbers] == ["000", "001", "002"]


def test_generations_count_on_where_the_directory_is_a_new_one(tables, tmp_path):
    job = resolve(tables | {"checkpoint": {"path": str(tmp_path / "store")}}, "test")
    run = Run.create(tmp_path / "run", job, DATA)
    for _ in range(2):
        number, _ = run.new_generation()
        run.event("launch", generation=number, from_step=0)
    save(run, 1, 10, 1, job.checkpoint, lambda: False)
    run.remove()
    restored = Run.restored(tmp_path / "run", job)
    assert restored.new_generation()[0] == 2


def test_who_is_patient_gets_the_run_when_its_driver_has_ended(run):
    held, done = threading.Event(), threading.Event()

    def hold():
        with run.locked():
            held.set()
            done.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(20)
    threading.Timer(LOCK_SECONDS + 0.5, done.set).start()
    with run.locked(patience=20):
        assert done.is_set()
    holder.join()


def test_what_a_killed_launch_left_half_saved_is_gone_with_the_next(run):
    half = run.path / "checkpoints" / "step-00000001"
    half.mkdir(parents=True)
    for name in ("g000-r00000-000.bin", ".g000-r00001-000.bin.tmp", "g000-r00000.json"):
        (half / name).write_bytes(b"something")
    theirs = [half / "notes.txt", run.path / "checkpoints" / "images" / "g000-r00000.json"]
    theirs[1].parent.mkdir()
    for file in theirs:
        file.write_text("somebody else's")
    run.new_generation()
    assert sorted(run.store().sizes()) == ["images/g000-r00000.json", "step-00000001/notes.txt"]


def test_two_runs_do_not_share_a_folder_of_checkpoints(tables, tmp_path):
    job = resolve(tables | {"checkpoint": {"path": str(tmp_path / "store")}}, "test")
    first = Run.create(tmp_path / "a" / "run", job, DATA)
    Run.create(tmp_path / "b" / "run", job, DATA).remove()  # nothing is saved yet
    save(first, 0, 10, 1, job.checkpoint, lambda: False)
    with pytest.raises(JobError, match="another run has its checkpoints there"):
        Run.create(tmp_path / "b" / "run", job, DATA)
    assert not (tmp_path / "b" / "run").exists()
    assert latest(first) == (10, 1)
