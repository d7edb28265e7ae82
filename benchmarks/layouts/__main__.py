"""Every layout of the sweep beside a plain PyTorch model, and what deterministic sums cost: `make bench-layouts`.

Writes docs/results/layouts.md, layouts.json and layouts.png; --folder for another place.
"""

import argparse
import functools
import json
import os
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of each rank

from benchmarks.layouts.cost import LAYOUTS as COSTS
from benchmarks.layouts.cost import measure
from tests.conftest import MODEL, SOURCES, free_port
from tests.groups import in_group
from tests.training.sweep import BF16, CASES, STEPS, TOLERANCE, Errors, errors, plain, train_layouts

HEAD = f"""# Layouts

Made by `make bench-layouts`. Each layout trains {STEPS} steps of packed rows of text and images, on gloo, and is
compared with a plain PyTorch model of one process in float64 (`tests/reference.py`). Figures are relative errors:
the worst of the steps' losses, of the losses by source, of the gradient norms before clipping; and the worst weight
tensor after the last step. `make test` holds each of them to the limits in the table's last row.

## By axis

The worst of all layouts that use it, in fp32.

| | layouts | loss | loss by source | gradient norm | weights |
|---|---|---|---|---|---|
"""
AXES = (
    "data", "tensor", "sequence_parallel", "pipeline", "virtual", "first_stage_layers", "context", "expert", "engine",
    "zero", "offload", "recompute", "compile",
)  # fmt: skip
CASE = """
## By layout

| ranks | model and layout | loss | loss by source | gradient norm | weights |
|---|---|---|---|---|---|
"""

COST = """
![errors by layout](layouts.png)

## What deterministic sums cost

Seconds of a step with `training.deterministic` over those without, both sides in one run by turns, medians of {rounds}
turns of {steps} steps, on two processor cores with a tiny model, where what is not arithmetic weighs most.

| layout | ratio | seconds without | seconds with |
|---|---|---|---|
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, default=Path(__file__).parents[2] / "docs" / "results")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tables = _tables(Path(scratch))
        found = sweep(tables, Path(scratch))
        costs = [measure(layout, tables, Path(scratch)) for layout in COSTS]
    report(args.folder, found, costs)


def _tables(scratch: Path) -> dict:
    """Of a tiny job, on shards that are built for it."""
    from armillary.data_pipeline.build import build
    from armillary.data_pipeline.config import DataConfig

    build(DataConfig(path=str(scratch / "shards"), sources=SOURCES))
    data = {"path": str(scratch / "shards"), "sources": SOURCES, "seq_length": 128}
    return {"name": "tiny", "model": MODEL, "data": data, "checkpoint": {"every": 100}}


def sweep(tables: dict, scratch: Path) -> list[tuple[int, str, Errors]]:
    """(ranks, name, errors) of every case."""
    reference = functools.cache(lambda model, rows: plain(tables, model, rows))
    for ranks in sorted({case.ranks for case in CASES}):
        print(f"layouts of {ranks} ranks", flush=True)
        in_group(ranks, free_port(), train_layouts, tables, scratch)
    rows = [case.layout.get("micro_batch", 1) for case in CASES]
    return [
        (case.ranks, case.name, errors(scratch, case, reference(case.model, count)))
        for case, count in zip(CASES, rows, strict=True)
    ]


def report(folder: Path, found: list[tuple[int, str, Errors]], costs: list[dict]) -> None:
    fp32 = [(case, of) for case, (_, _, of) in zip(CASES, found, strict=True) if case.limits == TOLERANCE]
    bf16 = [of for case, (_, _, of) in zip(CASES, found, strict=True) if case.limits == BF16]
    axes = {"one process": [of for case, of in fp32 if case.ranks == 1]}
    axes |= {axis: [of for case, of in fp32 if axis in case.layout] for axis in AXES}
    axes |= {model: [of for case, of in fp32 if case.model == model] for model in ("tied", "experts", "capacity")}
    rows = {f"{axis} | {len(of)}": Errors(*map(max, zip(*of, strict=True))) for axis, of in axes.items()}
    rows |= {f"limit of the tests | {len(fp32)}": TOLERANCE}
    rows |= {f"bf16 | {len(bf16)}": Errors(*map(max, zip(*bf16, strict=True))), f"its limit | {len(bf16)}": BF16}
    cases = {f"{ranks} | {name}": of for ranks, name, of in found}
    text = HEAD + table(rows) + CASE + table(cases) + COST.format(rounds=costs[0]["rounds"], steps=costs[0]["steps"])
    for one in costs:
        text += f"| {one['layout']} | {one['ratio']:.2f} | {one['without']:.3f} | {one['with']:.3f} |\n"
    (folder / "layouts.md").write_text(text)
    cases = [{"ranks": ranks, "case": name, **of._asdict()} for ranks, name, of in found]
    (folder / "layouts.json").write_text(json.dumps({"cases": cases, "deterministic": costs}, indent=1) + "\n")
    plot(folder / "layouts.png", found)
    print(text)


def table(rows: dict[str, Errors]) -> str:
    return "".join(f"| {name} | " + " | ".join(f"{one:.1e}" for one in of) + " |\n" for name, of in rows.items())


def plot(path: Path, found: list[tuple[int, str, Errors]]) -> None:
    """Errors of each case, on a log scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 11), layout="constrained")
    names = [f"{name} ({ranks})" for ranks, name, _ in found]
    for part in ("loss", "norm", "weights"):
        values = [max(getattr(of, part), 1e-10) for _, _, of in found]
        axes.plot(values, range(len(found)), "o", markersize=4, label=part)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("relative error beside a plain model in float64")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
