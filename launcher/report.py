"""`armillary report RUN`: one page, whole in itself, for who has no Grafana."""

import io
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jinja2

from armillary.launcher import local, standing
from armillary.launcher.run import Run
from armillary.training.checkpoint.catalog import listed

TEMPLATE = "report.html"
POINTS = 600  # of a curve at most: more are averaged
PARTS = {  # of a step, by what the events call its seconds
    "compute_seconds": "forward and backward passes",
    "collective_wait_seconds": "waiting for other ranks",
    "reduce_seconds": "gradients and update",
    "data_wait_seconds": "waiting for data",
}
QUIET = ("step", "checkpoint", "pruned", "placed")  # events that the page shows otherwise


def report(run: Run, out: Path) -> None:
    """Write the page of a run as it stands."""
    out.write_text(html(run))


def html(run: Run) -> str:
    """The page."""
    curve, events = run.curve(), list(run.events())
    folder = jinja2.PackageLoader("armillary.launcher", "templates")
    environment = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    status = local.status(run)
    job = run.job()
    return environment.get_template(TEMPLATE).render(
        name=run.path.name,
        made=_stamp(time.time()),
        phase=status["phase"],
        reason=status["reason"],
        rows=[(key, value) for key, value in standing.rows(status["progress"]).items() if key != "state"],
        figures=[] if not curve else _figures(curve),
        spent=time_spent(curve, events),
        layout=[(key, value) for key, value in job.parallel.model_dump().items() if value not in (0, "", False)],
        sources=_sources(job, curve),
        checkpoints=[
            (one.state.step, one.state.loss, _stamp(one.state.saved_at), f"{one.bytes / 1e9:.3f}")
            for one in listed(run.store()) if one.state is not None
        ],
        events=[(_stamp(event["time"]), event["event"], standing.told(event))
                for event in events if event["event"] not in QUIET],
    )  # fmt: skip


def time_spent(curve: Sequence[dict], events: Iterable[dict]) -> list[tuple[str, float, float]]:
    """(what, seconds, share of all) from the first launch to the last event: rank 0's parts of the steps that count,
    what else passed between a launch's first step and its last, while nobody drove the run, and all that was lost to
    starts, stops and steps that were done again."""
    events = list(events)
    times = [event["time"] for event in events]
    if not times or not curve:
        return []
    spent = {text: sum(step.get(key, 0.0) for step in curve) for key, text in PARTS.items()}
    steps = sum(step["seconds"] for step in curve)
    spent["the rest of the steps"] = max(0.0, steps - sum(spent.values()))
    whole = times[-1] - times[0]
    spent["suspended, or failed"] = idle(events)
    rest = whole - steps - spent["suspended, or failed"]
    spent["starts, saves that were waited for, steps done again"] = max(0.0, rest)
    return [(text, seconds, seconds / whole if whole else 0.0) for text, seconds in spent.items()]


def idle(events: Iterable[dict]) -> float:
    """Seconds from each end of a driver's work to the next launch, which somebody else began."""
    seconds, since = 0.0, None
    for event in events:
        match event["event"]:
            case "ended" if event["interrupted"]:
                since = event["time"]
            case "failed":
                since = event["time"]
            case "restart" | "waiting":  # the driver is still there
                since = None
            case "launch":
                seconds += event["time"] - since if since is not None else 0.0
                since = None
    return seconds


def thinned(values: Sequence[float], points: int = POINTS) -> list[float]:
    """At most so many: means of neighbours."""
    size = -(-len(values) // points)
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(group) / len(group) for group in groups]


def _figures(curve: Sequence[dict]) -> list[tuple[str, str]]:
    """(title, SVG) of each curve."""
    steps = thinned([step["step"] for step in curve])

    def of(key: str) -> list[float]:
        return thinned([step[key] for step in curve])

    def loss(axes) -> None:
        axes.plot(steps, of("loss"), lw=1.2, color="#1f4e79")
        axes.set_ylabel("nats")

    def rates(axes) -> None:
        axes.plot(steps, of("grad_norm"), lw=1, color="#8a4f00")
        axes.set_ylabel("gradient norm")
        axes.set_yscale("log")
        other = axes.twinx()
        other.plot(steps, of("learning_rate"), lw=1, color="#777777", ls="--")
        other.set_ylabel("learning rate")

    def pace(axes) -> None:
        tokens = [(after["tokens"] - before["tokens"]) / max(after["seconds"], 1e-9)
                  for before, after in zip([{"tokens": 0}, *curve], curve, strict=False)]  # fmt: skip
        axes.plot(steps, thinned(tokens), lw=1, color="#2e6b34")
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)

    def spent(axes) -> None:
        shares = [thinned([step.get(key, 0.0) / max(step["seconds"], 1e-9) for step in curve]) for key in PARTS]
        axes.stackplot(steps, shares, labels=list(PARTS.values()), alpha=0.85)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share of a step")
        axes.legend(fontsize=7, loc="lower left")

    def by_source(axes) -> None:
        for name in sorted({name for step in curve for name in step["source_loss"]}):
            found = [step for step in curve if name in step["source_loss"]]
            losses = thinned([step["source_loss"][name] for step in found])
            axes.plot(thinned([step["step"] for step in found]), losses, lw=1, label=name)
        axes.set_ylabel("nats")
        axes.legend(fontsize=7)

    drawn = {
        "Loss": loss,
        "Gradient norm and learning rate": rates,
        "Tokens/s": pace,
        "Where a step's time goes": spent,
        "Loss by source": by_source,
    }
    return [(title, _svg(draw)) for title, draw in drawn.items()]


def _svg(draw: Callable) -> str:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "armillary", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(6.4, 2.8), layout="constrained")
        draw(axes)
        axes.set_xlabel("step")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _sources(job, curve: Sequence[dict]) -> list[tuple[str, str, float, float | None]]:
    """(name, kind, share of the mixture at the start, last loss) of each source."""
    total = sum(source.weight for source in job.data.sources)
    last = {name: loss for step in curve for name, loss in step["source_loss"].items()}
    return [(one.name, one.kind, one.weight / total, last.get(one.name)) for one in job.data.sources]


def _stamp(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
