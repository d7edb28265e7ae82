"""What deterministic sums cost: steps with and without, by turns."""

import json
import statistics
import time
from pathlib import Path

from armillary.training.loop import Assignment, Trainer
from armillary.training.process_group import Rank, join
from tests.conftest import free_port
from tests.groups import in_group
from tests.training.sweep import job_of

LAYOUTS = [{}, {"data": 2}, {"data": 2, "zero": 2}, {"data": 2, "zero": 3}, {"pipeline": 2}]
ROUNDS, STEPS, WARM_UP = 5, 10, 3


def measure(layout: dict, tables: dict, scratch: Path) -> dict:
    """Medians over turns of seconds a step, and the median of each turn's ratio."""
    ranks = max(layout.get("data", 1), layout.get("pipeline", 1))
    out = scratch / "cost.json"
    in_group(ranks, free_port(), turns, layout, tables, out)
    without, with_it = json.loads(out.read_text())
    return {
        "layout": " ".join(f"{key}={value}" for key, value in layout.items()) or "one process",
        "ratio": statistics.median(b / a for a, b in zip(without, with_it, strict=True)),
        "without": statistics.median(without),
        "with": statistics.median(with_it),
        "rounds": ROUNDS,
        "steps": STEPS,
    }


def turns(rank: Rank, layout: dict, tables: dict, out: Path) -> None:
    """In a group: seconds a step of each turn, without and with."""
    found = [[], []]
    for _ in range(ROUNDS):
        for deterministic in (False, True):
            job = job_of(tables, "dense", **layout)
            training = job.training.model_copy(update={"deterministic": deterministic, "global_batch": 8})
            job = job.model_copy(update={"training": training})
            join(rank, job.parallel)
            trainer = Trainer(Assignment("cost", job, "hash", rank, out.parent, None, STEPS + WARM_UP))
            seconds = []
            for _ in range(STEPS + WARM_UP):
                begin = time.perf_counter()
                trainer.train_step()
                seconds.append(time.perf_counter() - begin)
            trainer.close()
            found[deterministic].append(statistics.median(seconds[WARM_UP:]))
    if rank.rank == 0:
        out.write_text(json.dumps(found))
