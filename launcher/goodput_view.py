"""Goodput over the number of GPUs, as a table and as a picture."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from armillary.errors import JobError


def print_sizes(console: Console, sizes: list[dict], plot: Path | None) -> None:
    table = Table(title="long runs: failures, checkpoints and slow ranks; times in minutes")
    for heading in ("GPUs", "MTBF", "save", "best interval", "Young", "Daly", "goodput", "slow ranks", "in all"):
        table.add_column(heading, justify="right")
    for size in sizes:
        seconds = (size["mtbf_hours"] * 3600, *(size[key] for key in ("checkpoint_cost", "interval", "young", "daly")))
        minutes = [f"{one / 60:,.0f}" if one >= 6000 else f"{one / 60:.3g}" for one in seconds]
        table.add_row(
            f"{size['gpus']:,}", *minutes, f"{size['goodput']:.1%}", f"x {size['slowed']:.3f}", f"{size['total']:.1%}"
        )
    console.print(table)
    if plot is not None:
        console.print(f"the picture is in {plot}", highlight=False, markup=False, soft_wrap=True)


def draw(sizes: list[dict], path: Path) -> None:
    """Write a PNG of goodput over size; JobError where it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    gpus = [size["gpus"] for size in sizes]
    axes.plot(gpus, [100 * size["goodput"] for size in sizes], "o-", label="failures and checkpoints")
    axes.plot(gpus, [100 * size["total"] for size in sizes], "s--", label="and slow ranks")
    axes.set(xscale="log", xlabel="GPUs", ylabel="goodput, % of the time", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise JobError(f"the picture cannot be written: {error.strerror}", path, "choose another path") from None
    finally:
        pyplot.close(figure)
