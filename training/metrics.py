"""What each rank tells Prometheus of itself; what is the whole run's, launcher.run_metrics tells."""

import json
import math
import os
import time
from http.server import HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import prometheus_client
import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from armillary.errors import ClusterError
from armillary.files import write_whole
from armillary.training.config import MetricsConfig
from armillary.training.health import PHASES, heartbeat
from armillary.training.layout import Layout

if TYPE_CHECKING:
    import torch  # whose import takes seconds, which a driver need not have

LABELS = ("run", "rank", "tp", "pp", "dp", "generation")
STEP_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)  # seconds
CHECKPOINT_BUCKETS = (1, 3, 10, 30, 60, 120, 300, 600, 1800)

prometheus_client.disable_created_metrics()  # a series more for each counter, which nobody asks for

Kind = TypeVar("Kind", Counter, Gauge, Histogram)


class Metrics:
    """One rank's exporter. Every series has LABELS; a new generation's are new series, which begin at 0.

    Names are part of the interface to alerts and dashboards: docs/metrics.md, made by launcher.metric_docs, has all.
    """

    def __init__(self, run: str, rank: int, layout: Layout, generation: int, device: "torch.device | None" = None):
        place = layout.coordinates(rank)
        self._labels = run, rank, place.tensor, place.pipeline, place.data, generation
        self.rank, self.registry = rank, CollectorRegistry()
        self._server: HTTPServer | None = None
        self._file: Path | None = None
        self._counters()
        self._gauges(device)

    def _counters(self) -> None:
        self.steps = self._one(Counter, "steps", "optimizer steps done, skipped ones too")
        self.tokens = self._one(
            Counter, "tokens", "this rank's share of the positions trained on; the sum over ranks is the run's"
        )
        self._samples = self._of(
            Counter, "samples", "pieces of documents trained on, by source; of ranks that share rows one counts",
            "source",
        )  # fmt: skip
        self.model_flops = self._one(
            Counter, "model_flops", "this rank's share of the FLOPs that the model's steps need"
        )
        self.data_wait_seconds = self._one(Counter, "data_wait_seconds", "seconds waiting for a batch")
        self.compute_seconds = self._one(
            Counter, "compute_seconds",
            "seconds in forward and backward passes, tensor and pipeline communication in it",
        )  # fmt: skip
        self.collective_wait_seconds = self._one(
            Counter, "collective_wait_seconds",
            "seconds from the end of this rank's passes until all ranks had ended theirs: least on the slowest rank",
        )  # fmt: skip
        self.reduce_seconds = self._one(
            Counter, "reduce_seconds", "seconds in gradient reduction and the optimizer, after all ranks had come to it"
        )
        self.checkpoint_seconds = self._one(
            Counter, "checkpoint_seconds", "seconds that training stood still for a save"
        )
        self.checkpoint_bytes = self._one(Counter, "checkpoint_bytes", "bytes of checkpoints that this rank wrote")
        self.checkpoint_failures = self._one(Counter, "checkpoint_failures", "checkpoints that could not be saved")
        self.step_duration = self._one(
            Histogram,
            "step_duration_seconds",
            "of a step, from asking for its batch to the end of its update",
            buckets=STEP_BUCKETS,
        )
        self.checkpoint_duration = self._one(
            Histogram, "checkpoint_duration_seconds",
            "from the beginning of a save to its commit, mostly in the background", buckets=CHECKPOINT_BUCKETS,
        )  # fmt: skip

    def _gauges(self, device: "torch.device | None") -> None:
        self.loss = self._one(Gauge, "loss", "mean cross entropy of the last step's learned tokens, nats")
        self._source_losses = self._of(
            Gauge, "source_loss", "loss over one source's tokens, in its last step", "source"
        )
        self.grad_norm = self._one(Gauge, "grad_norm", "global gradient norm of the last step, before clipping")
        self.learning_rate = self._one(Gauge, "learning_rate", "learning rate of the last step")
        self.mfu = self._one(Gauge, "mfu", "model FLOPs utilisation of the last step, of the device's dense peak; NaN "
                             "where that is not known")  # fmt: skip
        self.data_block = self._one(Gauge, "data_cursor_block", "block of the data that the next step begins in")
        self.data_row = self._one(Gauge, "data_cursor_row", "row of that block")
        self.checkpoint_interval = self._one(
            Gauge, "checkpoint_interval_seconds", "expected seconds between checkpoints; NaN until a step is done"
        )
        self.probe_seconds = self._one(
            Gauge, "probe_seconds", "seconds of a piece of work that waits for no other rank, every twenty steps"
        )
        progress = self._one(Gauge, "progress_timestamp_seconds", "when this rank last moved (Unix time)")
        progress.set_function(lambda: time.time() - heartbeat.silent)
        host = self._one(Gauge, "host_memory_bytes", "resident memory of this rank's process")
        host.set_function(lambda: psutil.Process().memory_info().rss)
        gpu = self._one(Gauge, "gpu_memory_bytes", "memory of the GPU that PyTorch holds for this rank; 0 without one")
        if device is not None and device.type == "cuda":
            import torch

            gpu.set_function(lambda: torch.cuda.memory_reserved(device))
        phases = self._of(Gauge, "phase", "1 for the phase that this rank is in", "phase")
        for phase in PHASES:
            phases.labels(*self._labels, phase).set_function(lambda phase=phase: heartbeat.phase == phase)
        for unknown in (self.mfu, self.checkpoint_interval, self.probe_seconds):
            unknown.set(math.nan)  # no alert compares with it

    def source_loss(self, source: str, loss: float) -> None:
        self._source_losses.labels(*self._labels, source).set(loss)

    def samples(self, source: str, count: int) -> None:
        self._samples.labels(*self._labels, source).inc(count)

    def serve(self, config: MetricsConfig) -> str:
        """Answer on config.host; returns "host:port". ClusterError where the port is taken."""
        port = config.port + self.rank if config.port else 0
        self._server, address = serve(self.registry, config, port, f"rank {self.rank}")
        self._file = sign_in(f"rank-{self.rank:05d}", address)
        return address

    def close(self) -> None:
        sign_out(self._file)
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _of(self, kind: type[Kind], name: str, text: str, *more: str, **options) -> Kind:
        return kind(f"armillary_train_{name}", text, (*LABELS, *more), registry=self.registry, **options)

    def _one(self, kind: type[Kind], name: str, text: str, **options) -> Kind:
        return self._of(kind, name, text, **options).labels(*self._labels)


def serve(registry: CollectorRegistry, config: MetricsConfig, port: int, whose: str) -> tuple[HTTPServer, str]:
    """(the server, its "host:port"), on config.host; port: 0 is any. ClusterError where the port is taken."""
    try:
        server, _ = start_http_server(port, config.host, registry)
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"the metrics of {whose} cannot be served: {error}", f"{config.host}:{port}",
            "set metrics.port to a free range, or to 0 for any free port",
        ) from None  # fmt: skip
    return server, f"{config.host}:{server.server_port}"


def sign_in(name: str, address: str = "") -> Path | None:
    """In a pod, say to its other containers that this process is there, and where it serves metrics: a file in the
    folder ARMILLARY_METRICS, for launcher.exporter and launcher.pod. Elsewhere nothing is done."""
    folder = os.environ.get("ARMILLARY_METRICS")
    if not folder:
        return None
    path = Path(folder) / name
    began = psutil.Process().create_time()
    write_whole(path, json.dumps({"pid": os.getpid(), "began": began, "address": address}))
    return path


def sign_out(file: Path | None) -> None:
    """The process goes; file: what `sign_in` returned."""
    if file is not None:
        file.unlink(missing_ok=True)
