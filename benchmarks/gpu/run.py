"""The kernels on a GPU, beside their peers, and a training step.

Each operation is compared with float64, then timed in one run with its peers and with this GPU's own limits: a copy of
memory, and a product of matrices. Last a training step, with kernels and without. Prints a table; writes JSON and a
plot to docs/results/kernels-GPU.*, the JSON after each row, so that nothing is lost if a later one hangs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from armillary.kernels.forced import VARIABLE
from benchmarks.gpu.cases import Case, cases
from benchmarks.gpu.checks import checked, checks

PATIENCE = 240  # seconds for one row


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", default="", help="of checks and cases, those whose name has this regular expression")
    options.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the JSON and the plot")
    options.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    args = options.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU here\n  to do: run `make gpu` on a machine with one (NVIDIA, compute capability 8.0 "
              "or higher, or AMD MI300)", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    torch.manual_seed(0)
    if args.stage:
        stage(args.stage, args.only, args.start)
        return
    name = torch.cuda.get_device_name()
    stem = args.out / f"kernels-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}"
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"gpu": name, "torch": torch.__version__, "triton": triton.__version__} | {one: [] for one in STAGES}
    for one in STAGES:
        for row in rows(one, args.only):
            result[one].append(row)
            stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)
    right = [row for row in result["checks"] if not row["wrong"]]
    timed = [row for row in result["cases"] if not row["wrong"]]
    if timed and "matmul 8192, TFLOP/s" in result["limits"][0]:
        plot(name, timed, stem.with_suffix(".png"))
        show(name, timed, result["limits"][0])
    for row in result["training"]:
        failed = row.get("failed") or row.get("wrong")
        print(f"{row['name']}: {failed or '{positions/s:,.0f} positions/s, {TFLOP/s:.0f} TFLOP/s'.format(**row)}")
    if differ(result["training"]):
        print("training with kernels has other losses than without")
    print(f"{len(result['checks'])} comparisons with float64, {len(right)} right; {len(timed)} cases timed")
    wrong = len(right) < len(result["checks"]) or len(timed) < len(result["cases"])
    sys.exit(wrong or differ(result["training"]))


def rows(of: str, only: str) -> Iterator[dict]:
    """What a stage finds; in processes of its own, since what breaks a GPU's context breaks it for all that follows."""
    start, now = 0, ""
    while True:
        command = [sys.executable, "-m", "benchmarks.gpu", "--stage", of, "--start", str(start), "--only", only]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        watch = threading.Timer(PATIENCE, process.kill)
        watch.start()
        for line in process.stdout:
            watch.cancel()
            watch = threading.Timer(PATIENCE, process.kill)
            watch.start()
            row = json.loads(line)
            if "begins" in row:
                start, now = row["number"] + 1, row["begins"]
            else:
                yield row
        watch.cancel()
        if process.wait() == 0:
            return
        if not now:
            yield {"name": of, "wrong": f"what comes behind number {start - 1} could not be made"}
            return
        yield {"name": now, "wrong": f"the process died, or said nothing for {PATIENCE} seconds"}
        now = ""


def stage(of: str, only: str, start: int) -> None:
    """Print the rows of a stage as JSON lines, each behind the name of what begins."""
    for number, (name, find) in enumerate(STAGES[of]()):
        if number >= start and re.search(only if of != "limits" else "", name):
            print(json.dumps({"number": number, "begins": name}), flush=True)
            for row in find():
                print(json.dumps(row), flush=True)
            print(json.dumps({"number": number, "begins": ""}), flush=True)
            torch.cuda.empty_cache()


# Of each: names, and what finds their rows.
STAGES = {
    "checks": lambda: ((one.name, lambda one=one: checked(one)) for one in checks()),
    "limits": lambda: [("limits", lambda: [{"copy, TB/s": copy_rate(), "matmul 8192, TFLOP/s": matmul_rate()}])],
    "cases": lambda: ((one.name, lambda one=one: [measured(one)]) for one in cases()),
    "training": lambda: ((f"training step, {how}", lambda how=how: [trained(how)]) for how in TRAINED),
}
TRAINED = {"kernels": "", "reference": "reference"}  # what ARMILLARY_KERNELS is


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
            failed[name] = f"{type(problem).__name__}: {problem}"[:200]
    work = case.flops or case.bytes
    return {
        "name": case.name,
        "unit": "TFLOP/s" if case.flops else "TB/s",
        "milliseconds": times,
        "rates": {name: work / time / 1e9 for name, time in times.items()},
        "failed": failed,
        "wrong": failed.get("armillary", ""),
    }


def trained(how: str) -> dict:
    """A training step's figures; `failed`: why there are none, as where Megatron-core is missing."""
    command, environment = [sys.executable, "-m", "benchmarks.gpu.training"], os.environ | {VARIABLE: TRAINED[how]}
    row = {"name": f"training step, {how}", "failed": ""}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, timeout=PATIENCE - 20
        )
    except subprocess.TimeoutExpired:
        return row | {"failed": f"nothing after {PATIENCE - 20} seconds"}
    if done.returncode:
        errors = re.findall(r"^\w[\w.]*(?:Error|Exception).*", done.stderr, re.MULTILINE)
        return row | {"failed": [f"exit code {done.returncode}", *errors][-1]}
    return row | json.loads(done.stdout.splitlines()[-1])


def differ(rows: list[dict]) -> bool:
    """Whether the first losses with kernels are others than without: from the second on they show the gradients."""
    losses = [row["losses"][:5] for row in rows if not row.get("failed") and "losses" in row]
    return len(losses) == 2 and not all(abs(a - b) <= 0.02 * b for a, b in zip(*losses, strict=True))


def show(gpu: str, found: list[dict], limits: dict) -> None:
    """The table: rates, ours as a multiple of the best peer, and as a share of the GPU's limit."""
    from rich.console import Console
    from rich.table import Table

    copy, matmul = limits.values()
    table = Table("", "unit", "armillary", "of the limit", "best peer", "times it", title=gpu)
    for one in found:
        ours = one["rates"]["armillary"]
        peers = {name: rate for name, rate in one["rates"].items() if not name.startswith(("armillary", "limit"))}
        best = max(peers, key=peers.get) if peers else ""
        limit = matmul if one["unit"] == "TFLOP/s" else copy
        table.add_row(
            one["name"], one["unit"], f"{ours:.3g}", f"{ours / limit:.2f}", f"{best} {peers[best]:.3g}" if best else "",
            f"{ours / peers[best]:.2f}" if best else "",
        )  # fmt: skip
    Console(width=140).print(table)
    print(f"copy {copy:.2f} TB/s, matmul {matmul:.0f} TFLOP/s")


def plot(gpu: str, found: list[dict], path: Path) -> None:
    """Bars of every contender's rate, a panel for each unit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    units = [unit for unit in ("TFLOP/s", "TB/s") if any(one["unit"] == unit for one in found)]
    figure, axes = plt.subplots(1, len(units), figsize=(9 * len(units), 12), layout="constrained", squeeze=False)
    for axis, unit in zip(axes[0], units, strict=True):
        bars = [
            (f"{one['name']}: {name}", rate) for one in found if one["unit"] == unit
            for name, rate in one["rates"].items()
        ][::-1]  # fmt: skip
        colours = ["C1" if name.endswith(": armillary") else "0.6" for name, _ in bars]
        axis.barh([name for name, _ in bars], [rate for _, rate in bars], color=colours)
        axis.set(title=f"{gpu}, {unit}")
        axis.tick_params(axis="y", labelsize=6)
    figure.savefig(path, dpi=110)
    plt.close(figure)
