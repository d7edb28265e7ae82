"""A run's loss curve as a picture."""

from collections.abc import Sequence
from pathlib import Path

from armillary.launcher.run import Run


def plot_loss(run: Run) -> Path:
    """Write RUN/loss.png: loss by step on a log scale, of all tokens and by source, each launch's layout marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve = run.curve()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    steps, losses = [event["step"] for event in curve], [event["loss"] for event in curve]
    axes.plot(steps, losses, linewidth=0.6, alpha=0.4, color="C0", label="each step")
    sources = sorted({source for event in curve for source in event["source_loss"]})
    for number, source in enumerate(sources):
        points = [(event["step"], event["source_loss"][source]) for event in curve if source in event["source_loss"]]
        of_steps, values = zip(*points, strict=True)
        axes.plot(of_steps, smooth(values, 50), color=f"C{number + 1}", label=f"{source}, mean of 50 steps with it")
    done = 0
    for event in run.events():
        if event["event"] == "launch":
            layout = event["layout"]
            sizes = " x ".join(f"{axis}={layout[axis]}" for axis in ("data", "tensor", "pipeline") if layout[axis] > 1)
            axes.axvline(done, color="grey", linestyle=":", linewidth=1)
            axes.annotate(f" {sizes or 'one process'}", (done, 1), xycoords=("data", "axes fraction"), va="top",
                          fontsize=8, color="grey")  # fmt: skip
        elif event["event"] == "step":
            done = event["step"]
    axes.set(xlabel="step", ylabel="loss (nats per learned token)", yscale="log", title=run.path.name)
    axes.legend(frameon=False)
    path = run.path / "loss.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means
