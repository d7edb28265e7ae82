"""Ours beside the best peers in one process, by turns of 0.4 seconds: `python -m benchmarks.data.turns FOLDER`.

What disturbs the machine for a while disturbs both sides of a ratio. One JSON line: medians over the turns of rates,
and of ours as a multiple of another side. Text in million positions a second, beside datasets and a gather; files of
images beside litdata; images decoded a second in one thread and in two, beside litdata and the decoder alone.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks.data import measure, ours, peers

TURNS, SECONDS = 25, 0.4
OURS = ("text", "packed", "among", "captions")


def endless(epoch: Callable[[], Iterable]) -> Iterator:
    while True:
        yield from epoch()


def turn(batches: Iterator[int], seconds: float) -> float:
    begin, done = time.perf_counter(), 0
    while (now := time.perf_counter()) - begin < seconds:
        done += next(batches)
    return done / (now - begin)


def by_turns(sides: dict[str, Iterator[int]], ours: tuple[str, ...], others: tuple[str, ...], unit: float = 1) -> dict:
    for counts in sides.values():
        turn(counts, 2)
    rates = [{name: turn(counts, SECONDS) for name, counts in sides.items()} for _ in range(TURNS)]
    found = {"rates": {name: round(statistics.median(one[name] for one in rates) / unit) for name in sides}}
    for other in others:
        ratios = {mine: statistics.median(one[mine] / one[other] for one in rates) for mine in ours}
        found[f"to {other}"] = {mine: round(ratio, 2) for mine, ratio in ratios.items()}
    return found


def main() -> None:
    folder, mine, litdata = Path(sys.argv[1]), ours.Armillary(), peers.Litdata()
    mine.prepare_text(folder)
    peers.Datasets().prepare_text(folder)
    litdata.prepare_images(folder)
    text = {"gather": measure.gather(folder), "datasets": endless(lambda: peers.Datasets().text(folder))}
    text |= {what: getattr(ours.Armillary(), what)(folder) for what in OURS}
    found = {"text": by_turns(text, OURS, ("datasets", "gather"), 1e6)}

    def files() -> Iterator[bytes]:
        return endless(lambda: litdata.images(folder))

    sides = {"litdata": (1 for _ in files()), "armillary": (1 for _ in mine.images(folder))}
    found["files"] = by_turns(sides, ("armillary",), ("litdata",))
    held = list(itertools.islice(files(), 2000))
    for threads in (1, 2):
        sources = {"decoder": itertools.cycle(held), "litdata": files(), "armillary": mine.images(folder)}
        sides = {
            name: map(measure.pixels, one) if threads == 1 else measure.in_threads(one, threads)
            for name, one in sources.items()
        }
        found[f"decoded, threads: {threads}"] = by_turns(sides, ("armillary",), ("litdata", "decoder"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
