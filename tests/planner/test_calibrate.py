"""A calibration of this machine, with sizes that take no time: the file is one that the planner takes."""

import pytest

from armillary.planner import calibrate
from armillary.planner.hardware import cluster, read_gpu


def test_what_is_measured_is_a_hardware_file(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "MATRICES", {"cpu": (64,)})
    monkeypatch.setattr(calibrate, "COPIED", {"cpu": 2**20})
    monkeypatch.setattr(calibrate, "ATTENDED", {"cpu": (64, 2, 32)})
    monkeypatch.setattr(calibrate, "LEAST_SECONDS", 0.01)
    path = tmp_path / "folder" / "here.toml"
    said = []
    calibrate.write(calibrate.measure(said.append), path)
    gpu = read_gpu(path)
    machine = cluster(gpu, 2)
    assert not machine.triton
    assert machine.matmul_share == 1
    assert machine.network == machine.link
    assert machine.bf16 > 0 < machine.link.bytes_s
    assert all("measured on" in figure.source for figure in (gpu.bf16_tflops, gpu.memory_tb_s, gpu.kernel_us))
    assert len(said) == 5


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibrate.default_path().parent == tmp_path / "armillary" / "hardware"


def test_a_rate_is_work_over_time():
    calls = []
    seconds = calibrate._seconds(lambda: calls.append(1), "cpu")
    assert 0 < seconds < 1e-4
    assert len(calls) * seconds == pytest.approx(calibrate.LEAST_SECONDS, rel=2)
