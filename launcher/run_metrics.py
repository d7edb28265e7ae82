"""What the driver tells Prometheus of the whole run: what its events come to, through every launch of its ranks."""

import collections
import contextlib
import threading
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from armillary.launcher.follow import Reader
from armillary.launcher.run import Run
from armillary.launcher.standing import STATES, Standing
from armillary.training.config import MetricsConfig
from armillary.training.health import KINDS
from armillary.training.metrics import serve, sign_in, sign_out

LABELS = ("run",)
METRICS = {  # name: (type, more labels, meaning)
    "steps_planned": ("gauge", (), "training.steps: the last step"),
    "step": ("gauge", (), "the last step that counts: it goes back where a run starts again from a checkpoint"),
    "tokens": ("gauge", (), "positions that the weights have seen"),
    "state": ("gauge", ("state",), f"1 for the state that the run is in: {', '.join(STATES)}"),
    "ranks": ("gauge", (), "ranks of the launch at work"),
    "ranks_planned": ("gauge", (), "parallel.world_size: ranks that the run would have if there were machines for all"),
    "launches": ("counter", (), "launches of the ranks, the first one too"),
    "restarts": ("counter", (), "launches that a fault made necessary"),
    "verdicts": ("counter", ("kind",), "what went wrong, by kind: see docs/operations.md"),
    "nonfinite_steps": ("counter", (), "steps whose loss or gradient norm was not finite"),
    "spike_steps": ("counter", (), "steps whose loss or gradient norm was a spike"),
    "skipped_steps": ("counter", (), "steps whose update was left out for either reason"),
    "checkpoints": ("counter", (), "checkpoints committed"),
    "checkpoint_step": ("gauge", (), "step of the last one; -1: there is none"),
    "checkpoint_last_success_timestamp_seconds": ("gauge", (), "when that was committed (Unix time), or, where there "
                                                  "is none, when the run began"),
    "launch_timestamp_seconds": ("gauge", (), "when the launch at work, or the last one, began (Unix time)"),
}  # fmt: skip


class RunCollector(Collector):
    """Reads on in a run's events at each scrape: no counter is lost with a process, or goes back."""

    def __init__(self, run: Run, steps: int, ranks: int):
        self._run, self._ranks = run, ranks
        self._reader, self._standing = Reader(run.events_file), Standing(steps)
        self._kinds: collections.Counter[str] = collections.Counter(dict.fromkeys(KINDS, 0))
        self._events: collections.Counter[str] = collections.Counter()
        self._skipped, self._began, self._launched = 0, 0.0, 0.0
        self._lock = threading.Lock()  # two may scrape at once

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            for event in self._reader.events():
                self._add(event)
            values = self._values()
        for name, (kind, labels, text) in METRICS.items():
            metric = Metric(f"armillary_run_{name}", text, kind)
            found = values[name] if labels else {(): values[name]}
            for key, value in found.items():
                more = dict(zip(labels, (key,), strict=True)) if labels else {}
                suffix = "_total" if kind == "counter" else ""
                metric.add_sample(metric.name + suffix, {"run": self._run.path.name} | more, float(value))
            yield metric

    def _add(self, event: dict) -> None:
        self._began = self._began or event["time"]
        self._standing.add(event)
        self._events[event["event"]] += 1
        if event["event"] == "launch":
            self._launched = event["time"]
        if event["event"] == "verdict":
            self._kinds[event["kind"]] += 1
            self._skipped += event.get("action") == "skip"

    def _values(self) -> dict:
        found = self._standing
        return {
            "steps_planned": found.steps,
            "step": found.step,
            "tokens": found.tokens,
            "state": {state: state == found.state for state in STATES},
            "ranks": found.ranks if found.state in ("starting", "training") else 0,
            "ranks_planned": self._ranks,
            "launches": self._events["launch"],
            "restarts": found.restarts,
            "verdicts": self._kinds,
            "nonfinite_steps": self._kinds["non-finite"],
            "spike_steps": self._kinds["spike"],
            "skipped_steps": self._skipped,
            "checkpoints": self._events["checkpoint"],
            "checkpoint_step": -1 if found.checkpoint_step is None else found.checkpoint_step,
            "checkpoint_last_success_timestamp_seconds": found.checkpoint_time or self._began,
            "launch_timestamp_seconds": self._launched or self._began,
        }


@contextlib.contextmanager
def serving(run: Run, config: MetricsConfig, steps: int, ranks: int) -> Iterator[str]:
    """Within, the run's metrics are served on any free port: its "host:port". ClusterError."""
    registry = CollectorRegistry()
    registry.register(RunCollector(run, steps, ranks))
    server, address = serve(registry, config, 0, "the driver")
    file = sign_in("run", address)
    try:
        yield address
    finally:
        sign_out(file)
        server.shutdown()
        server.server_close()
