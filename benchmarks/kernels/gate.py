"""Every shipped kernel compiled for GPUs that are not here: `python -m benchmarks.kernels.gate [--targets sm_90 ...]`.

One line a kernel and target: registers, shared memory, blocks a multiprocessor, instructions; and why it is not fit to
be shipped, if so. With --json one JSON object. Exit 1 where one is not fit.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.kernels.ahead_of_time import TARGETS, compiled
from benchmarks.kernels.shipped import shipped


def examine(job: tuple[str, str]) -> dict:
    """A kernel's facts for a target, and its problems: by its name."""
    name, target = job
    one = next(one for one in shipped(target) if one.name == name)
    try:
        facts = compiled(one.kernel, target, one.arguments, one.switches)
    except Exception as error:  # what the compiler raises is of any kind
        return {"name": name, "target": target, "problems": [f"does not compile: {str(error).splitlines()[0][:200]}"]}
    return {"name": name, **facts.as_dict(), "problems": facts.problems(**one.asks)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--targets", nargs="*", default=list(TARGETS), choices=TARGETS)
    options.add_argument("--only", default="", help="of the kernels, those whose name has this regular expression")
    options.add_argument("--json", action="store_true")
    options.add_argument("--golden", type=Path, help="write each kernel's registers to this file, for the tests")
    args = options.parse_args()
    jobs = [(one.name, target) for target in args.targets for one in shipped(target) if re.search(args.only, one.name)]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        results = pool.map(examine, jobs)
        found = list(track(results, "compiling", len(jobs), console=Console(stderr=True), transient=True))
    if args.golden:
        golden: dict[str, dict[str, int]] = {}
        for one in found:
            if not one["problems"]:
                golden.setdefault(one["name"], {})[one["target"]] = one["registers"]
        args.golden.write_text(json.dumps(golden, indent=1) + "\n")
    if args.json:
        print(json.dumps(found))
    else:
        show(found)
    sys.exit(any(one["problems"] for one in found))


def show(found: list[dict]) -> None:
    """The table."""
    table = Table("kernel", "target", "registers", "shared, KiB", "blocks", "matrices", "wide loads", "not fit")
    for one in found:
        if "registers" not in one:
            table.add_row(one["name"], one["target"], *[""] * 5, "; ".join(one["problems"]))
            continue
        table.add_row(
            one["name"], one["target"], str(one["registers"]), f"{one['shared'] / 1024:.1f}", str(one["blocks"]),
            one["tensor_cores"], str(one["wide_loads"]), "; ".join(one["problems"]),
        )  # fmt: skip
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
