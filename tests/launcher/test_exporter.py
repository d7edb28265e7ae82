"""Many exporters on one port."""

import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from prometheus_client import generate_latest
from prometheus_client.registry import CollectorRegistry

from armillary.launcher import exporter
from armillary.launcher.exporter import Together
from armillary.training.config import MetricsConfig
from armillary.training.layout import Layout
from armillary.training.metrics import Metrics, sign_in
from tests.conftest import free_port


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Two that answer, and have signed into tmp_path/metrics."""
    (tmp_path / "metrics").mkdir()
    monkeypatch.setenv("ARMILLARY_METRICS", str(tmp_path / "metrics"))
    made = [Metrics("run", rank, Layout(data=2), 0) for rank in range(2)]
    for rank, metrics in enumerate(made):
        metrics.steps.inc(rank + 1)
        metrics.step_duration.observe(0.3)
        metrics.source_loss('a "quoted" \\ name\n', 1.0)
        metrics.serve(MetricsConfig())
    yield made
    for metrics in made:
        metrics.close()


def together(folder) -> str:
    registry = CollectorRegistry()
    registry.register(Together(folder))
    return generate_latest(registry).decode()


def lines(text: str) -> list[str]:
    """Of samples whose values stay."""
    return sorted(line for line in text.splitlines() if not re.match("#|.*(timestamp|memory)", line))


def test_nothing_is_lost_or_changed_and_each_family_is_there_once(ranks, tmp_path):
    text = together(tmp_path / "metrics")
    alone = [generate_latest(metrics.registry).decode() for metrics in ranks]
    assert lines(text) == sorted(lines(alone[0]) + lines(alone[1]))
    types = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert sorted(types) == sorted({line for one in alone for line in one.splitlines() if line.startswith("# TYPE")})


def test_who_is_gone_or_does_not_answer_is_left_out(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "ASK_SECONDS", 0.5)
    sign_in("gone", f"127.0.0.1:{free_port()}")
    sign_in("without")
    with socket.create_server(("127.0.0.1", 0)) as stuck:
        sign_in("stuck", f"127.0.0.1:{stuck.getsockname()[1]}")
        began = time.monotonic()
        found = re.findall(r'steps_total{.*rank="(\d)"', together(tmp_path / "metrics"))
        assert sorted(found) == ["0", "1"]
        assert time.monotonic() - began < 5


def test_an_answer_that_is_cut_off_is_left_out(ranks, tmp_path):
    def answer(server):
        connection, _ = server.accept()
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\narmillary_train_steps_total{ra")
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        sign_in("cut", f"127.0.0.1:{server.getsockname()[1]}")
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        assert len(re.findall("steps_total{", together(tmp_path / "metrics"))) == 2


def test_the_pods_command_answers_until_it_is_told_to_end_and_nobody_is_left_to_answer_for(ranks, tmp_path):
    port = free_port()
    words = ["metrics", "--folder", tmp_path / "metrics", "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", "armillary.launcher.pod", *words])
    try:
        deadline = time.monotonic() + 60
        while len(re.findall("steps_total{", exporter.ask(f"127.0.0.1:{port}"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        time.sleep(3 * exporter.LOOK_SECONDS)
        assert "steps_total{" in exporter.ask(f"127.0.0.1:{port}")
        for metrics in ranks:
            metrics.close()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
