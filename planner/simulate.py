"""A pipeline's schedule as discrete events, with ranks that vary; what the formulas of planner.time leave out.

Each rank goes through its operations in the order of Megatron-core's schedule, and an operation begins when its rank is
free and its input is there. All data-parallel replicas are simulated at once: a time is an array [replicas].
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Operation(NamedTuple):
    """A forward or backward pass of one micro-batch through one of a rank's parts."""

    backward: bool
    micro_batch: int
    part: int


@dataclass(frozen=True)
class Variation:
    """How ranks vary: `jitter` is the standard deviation of an operation's time over its mean (log-normal), drawn anew
    for each; a `stragglers` share of the ranks is `slowdown` times as slow all the time."""

    jitter: float = 0.0
    stragglers: float = 0.0
    slowdown: float = 1.0


def schedule(stage: int, stages: int, virtual: int, count: int) -> list[Operation]:
    """The operations of rank `stage`, in order, for `count` micro-batches.

    1F1B: stages - stage - 1 forward passes, then one of each in turn (Narayanan et al. 2021, section 2.2.1).
    Interleaved: micro-batches go through the parts in groups of `stages`, after 2 (stages - stage - 1) +
    (virtual - 1) stages forward passes (section 2.2.2); `count` must be a multiple of `stages`.
    """
    assert virtual == 1 or count % stages == 0
    total = count * virtual
    warm_up = stages - stage - 1 if virtual == 1 else 2 * (stages - stage - 1) + (virtual - 1) * stages
    warm_up = min(warm_up, total)
    forward = [_nth(i, stages, virtual, False) for i in range(total)]
    backward = [_nth(i, stages, virtual, True) for i in range(total)]
    order = forward[:warm_up]
    for i in range(warm_up, total):
        order += [forward[i], backward[i - warm_up]]
    return order + backward[total - warm_up :]


def _nth(number: int, stages: int, virtual: int, backward: bool) -> Operation:
    """The `number`-th forward or backward operation of any rank."""
    if virtual == 1:
        return Operation(backward, number, 0)
    group, within = divmod(number, stages * virtual)
    part, offset = divmod(within, stages)
    return Operation(backward, group * stages + offset, virtual - 1 - part if backward else part)


def pipeline(
    forward: float, backward: float, stages: int, virtual: int, count: int, send: float = 0.0,
    vary: Variation | None = None, replicas: int = 1, seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """Seconds of a step [replicas]: forward and backward are those of one micro-batch through a whole stage, `send`
    those of handing it on. Without variation and sending: (count + (stages - 1) / virtual) (forward + backward)."""
    vary = vary or Variation()
    random = np.random.default_rng(seed)
    slow = np.where(random.random((stages, replicas)) < vary.stragglers, vary.slowdown, 1.0)
    orders = [schedule(stage, stages, virtual, count) for stage in range(stages)]
    free = np.zeros((stages, replicas))
    done: dict[tuple, np.ndarray] = {}
    at = [0] * stages
    left = sum(map(len, orders))
    while left:
        before = left
        for stage in range(stages):
            while at[stage] < len(orders[stage]):
                operation = orders[stage][at[stage]]
                ready = _input(done, operation, stage, stages, virtual)
                if ready is None:
                    break
                seconds = (backward if operation.backward else forward) / virtual
                if vary.jitter:
                    seconds = seconds * random.lognormal(-(vary.jitter**2) / 2, vary.jitter, replicas)
                begin = np.maximum(free[stage], ready + send if stages > 1 else ready)
                free[stage] = done[(stage, *operation)] = begin + seconds * slow[stage]
                at[stage] += 1
                left -= 1
        assert left < before, "the schedule waits for itself"
    return free.max(axis=0)


def _input(done: dict, operation: Operation, stage: int, stages: int, virtual: int) -> np.ndarray | float | None:
    """When the input of an operation is there, or None where that is not known yet."""
    backward, micro_batch, part = operation
    if not backward and stage == 0 and part == 0:
        return 0.0
    if backward and stage == stages - 1 and part == virtual - 1:
        return done.get((stage, False, micro_batch, part))
    if backward:
        source = (stage + 1, part) if stage < stages - 1 else (0, part + 1)
    else:
        source = (stage - 1, part) if stage else (stages - 1, part - 1)
    return done.get((source[0], backward, micro_batch, source[1]))


def slowed(stages: int, virtual: int, count: int, vary: Variation, replicas: int, seed: int = 0) -> float:
    """How much longer a step takes with ranks that vary than without: the slowest of `replicas` decides. A backward
    pass counts as two forward ones."""
    even = pipeline(1.0, 2.0, stages, virtual, count)[0]
    return float(pipeline(1.0, 2.0, stages, virtual, count, 0.0, vary, replicas, seed).max() / even)
