import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from armillary.errors import ClusterError
from armillary.training.config import MetricsConfig
from armillary.training.health import PHASES, heartbeat
from armillary.training.metrics import Metrics
from tests.conftest import free_port

# What the alert rules of operators are written against.
NAMES = {
    "armillary_train_steps_total",
    "armillary_train_tokens_total",
    "armillary_train_model_flops_total",
    "armillary_train_mfu",
    "armillary_train_phase",
    "armillary_train_nonfinite_steps_total",
    "armillary_train_spike_steps_total",
    "armillary_train_skipped_steps_total",
    "armillary_train_progress_timestamp_seconds",
    "armillary_train_probe_seconds",
    "armillary_train_compute_seconds_total",
    "armillary_train_data_wait_seconds_total",
    "armillary_train_checkpoint_last_success_timestamp_seconds",
    "armillary_train_checkpoint_interval_seconds",
    "armillary_train_checkpoint_failures_total",
    "armillary_train_restarts_total",
}


def scrape(address: str) -> dict[str, list]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
        families = text_string_to_metric_families(reply.read().decode())
        samples = [sample for family in families for sample in family.samples]
    found: dict[str, list] = {}
    for sample in samples:
        found.setdefault(sample.name, []).append(sample)
    return found


def test_serves_every_name_with_run_and_rank():
    metrics = Metrics("the-run", 3)
    address = metrics.serve(MetricsConfig())
    try:
        assert address.startswith("127.0.0.1:")
        metrics.steps.inc()
        heartbeat.enter("compute")
        metrics.source_loss("pydoc", 1.5)
        found = scrape(address)
        assert set(found) >= NAMES
        assert all(s.labels["run"] == "the-run" and s.labels["rank"] == "3" for name in NAMES for s in found[name])
        assert found["armillary_train_steps_total"][0].value == 1
        phases = {s.labels["phase"]: s.value for s in found["armillary_train_phase"]}
        (source_loss,) = found["armillary_train_source_loss"]
        assert source_loss.labels == {"run": "the-run", "rank": "3", "source": "pydoc"}
        assert source_loss.value == 1.5
        assert phases == {phase: float(phase == "compute") for phase in PHASES}
        assert 0 <= time.time() - found["armillary_train_progress_timestamp_seconds"][0].value < 60
        metrics.verdict("spike", 2)
        (spikes,) = scrape(address)["armillary_train_verdicts_total"]
        assert (spikes.labels["kind"], spikes.value) == ("spike", 2)
    finally:
        metrics.close()


def test_each_rank_takes_its_own_port_and_a_taken_one_is_refused():
    port = free_port()
    first = Metrics("run", 0)
    assert first.serve(MetricsConfig(port=port)) == f"127.0.0.1:{port}"
    try:
        with pytest.raises(ClusterError, match="cannot be served"):
            Metrics("run", 0).serve(MetricsConfig(port=port))
        with pytest.raises(ClusterError, match="rank 1"):
            Metrics("run", 1).serve(MetricsConfig(port=port - 1))
    finally:
        first.close()
