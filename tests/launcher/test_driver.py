"""That a driver says how it ended, whatever came between."""

import time
from types import SimpleNamespace

import pytest

from armillary.data_pipeline.folder import LocalFolder
from armillary.data_pipeline.shards import read_manifest
from armillary.errors import ClusterError, PreemptedError
from armillary.launcher.driver import Driver
from armillary.launcher.job import resolve
from armillary.launcher.local import phase, standing
from armillary.launcher.run import Run
from armillary.launcher.waiting import Stop

NO_MACHINES = SimpleNamespace(nodes=lambda: [], keep=lambda ids: None, fits=lambda job: True)


@pytest.fixture
def driver(tables, shards, tmp_path):
    """Of a run on a cluster without machines, which waits for them for two seconds."""
    job = resolve(tables | {"cluster": {"address": "h:1", "start_timeout": 2}}, "test")
    run = Run.create(tmp_path / "run", job, read_manifest(LocalFolder(shards)))
    return Driver(run, job, 10, NO_MACHINES, SimpleNamespace(say=lambda text: None), Stop(), "")


def test_who_makes_room_before_it_has_begun_has_not_failed(driver):
    driver._stop.count, driver._stop.terminated_at = 1, time.monotonic()
    with pytest.raises(PreemptedError, match="between two launches"):
        driver.drive(None, fewer=False)
    assert [event["event"] for event in driver._run.events()] == ["waiting", "ended"]
    assert phase(standing(driver._run), None)[0] == "suspended"


def test_who_finds_no_machines_has_failed(driver):
    with pytest.raises(ClusterError):
        driver.drive(None, fewer=False)
    assert [event["event"] for event in driver._run.events()] == ["waiting", "failed"]
    name, reason = phase(standing(driver._run), None)
    assert name == "failed"
    assert "there is room for 0" in reason
