"""Steps of one rank as the trainer takes them, and of a plain PyTorch model of the same dimensions, by turns."""

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from armillary.data_pipeline.cursor import Cursor
from armillary.launcher.job import resolve
from armillary.model.coordinates import placements
from armillary.training.delivery import Delivery
from armillary.training.loop import Assignment, Trainer
from armillary.training.process_group import Rank, join
from benchmarks.speed.plain import Plain, PlainTrainer

TURNS, WARM_UP = 25, 5  # steps of each side
AGREE = 1e-4  # of losses, relative: the two are the same model


def measure(rank: Rank, tables: dict, compiled: bool, scratch: Path) -> None:
    """In a group of one: writes medians over turns of tokens/s, and of each turn's ratio, into model.json.

    Ours builds its batches as it goes, in a thread; the plain model's lie in memory.
    """
    tables = tables | {"training": tables["training"] | {"compile": compiled}}
    job = resolve(tables, "benchmark").train_job()
    join(rank, job.parallel)
    trainer = Trainer(Assignment("speed", job, "hash", rank, scratch, None, job.training.steps))
    plain = Plain(job.model)
    plain.load({place.name: parameter.detach() for parameter, place in placements(trainer.stages)})
    if compiled:
        plain.compile_layers()
    delivery = Delivery(job, Cursor(), rank.rank, rank.device)
    steps = (next(delivery) for _ in range(WARM_UP + TURNS))
    held = [(step.weight, list(step.micro_batches)) for step in steps]
    delivery.close()
    other = PlainTrainer(plain, job.optimizer)
    turns = []
    for number, (weight, batches) in enumerate(held):
        rate = job.optimizer.rate(number, job.training.steps)
        sides = {"ours": lambda: trainer.train_step()[0]["loss"]}
        sides["plain"] = functools.partial(other.step, batches, weight, rate)
        found = {side: timed(sides[side]) for side in sorted(sides, reverse=number % 2)}  # each goes first in turn
        (ours, loss), (theirs, expected) = found["ours"], found["plain"]
        assert abs(loss / expected - 1) < AGREE, (number, loss, expected)
        turns.append((ours, theirs))
    trainer.close()
    tokens, turns = job.tokens_per_step, turns[WARM_UP:]
    found = {
        "compiled": compiled,
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
        "ratio": statistics.median(theirs / ours for ours, theirs in turns),
        "tokens/s": tokens / statistics.median(ours for ours, _ in turns),
        "plain": tokens / statistics.median(theirs for _, theirs in turns),
        "turns": turns,
    }
    (scratch / "model.json").write_text(json.dumps(found))


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """(seconds, what came out)."""
    begin = time.perf_counter()
    result = step()
    return time.perf_counter() - begin, result
