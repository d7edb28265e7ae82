"""Both kinds of storage do the same, also where S3 fails for a while."""

import contextlib
import itertools
import json
import os

import pytest

from armillary.errors import CheckpointError
from armillary.launcher.job import resolve
from armillary.launcher.run import Run
from armillary.storage import RemoteStorage, check_writable, open_storage
from armillary.training.checkpoint import saver, snapshot
from armillary.training.config import CheckpointConfig
from tests.chaos.disk import Killed
from tests.chaos.saves import found, latest, save
from tests.conftest import refused
from tests.launcher.test_run import DATA
from tests.s3 import s3_server

BIG = os.urandom(1 << 16)


@pytest.fixture(scope="module")
def server():
    with s3_server() as proxy:
        proxy.methods = ("GET", "PUT", "POST", "DELETE")
        yield proxy


@pytest.fixture
def proxy(server):
    server.faults = []
    yield server
    server.faults = []


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path, proxy):
    name = request.node.name.translate(str.maketrans("[]", "--"))
    location = tmp_path / "folder" if request.param == "local" else f"s3://bucket/{name}"
    return open_storage(location, CheckpointError)


def test_what_is_put_is_there_until_it_is_removed(storage):
    assert storage.sizes() == {}
    storage.put("a/one", BIG)
    storage.put("a/one", memoryview(BIG)[:100])
    storage.put("two", b"")
    assert storage.sizes() == {"a/one": 100, "two": 0}
    assert storage.folder("a").sizes() == {"one": 100}
    assert bytes(storage.read("a/one")) == BIG[:100]
    assert bytes(storage.folder("a").read("one", 10, 20)) == BIG[10:30]
    assert bytes(storage.read("a/one", 90, 20)) == BIG[90:100]
    assert storage.at("a/one").endswith("/a/one")
    for _ in range(2):
        storage.remove("a/one")
    assert storage.sizes() == {"two": 0}
    with pytest.raises(FileNotFoundError):
        storage.read("a/one")
    check_writable(storage)
    assert storage.sizes() == {"two": 0}


@pytest.mark.parametrize("fault", ["500", "gone", "cut", "slow"])
def test_what_passes_is_tried_again(proxy, fault):
    far = open_storage(f"s3://bucket/{fault}", CheckpointError)
    for number in range(3):
        proxy.faults = [fault] * 2
        far.put(f"file-{number}", BIG)
        proxy.faults = [fault] * 2
        assert bytes(far.read(f"file-{number}", 5, 1000)) == BIG[5:1005]
    proxy.faults = [fault] * 2
    assert len(far.sizes()) == 3


def test_what_does_not_pass_is_said(proxy, monkeypatch):
    far = open_storage("s3://bucket/down", CheckpointError)
    proxy.faults = ["500"] * 1000
    with pytest.raises(CheckpointError, match="could not be written, in 5 tries"):
        far.put("file", BIG)
    proxy.faults = []
    assert far.sizes() == {}
    with pytest.raises(CheckpointError, match="no such bucket"):
        check_writable(open_storage("s3://nowhere/folder", CheckpointError))
    with pytest.raises(CheckpointError, match="password in it"):
        open_storage("s3://me:secret@bucket", CheckpointError)
    with pytest.raises(CheckpointError, match="no such storage"):
        open_storage("warp://bucket", CheckpointError)


def far_run(tables, tmp_path, name) -> Run:
    keep = {"checkpoint": {"path": "s3://bucket/runs", "keep_last": 2}}
    return Run.create(tmp_path / name, resolve(tables | keep, "test"), DATA)


def test_a_save_to_s3_under_faults_is_whole(proxy, tables, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "FILE_BYTES", 256)
    run = far_run(tables, tmp_path, "faults")
    for number, fault in enumerate(("500", "gone", "cut", "500")):
        proxy.faults = [None, fault] * 6
        save(run, 0, 10 * (number + 1), number + 1, CheckpointConfig(keep_last=2), lambda: False)
    proxy.faults = []
    assert found(run) == {30: 3, 40: 4}
    assert latest(run) == (40, 4)
    assert run.latest().at() == "s3://bucket/runs/faults/step-00000040"


class Mortal:
    """A storage that hears nothing from the put or removal number `end` on."""

    def __init__(self, end: int):
        self.dead, self._numbers, self._end = False, itertools.count(1), end

    def __call__(self, real):
        def act(*args):
            if next(self._numbers) >= self._end:
                self.dead = True
                raise Killed
            return real(*args)

        return act


def test_a_save_killed_at_any_put_or_removal_loses_nothing(proxy, tables, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "FILE_BYTES", 256)
    monkeypatch.setattr(saver, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    keep = CheckpointConfig(keep_last=2)
    for end in itertools.count(1, 4):
        run, mortal = far_run(tables, tmp_path, f"run-{end}"), Mortal(end)
        for step in (10, 20):
            save(run, 0, step, step // 10, keep, lambda: False)
        with monkeypatch.context() as patch:
            for name in ("put", "remove"):
                patch.setattr(RemoteStorage, name, mortal(getattr(RemoteStorage, name)))
            with contextlib.suppress(Killed):
                save(run, 1, 30, 3, keep, lambda mortal=mortal: mortal.dead)
        held, now = found(run), latest(run)
        assert now in ((20, 2), (30, 3))
        assert held.items() >= ({(10, 1), (20, 2)} if now[0] == 20 else {(20, 2), (30, 3)})
        run.new_generation()
        save(run, 2, 40, 4, keep, lambda: False)
        assert latest(run) == (40, 4)
        if not mortal.dead:
            break
    assert end > 15


def test_a_run_saves_to_s3_and_goes_on_from_there(proxy, job_file, tmp_path, armillary):
    where = ["checkpoint.path=s3://bucket/e2e", "checkpoint.every=2", "checkpoint.keep_last=2"]
    first = armillary("train", job_file, *where, "--stop-at", 3, "--run-dir", "run", "--json")
    assert json.loads(first.stdout)["checkpoint"] == "s3://bucket/e2e/run/step-00000003"
    # The machine is lost, and with it the run's directory: what lies beside the checkpoints is enough.
    (tmp_path / "run").rename(tmp_path / "lost")
    lost = Run(tmp_path / "lost")
    restored = Run.restored(tmp_path / "run", lost.job())
    assert restored.curve() == lost.curve()
    assert (restored.job(), restored.data(), restored.latest_step()) == (lost.job(), lost.data(), 3)
    assert Run.restored(tmp_path / "other", lost.job()) is None
    second = armillary("resume", "run", "parallel.tensor=2", "--json")
    assert json.loads(second.stdout)["steps"] == 6, second.stderr
    rows = json.loads(armillary("checkpoint", "list", "run", "--json").stdout)["checkpoints"]
    assert [(row["step"], row["latest"]) for row in rows] == [(4, False), (6, True)]
    assert "is whole" in armillary("checkpoint", "verify", rows[0]["path"]).stdout
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_where_nothing_can_be_saved_nothing_starts(proxy, job_file, tmp_path, armillary):
    for path, word in (("s3://nowhere/runs", "no such bucket"), (f"{job_file}/runs", "cannot be written")):
        refused(armillary("train", job_file, f"checkpoint.path={path}", "--run-dir", "run"), word)
        assert not (tmp_path / "run").exists()
