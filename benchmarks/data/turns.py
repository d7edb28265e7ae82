"""Ours beside the best peer for text in one process, by turns of 0.4 seconds: `python -m benchmarks.data.turns FOLDER`.

What disturbs the machine for a while disturbs both sides of a ratio. One JSON line: medians of million positions a
second, and medians over the turns of ours as a multiple of the peer's (datasets) and of the gather's.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.data import measure, ours, peers

TURNS, SECONDS = 25, 0.4
OURS = ("text", "packed", "among", "captions")


def endless(folder: Path) -> Iterator[int]:
    while True:
        yield from peers.Datasets().text(folder)


def turn(batches: Iterator[int], seconds: float) -> float:
    begin, done = time.perf_counter(), 0
    while (now := time.perf_counter()) - begin < seconds:
        done += next(batches)
    return done / (now - begin) / 1e6


def main() -> None:
    folder = Path(sys.argv[1])
    ours.Armillary().prepare_text(folder)
    peers.Datasets().prepare_text(folder)
    sides = {"gather": measure.gather(folder), "datasets": endless(folder)}
    sides |= {what: getattr(ours.Armillary(), what)(folder) for what in OURS}
    for batches in sides.values():
        turn(batches, 2)
    rates = [{name: turn(batches, SECONDS) for name, batches in sides.items()} for _ in range(TURNS)]
    found = {"rates": {name: round(statistics.median(one[name] for one in rates)) for name in sides}}
    for other in ("datasets", "gather"):
        found[f"to {other}"] = {
            what: round(statistics.median(one[what] / one[other] for one in rates), 2) for what in OURS
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
