"""Long runs that fail now and then: how much of their time trains steps that last, and how often to save.

Young 1974 ("A first order approximation to the optimum checkpoint interval") and Daly 2006 ("A higher order estimate of
the optimum checkpoint interval for restart dumps", equation 37) are the formulas beside which the simulation stands.
"""

import math
from dataclasses import dataclass

import numpy as np

MTBF_HOURS = (
    50_000.0  # of one GPU: 419 interruptions of 16,384 GPUs in 54 days (Grattafiori et al. 2024, section 3.3.4)
)
ENDLESS = 1000
FAILURES = 2000  # that a simulated run lives through, on average


@dataclass(frozen=True)
class Failures:
    """How a cluster fails, in seconds. mtbf: mean time between failures of the whole cluster, which come independently;
    detection: until a failure is noticed; restart: from there to the first step."""

    mtbf: float
    detection: float
    restart: float


def goodput(interval: float, cost: float, failures: Failures, useful: float, seed: int = 0) -> float:
    """Share of a run's time that went into steps which lasted, over a run of `useful` seconds of such steps.

    A checkpoint is saved after every `interval` seconds of steps and takes `cost`; a failure throws away what was done
    since the last one. Failures may come at any time, during saves and restarts too. A run that does not end is given
    up after ENDLESS times its length.
    """
    random = np.random.default_rng(seed)
    clock = saved = 0.0
    failing = random.exponential(failures.mtbf)
    while True:
        # What is saved until the run ends, or until the next failure: whole intervals, of which the last may be short.
        whole = math.ceil((useful - saved) / interval)
        if clock + useful - saved + whole * cost <= failing:
            return useful / (clock + useful - saved + whole * cost)
        saved += min(whole - 1, int((failing - clock) / (interval + cost))) * interval
        clock = failing
        while True:  # until a restart is not interrupted itself
            failing = clock + random.exponential(failures.mtbf)
            clock += failures.detection + failures.restart
            if clock <= failing:
                break
            clock = failing
        if clock > ENDLESS * useful:
            return saved / clock


def young(cost: float, mtbf: float) -> float:
    """Seconds of work between checkpoints: sqrt(2 cost mtbf), good where the cost is small."""
    return math.sqrt(2 * cost * mtbf)


def daly(cost: float, mtbf: float) -> float:
    """Seconds of work between checkpoints, to higher order."""
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def best_interval(cost: float, failures: Failures, seed: int = 0) -> tuple[float, float]:
    """(interval, its goodput): the best of intervals around Young's, each simulated with the same failures."""
    intervals = young(cost, failures.mtbf) * np.geomspace(1 / 4, 4, 33)
    shares = [goodput(interval, cost, failures, FAILURES * failures.mtbf, seed) for interval in intervals]
    best = int(np.argmax(shares))
    return float(intervals[best]), float(shares[best])


@dataclass(frozen=True)
class Size:
    """A cluster's size, and how a long run fares on it. Intervals and costs in seconds."""

    gpus: int
    mtbf_hours: float
    checkpoint_cost: float
    interval: float
    young: float
    daly: float
    goodput: float


def over_sizes(
    costs: dict[int, float], mtbf_hours: float, detection: float, restart: float, seed: int = 0
) -> list[Size]:
    """The best interval and its goodput for each number of GPUs: `costs` has the seconds of a checkpoint of each;
    `mtbf_hours` is one GPU's."""
    found = []
    for gpus, cost in costs.items():
        failures = Failures(mtbf_hours * 3600 / gpus, detection, restart)
        interval, share = best_interval(cost, failures, seed)
        found.append(
            Size(gpus, mtbf_hours / gpus, cost, interval, young(cost, failures.mtbf), daly(cost, failures.mtbf), share)
        )
    return found
