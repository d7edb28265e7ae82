import json
import os
import time
import urllib.request

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from armillary.errors import ClusterError
from armillary.training.config import MetricsConfig
from armillary.training.health import PHASES, heartbeat
from armillary.training.layout import Layout
from armillary.training.metrics import Metrics
from tests.conftest import free_port


def scrape(address: str) -> dict[str, list]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
        families = text_string_to_metric_families(reply.read().decode())
        samples = [sample for family in families for sample in family.samples]
    found: dict[str, list] = {}
    for sample in samples:
        found.setdefault(sample.name, []).append(sample)
    return found


def test_every_series_says_where_its_rank_stands():
    metrics = Metrics("the-run", 5, Layout(tensor=2, pipeline=2, data=2), 3)
    address = metrics.serve(MetricsConfig())
    try:
        assert address.startswith("127.0.0.1:")
        metrics.steps.inc()
        heartbeat.enter("compute")
        metrics.source_loss("pydoc", 1.5)
        metrics.samples("pydoc", 7)
        found = scrape(address)
        place = {"run": "the-run", "rank": "5", "tp": "1", "pp": "1", "dp": "0", "generation": "3"}
        assert all(place.items() <= sample.labels.items() for samples in found.values() for sample in samples)
        assert found["armillary_train_steps_total"][0].value == 1
        phases = {s.labels["phase"]: s.value for s in found["armillary_train_phase"]}
        (source_loss,) = found["armillary_train_source_loss"]
        assert source_loss.labels == place | {"source": "pydoc"}
        assert source_loss.value == 1.5
        assert found["armillary_train_samples_total"][0].value == 7
        assert phases == {phase: float(phase == "compute") for phase in PHASES}
        assert 0 <= time.time() - found["armillary_train_progress_timestamp_seconds"][0].value < 60
        assert not [name for name in found if name.endswith("_created")]
    finally:
        metrics.close()


def test_each_rank_takes_its_own_port_and_a_taken_one_is_refused():
    port = free_port()
    first = Metrics("run", 0, Layout(), 0)
    assert first.serve(MetricsConfig(port=port)) == f"127.0.0.1:{port}"
    try:
        with pytest.raises(ClusterError, match="cannot be served"):
            Metrics("run", 0, Layout(), 0).serve(MetricsConfig(port=port))
        with pytest.raises(ClusterError, match="rank 1"):
            Metrics("run", 1, Layout(data=2), 0).serve(MetricsConfig(port=port - 1))
    finally:
        first.close()


def test_an_address_is_in_the_folder_as_long_as_it_answers(tmp_path, monkeypatch):
    (tmp_path / "metrics").mkdir()
    monkeypatch.setenv("ARMILLARY_METRICS", str(tmp_path / "metrics"))
    metrics = Metrics("run", 0, Layout(), 0)
    address = metrics.serve(MetricsConfig())
    signed = json.loads((tmp_path / "metrics" / "rank-00000").read_text())
    assert signed == {"pid": os.getpid(), "began": psutil.Process().create_time(), "address": address}
    metrics.close()
    assert not list((tmp_path / "metrics").iterdir())
