"""The kernels on a GPU, beside their peers.

Each operation is compared with float64, then timed in one run with its peers and with this GPU's own limits: a copy of
memory, and a product of matrices. Prints a table; writes JSON and a plot to docs/results/kernels-GPU.*.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
import triton
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.cases import Case, cases
from benchmarks.gpu.checks import checked, checks


def main() -> None:
    matplotlib.use("Agg")
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", default="", help="of the cases, those whose name has this regular expression")
    options.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the JSON and the plot")
    args = options.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU here\n  to do: run `make gpu` on a machine with one (NVIDIA, compute capability 8.0 "
              "or higher, or AMD MI300)", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    torch.manual_seed(0)
    right = [row for check in checks() if re.search(args.only, check.name) for row in checked(check)]
    wrong = [row for row in right if row["wrong"]]
    print(
        f"{len(right)} comparisons with float64, {len(wrong)} wrong", *map(json.dumps, wrong), sep="\n", file=sys.stderr
    )
    limits, found = {"copy, TB/s": copy_rate(), "matmul 8192, TFLOP/s": matmul_rate()}, []
    for case in cases():
        if re.search(args.only, case.name):
            found.append(measured(case))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    name = torch.cuda.get_device_name()
    result = {"gpu": name, "torch": torch.__version__, "triton": triton.__version__, "limits": limits, "checks": right,
              "cases": found}  # fmt: skip
    stem = args.out / f"kernels-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}"
    args.out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, stem.with_suffix(".png"))
    show(result)
    sys.exit(bool(wrong) or any("armillary" in one["failed"] for one in found))


def copy_rate() -> float:
    """TB/s read and written by a copy of 2 GiB."""
    source = torch.empty(1 << 30, dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e9


def matmul_rate() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9


def milliseconds(run) -> float:
    """The median over repetitions, each with a cold second-level cache."""
    return triton.testing.do_bench(run, warmup=50, rep=300, return_mode="median")


def measured(case: Case) -> dict:
    """Times by contender, and the rate of each. What a contender cannot do is said."""
    times, failed = {}, {}
    for name, run in case.runs.items():
        try:
            run()
            times[name] = milliseconds(run)
        except Exception as problem:  # each has its own way to say that it cannot
            failed[name] = str(problem).splitlines()[0][:200]
    work = case.flops or case.bytes
    return {
        "name": case.name,
        "unit": "TFLOP/s" if case.flops else "TB/s",
        "milliseconds": times,
        "rates": {name: work / time / 1e9 for name, time in times.items()},
        "failed": failed,
    }


def show(result: dict) -> None:
    """The table: rates, ours as a multiple of the best peer, and as a share of the GPU's limit."""
    copy, matmul = result["limits"].values()
    table = Table("", "unit", "armillary", "of the limit", "best peer", "times it", title=result["gpu"])
    for one in result["cases"]:
        if "armillary" in one["failed"]:
            table.add_row(one["name"], one["failed"]["armillary"])
            continue
        ours = one["rates"]["armillary"]
        peers = {name: rate for name, rate in one["rates"].items() if not name.startswith("armillary")}
        best = max(peers, key=peers.get) if peers else ""
        limit = matmul if one["unit"] == "TFLOP/s" else copy
        table.add_row(
            one["name"], one["unit"], f"{ours:.3g}", f"{ours / limit:.2f}", f"{best} {peers[best]:.3g}" if best else "",
            f"{ours / peers[best]:.2f}" if best else "",
        )  # fmt: skip
    Console(width=140).print(table)
    print(f"copy {copy:.2f} TB/s, matmul {matmul:.0f} TFLOP/s")


def plot(result: dict, path: Path) -> None:
    """Bars of every contender's rate, a panel for each unit."""
    units = [unit for unit in ("TFLOP/s", "TB/s") if any(one["unit"] == unit for one in result["cases"])]
    figure, axes = plt.subplots(1, len(units), figsize=(9 * len(units), 12), layout="constrained", squeeze=False)
    for axis, unit in zip(axes[0], units, strict=True):
        bars = [
            (f"{one['name']}: {name}", rate) for one in result["cases"] if one["unit"] == unit
            for name, rate in one["rates"].items()
        ][::-1]  # fmt: skip
        colours = ["C1" if name.endswith(": armillary") else "0.6" for name, _ in bars]
        axis.barh([name for name, _ in bars], [rate for _, rate in bars], color=colours)
        axis.set(title=f"{result['gpu']}, {unit}")
        axis.tick_params(axis="y", labelsize=6)
    figure.savefig(path, dpi=110)
    plt.close(figure)
