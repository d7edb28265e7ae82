"""How fast a rank and the launcher are on this machine, as ratios: `make bench`.

Writes docs/results/speed.md, speed.json and speed.png; --folder for another place.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of each rank

from benchmarks.speed import launcher, model
from tests.conftest import SOURCES, free_port
from tests.groups import in_group

MODEL = {"depth": 4, "hidden_size": 256, "vocab_size": 8192}
HEAD = """# Speed

Made by `make bench` on two processor cores, fp32, one thread a rank; both sides of a ratio in one run, by turns.
Everything behind the medians is in [speed.json](speed.json).

## One rank beside plain PyTorch

The trainer's whole step (batches, forward, backward, gradient buffers, clipping, AdamW, figures) beside a model of the
same dimensions and weights in plain PyTorch (`benchmarks/speed/plain.py`): {parameters:.1f} M parameters, {rows} rows
of {length} positions of packed text and images a step. Both see the same batches and have the same losses at each
step; the plain model's batches lie in memory, ours are built as it goes. Medians of {turns} turns of one step.
Compiled are each layer of the plain model as a whole and its loss, and what lies between the products of ours
(`training.compile`).

| | tokens/s | plain PyTorch | ratio | bar |
|---|---|---|---|---|
"""
LAUNCHER = """
## The launcher beside torchrun

The same job under `armillary train` (Ray's processes, the driver, its view and events) and under `torchrun`, {turns}
runs each by turns; seconds of a step, medians of {steps} steps of each run. All have the same losses, to the last bit.

| ranks | armillary train | torchrun | ratio | bar |
|---|---|---|---|---|
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, default=Path(__file__).parents[2] / "docs" / "results")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tables = _tables(scratch)
        models = []
        for compiled in (False, True):
            in_group(1, free_port(), model.measure, tables, compiled, scratch)
            models.append(json.loads((scratch / "model.json").read_text()))
            print(f"beside plain PyTorch{', compiled' if compiled else ''}: {models[-1]['ratio']:.3f}", flush=True)
        launchers = [launcher.measure(tables, ranks, scratch) for ranks in (1, 2)]
    report(args.folder, tables, models, launchers)


def _tables(scratch: Path) -> dict:
    """Of the job, on shards that are built for it."""
    from armillary.data_pipeline.build import build
    from armillary.data_pipeline.config import DataConfig

    build(DataConfig(path=str(scratch / "shards"), sources=SOURCES))
    return {
        "name": "speed",
        "model": MODEL,
        "data": {"path": str(scratch / "shards"), "sources": SOURCES, "seq_length": 1024},
        "parallel": {"micro_batch": 2},
        "training": {"steps": 1000, "global_batch": 4},
    }


def report(folder: Path, tables: dict, models: list[dict], launchers: list[dict]) -> None:
    text = HEAD.format(
        parameters=models[0]["parameters"] / 1e6, rows=tables["training"]["global_batch"],
        length=tables["data"]["seq_length"], turns=model.TURNS,
    )  # fmt: skip
    for one in models:
        name = "torch.compile on both sides" if one["compiled"] else "as it comes"
        text += f"| {name} | {one['tokens/s']:,.0f} | {one['plain']:,.0f} | {one['ratio']:.2f} | at least 0.95 |\n"
    text += LAUNCHER.format(turns=launcher.TURNS, steps=launcher.STEPS - launcher.WARM_UP)
    for one in launchers:
        times = f"{one['seconds'] * 1e3:.1f} ms | {one['torchrun'] * 1e3:.1f} ms"
        text += f"| {one['ranks']} | {times} | {one['ratio']:.3f} | at most 1.03 |\n"
    text += "\n![ratios, turn by turn](speed.png)\n"
    (folder / "speed.md").write_text(text)
    (folder / "speed.json").write_text(json.dumps({"model": models, "launcher": launchers}, indent=1) + "\n")
    plot(folder / "speed.png", models, launchers)
    print(text)


def plot(path: Path, models: list[dict], launchers: list[dict]) -> None:
    """Every turn's ratio of seconds, ours over the other's: below 1 is faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {f"plain PyTorch{', compiled' if one['compiled'] else ''}": one["turns"] for one in models}
    rows |= {f"torchrun, ranks: {one['ranks']}": one["turns"] for one in launchers}
    figure, axes = pyplot.subplots(figsize=(8, 2.6), layout="constrained")
    for row, turns in enumerate(rows.values()):
        axes.plot([ours / other for ours, other in turns], [row] * len(turns), "o", markersize=4, alpha=0.5)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step, over the other side's")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
