"""docs/metrics.md, made of what the code emits: `python -m armillary.launcher.metric_docs` writes it."""

from pathlib import Path

from armillary.launcher.run_metrics import METRICS
from armillary.training.health import KINDS, PHASES
from armillary.training.layout import Layout
from armillary.training.metrics import LABELS, Metrics

FILE = Path(__file__).parents[1] / "docs" / "metrics.md"

HEAD = """# Metrics

Made by `python -m armillary.launcher.metric_docs` from the code that emits them.

The driver serves what is the whole run's, through every launch of its ranks; each rank what is its own. On one machine
they listen on loopback, on ports that the run's `metrics_targets.json` names (Prometheus' `file_sd`); in a pod of
Kubernetes all of them are on port 9400 (`k8s/base/monitor.yaml`). Names and labels are an interface: alerts
(`k8s/cluster/alerts.yaml`) and the dashboard (`k8s/cluster/dashboard.json`) are tested against this list.

## Counters

A rank's counters begin at 0 with each generation, as series of their own; `rate` and `increase` under a `sum by (run)`
need not know. Those of the driver are counted from the run's events, and never go back, whatever process is started
again.

## How many series

A rank has {rank} series, and {source} for each source of its data; the driver has {driver}. Labels take no other values
than the tables below say. A run of 1,024 ranks and four sources has {example:,} series at a time; a new generation
begins as many anew, and Prometheus drops those before it when its retention ends.

"""


def series() -> tuple[int, int, int]:
    """(of a rank, more of it for each source, of the driver)."""
    metrics = Metrics("run", 0, Layout(), 0)
    alone = _count(metrics)
    metrics.samples("a", 1)
    metrics.source_loss("a", 1.0)
    return alone, _count(metrics) - alone, sum(_values(labels) for _, labels, _ in METRICS.values())


def _count(metrics: Metrics) -> int:
    return sum(len(family.samples) for family in metrics.registry.collect())


def _values(labels: tuple[str, ...]) -> int:
    from armillary.launcher.standing import STATES

    return {(): 1, ("state",): len(STATES), ("kind",): len(KINDS)}[labels]


def text() -> str:
    """Of docs/metrics.md."""
    rank, source, driver = series()
    example = 1024 * (rank + 4 * source) + driver
    out = HEAD.format(rank=rank, source=source, driver=driver, example=example)
    out += f"## Of a run\n\nLabels: `run`, and what is named here.\n\n{_table(_of_run())}\n"
    labels = ", ".join(f"`{label}`" for label in LABELS)
    out += f"## Of a rank\n\nLabels: {labels}, and what is named here. `phase` is one of {', '.join(PHASES)}; "
    out += f"`source` one of the job's `data.sources`.\n\n{_table(_of_rank())}\n"
    return out + f"`kind` of a verdict is one of: {', '.join(KINDS)}.\n"


def _of_run() -> list[tuple[str, str, str, str]]:
    return [
        (f"armillary_run_{name}" + ("_total" if kind == "counter" else ""), kind, ", ".join(labels), meaning)
        for name, (kind, labels, meaning) in METRICS.items()
    ]


def _of_rank() -> list[tuple[str, str, str, str]]:
    metrics = Metrics("run", 0, Layout(), 0)
    metrics.samples("a", 1)
    metrics.source_loss("a", 1.0)
    found = []
    for family in metrics.registry.collect():
        more = [label for label in family.samples[0].labels if label not in (*LABELS, "le")]
        name = family.name + ("_total" if family.type == "counter" else "")
        found.append((name, family.type, ", ".join(more), family.documentation))
    return found


def names() -> set[str]:
    """As PromQL has them: of a histogram its three."""
    found = set()
    for name, kind, _, _ in _of_run() + _of_rank():
        found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return found


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| name | type | labels | meaning |", "|---|---|---|---|"]
    return (
        "\n".join(lines + [f"| `{name}` | {kind} | {labels} | {meaning} |" for name, kind, labels, meaning in rows])
        + "\n"
    )


if __name__ == "__main__":
    FILE.write_text(text())
