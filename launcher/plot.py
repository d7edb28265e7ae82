"""A run's loss curve as a picture."""

import math
from pathlib import Path

from armillary.launcher.run import Run


def plot_loss(run: Run) -> Path:
    """Write RUN/loss.png: loss by step on a log scale, with the layout of each launch marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve = run.curve()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    steps, losses = [event["step"] for event in curve], [event["loss"] for event in curve]
    axes.plot(steps, losses, linewidth=0.6, alpha=0.4, color="tab:blue", label="each step")
    # Steps with a stretch of plain text among the questions lie far above those without: the mean of logarithms
    # shows both kinds falling, where a plain mean would show the text alone.
    middle = [math.exp(value) for value in smooth([math.log(max(loss, 1e-12)) for loss in losses], 50)]
    axes.plot(steps, middle, color="tab:blue", label="geometric mean of 50 steps")
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


def smooth(values: list[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means
