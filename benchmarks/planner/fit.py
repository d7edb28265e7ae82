"""The planner's constants, fitted on half of the published rows."""

import math
from collections import Counter
from dataclasses import asdict, replace

from armillary.planner.software import FILE, Constants
from benchmarks.planner.rows import Row
from benchmarks.planner.score import planned, planned_gib

FITTED = ("gemm", "traffic", "memory", "flash2", "flash1", "network", "overlapped", "jitter")
SMOOTH = 0.02  # relative error below which the loss is quadratic


def halves(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(to fit, to score): of each table's rows, in the file's order, every second one, beginning with the first."""
    numbers: dict[str, list[int]] = {}
    for row in rows:
        seen = numbers.setdefault(row.table, [])
        if row.number not in seen:
            seen.append(row.number)
    chosen = {number for seen in numbers.values() for number in seen[::2]}
    return [r for r in rows if r.number in chosen], [r for r in rows if r.number not in chosen]


def loss(rows: list[Row], c: Constants) -> float:
    """Mean absolute log error, smooth at 0. A table weighs as the root of its number of rows: none decides alone."""
    weights = {table: count**-0.5 for table, count in Counter(row.table for row in rows).items()}
    total = sum(weights[row.table] * _error(row, c) for row in rows)
    return total / sum(weights[row.table] for row in rows)


def _error(row: Row, c: Constants) -> float:
    return math.hypot(math.log(planned(row, c) / row.seconds), SMOOTH) - SMOOTH


def fit(rows: list[Row], start: Constants) -> Constants:
    """Constants of least loss, by a pattern search (Hooke and Jeeves 1961) on their logits: they are shares."""
    at = {name: _logit(getattr(start, name)) for name in FITTED}
    best, width = loss(rows, start), 0.5

    def constants(place: dict[str, float]) -> Constants:
        return Constants(**asdict(start) | {name: 1 / (1 + math.exp(-x)) for name, x in place.items()})

    while width > 0.02:
        before = dict(at)
        for name in FITTED:
            for step in (width, -width):
                if abs(trial := at[name] + step) < 6 and (found := loss(rows, constants(at | {name: trial}))) < best:
                    at, best = at | {name: trial}, found
                    break
        ahead = {name: max(-6.0, min(6.0, 2 * at[name] - before[name])) for name in FITTED}
        if at == before:
            width /= 2
        elif (found := loss(rows, constants(ahead))) < best:
            at, best = ahead, found
    return replace(constants(at), fragmentation=_fragmentation(rows, start))


def _fragmentation(rows: list[Row], start: Constants) -> float:
    """The share, in whole percents, of least mean error of the memory."""
    measured = [row for row in rows if row.gib]

    def error(share: float) -> float:
        c = replace(start, fragmentation=share)
        return sum(abs(math.log(planned_gib(row, c) / row.gib)) for row in measured)

    return min((percent / 100 for percent in range(11)), key=error)


def write(c: Constants) -> None:
    lines = [f"{name} = {value:.4g}" for name, value in asdict(c).items()]
    FILE.write_text(
        "# Written by `python -m benchmarks.planner --fit`; what each is: planner/software.py.\n"
        + "\n".join(lines)
        + "\n"
    )


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
