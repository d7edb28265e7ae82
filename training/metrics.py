"""What each rank tells Prometheus."""

import math
import time
from dataclasses import dataclass
from http.server import HTTPServer

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from armillary.errors import ClusterError
from armillary.training.config import MetricsConfig
from armillary.training.health import PHASES, heartbeat


@dataclass
class Metrics:
    """One rank's exporter: every series carries `run` and `rank`. Names are part of the interface to alerts."""

    run: str
    rank: int

    def __post_init__(self):
        self.registry = CollectorRegistry()
        self._server: HTTPServer | None = None
        self.steps = self._counter("steps", "optimizer steps done")
        self.tokens = self._counter(
            "tokens", "this rank's share of the positions trained on; the sum over ranks is the run's"
        )
        self.model_flops = self._counter("model_flops", "this rank's share of the FLOPs that the model's steps need")
        self.nonfinite_steps = self._counter("nonfinite_steps", "steps whose loss or gradient norm was not finite")
        self.spike_steps = self._counter("spike_steps", "steps whose loss or gradient norm was a spike")
        self.skipped_steps = self._counter("skipped_steps", "steps whose update was left out for that")
        self.compute_seconds = self._counter(
            "compute_seconds",
            "seconds in forward and backward passes, tensor and pipeline communication in it",
        )
        self.reduce_seconds = self._counter("reduce_seconds", "seconds in gradient reduction and the optimizer")
        self.data_wait_seconds = self._counter("data_wait_seconds", "seconds waiting for a batch")
        self.checkpoint_seconds = self._counter("checkpoint_seconds", "seconds that training stood still for a save")
        self.checkpoint_write_seconds = self._counter(
            "checkpoint_write_seconds",
            "seconds from the beginning of a save to its end, mostly in the background",
        )
        self.checkpoint_failures = self._counter("checkpoint_failures", "checkpoints that could not be saved")
        self.restarts = self._counter("restarts", "generations of this run before this one")
        self.loss = self._gauge("loss", "mean cross entropy of the last step's learned tokens, nats")
        self.grad_norm = self._gauge("grad_norm", "global gradient norm of the last step, before clipping")
        self.learning_rate = self._gauge("learning_rate", "learning rate of the last step")
        self.mfu = self._gauge("mfu", "model FLOPs utilisation of the last step, of the device's dense peak; if known")
        self.checkpoint_time = self._gauge(
            "checkpoint_last_success_timestamp_seconds", "when the last checkpoint was saved (Unix time)"
        )
        self.checkpoint_bytes = self._gauge("checkpoint_bytes", "what this rank wrote of the last checkpoint")
        self.checkpoint_interval = self._gauge("checkpoint_interval_seconds", "expected seconds between checkpoints")
        self.probe_seconds = self._gauge("probe_seconds", "seconds of a piece of work that waits for no other rank")
        self.progress_time = self._gauge("progress_timestamp_seconds", "when this rank last moved (Unix time)")
        self.progress_time.set_function(lambda: time.time() - heartbeat.silent)
        self._verdicts = Counter("armillary_train_verdicts", "what went wrong in the run, by kind; rank 0 counts",
                                 ("run", "rank", "kind"), registry=self.registry)  # fmt: skip
        phases = Gauge("armillary_train_phase", "1 for the phase that this rank is in",
                             ("run", "rank", "phase"), registry=self.registry)  # fmt: skip
        self._source_losses = Gauge("armillary_train_source_loss", "loss over one source's tokens, in its last step",
                                    ("run", "rank", "source"), registry=self.registry)  # fmt: skip
        self.checkpoint_time.set(time.time())  # the age of a run's first checkpoint counts from its start
        self.checkpoint_interval.set(math.nan)  # until a step tells how long they take: no alert compares with it
        self.mfu.set(math.nan)
        self.probe_seconds.set(math.nan)
        for phase in PHASES:
            gauge = phases.labels(self.run, str(self.rank), phase)
            gauge.set_function(lambda phase=phase: heartbeat.phase == phase)

    def verdict(self, kind: str, count: int = 1) -> None:
        self._verdicts.labels(self.run, str(self.rank), kind).inc(count)

    def source_loss(self, source: str, loss: float) -> None:
        self._source_losses.labels(self.run, str(self.rank), source).set(loss)

    def serve(self, config: MetricsConfig) -> str:
        """Answer on config.host; returns "host:port". ClusterError where the port is taken."""
        port = config.port + self.rank if config.port else 0
        try:
            self._server, _ = start_http_server(port, config.host, self.registry)
        except (OSError, OverflowError) as error:
            raise ClusterError(
                f"the metrics of rank {self.rank} cannot be served: {error}",
                f"{config.host}:{port}",
                "set metrics.port to a free range, or to 0 for any free port",
            ) from None
        return f"{config.host}:{self._server.server_port}"

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"armillary_train_{name}", text, ("run", "rank"), registry=self.registry).labels(
            self.run, str(self.rank)
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"armillary_train_{name}", text, ("run", "rank"), registry=self.registry).labels(
            self.run, str(self.rank)
        )
