"""The table of the data pipeline beside its peers: `make bench-data`.

Contenders take turns, one process a measurement, several rounds; the table has medians, and ratios to them.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from benchmarks.data.peers import PEERS

WHAT = ("text", "packed", "among", "captions", "written", "images", "decoded", "decoded2", "workers", "patches")
SHARE = ("litdata", "webdataset", "datasets")  # into PyTorch's workers; streaming's wait for each other, and never end
RESULTS = Path("docs/results/data-bench.json")
PATIENCE = 300
LIMITS = dict.fromkeys(WHAT[:5], "gather") | {"decoded": "decoder", "decoded2": "decoder"}


def measure(module: str, *words: object) -> dict | None:
    """The figures that a module prints, in a process of its own; None, with its last line said, where it failed."""
    command = [sys.executable, "-m", f"benchmarks.data.{module}", *map(str, words)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:  # a peer's workers wait for each other, now and then
        print(f"{' '.join(command[2:])}: nothing after {PATIENCE} seconds", file=sys.stderr)
        return None
    if done.returncode:
        print(f"{' '.join(command[2:])}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    matplotlib.use("Agg")
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, default=Path("data/bench"), help="where the corpora are made")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", type=Path, help="default: docs/results/data-bench.json, where no column is left out")
    options.add_argument("--only", nargs="*", default=WHAT, choices=WHAT, help="of the columns, these")
    args = options.parse_args()
    pairs = [("limit", limit) for limit in sorted({LIMITS[what] for what in args.only if what in LIMITS})]
    for what in args.only:
        pairs += [(name, what) for name in contenders(what)]
    found: dict[str, list[dict]] = {}
    for number in range(args.rounds):
        for name, what in pairs:
            figures = measure("measure", name, what, args.folder)
            if figures:
                found.setdefault(f"{name}|{what}", []).append(figures)
                print(f"round {number + 1}  {name:30} {what:9} {figures['rate']:,.0f}/s", file=sys.stderr)
    medians = {
        key: {one: statistics.median(f[one] for f in figures) for one in ("rate", "first")}
        for key, figures in found.items()
    }
    turns = measure("turns", args.folder)  # the ratios that count: what disturbs one side disturbs the other
    alone = measure("alone", args.folder)
    out = args.out or (RESULTS if tuple(args.only) == WHAT else None)
    if out is not None:
        everything = {"medians": medians, "turns": turns, "alone": alone, "rounds": found}
        out.write_text(json.dumps(everything, indent=1) + "\n")
        plot(medians, out.with_suffix(".png"))
    show(medians)
    print(json.dumps({"by turns in one process": turns, "alone": alone}, indent=1))


def contenders(what: str) -> list[str]:
    """Who can do it."""
    if what == "workers":
        return ["armillary", *SHARE]
    if what in ("packed", "among", "captions", "written", "patches"):
        return ["armillary"]
    return [
        "armillary",
        *(name for name, peer in PEERS.items() if hasattr(peer, "text" if what == "text" else "images")),
    ]


def plot(medians: dict[str, dict], path: Path) -> None:
    """Rates as bars, on a logarithmic scale: a panel for text and one for images."""
    panels = {
        "tokens/s, shuffled rows of 2,048": ("limit|gather", "|text", "|packed"),
        "images/s, decoded in one thread": ("limit|decoder", "|decoded"),
    }
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, (title, kinds) in zip(axes, panels.items(), strict=True):
        chosen = {key: one["rate"] for key, one in medians.items() if key.endswith(kinds)}
        chosen = dict(sorted(chosen.items(), key=lambda item: item[1]))
        axis.set_visible(bool(chosen))
        if not chosen:
            continue
        names = [key.replace("|text", "").replace("|decoded", "").replace("|", ", ") for key in chosen]
        colours = ["C1" if key.startswith("armillary") else "0.6" for key in chosen]
        bars = axis.barh(names, chosen.values(), color=colours)
        axis.bar_label(bars, [f"{rate:,.3g}" for rate in chosen.values()], padding=3)
        axis.set(xscale="log", title=title)
        axis.margins(x=0.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(medians: dict[str, dict]) -> None:
    """The table: rates, and ours as a multiple of each."""
    table = Table(title="medians; in brackets: Armillary's rate as a multiple")
    for heading in ("", *WHAT, "first batch, s"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in ("limit", "armillary", *PEERS):
        cells = []
        for what in WHAT:
            key = f"limit|{LIMITS.get(what)}" if name == "limit" else f"{name}|{what}"
            mine, theirs = medians.get(f"armillary|{what}"), medians.get(key)
            cell = f"{theirs['rate']:,.0f}" if theirs else ""
            cells.append(
                f"{cell} ({mine['rate'] / theirs['rate']:.2f})" if theirs and mine and name != "armillary" else cell
            )
        first = medians.get(f"{name}|text")
        table.add_row(name, *cells, f"{first['first']:.2f}" if first else "")
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
