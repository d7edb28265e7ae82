"""Saves killed at every operation, processes killed at random, bytes flipped: `make chaos`.

Writes docs/results/chaos.md; --folder for another place.
"""

import argparse
import itertools
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from armillary.errors import ArmillaryError
from armillary.launcher.job import Job, resolve
from armillary.launcher.run import Run
from armillary.training.checkpoint import saver, snapshot
from armillary.training.checkpoint.catalog import verify
from tests.chaos.disk import MODES
from tests.chaos.kills import at_operation, at_random, two_saves
from tests.chaos.saves import latest
from tests.conftest import SOURCES

RANDOM_KILLS, FLIPS = 100, 500
SAID = {
    "before": "killed before an operation", "half": "killed in the middle of a write, or before what is no write",
    "after": "killed after an operation", "power": "power lost: what was not synced is cut off or has not happened",
}  # fmt: skip
HEAD = """# Chaos

Made by `make chaos`: saves of two ranks, with the commit, `latest` and the removal of an older checkpoint, on a file
system that fails (`tests/chaos/disk.py`). After each fault every listed checkpoint was read whole, every number
compared, the newest had to be the old or the new one, and the next launch had to go on from it and clear up.

| fault | injected | survived | lost or wrong |
|---|---|---|---|
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, default=Path(__file__).parents[2] / "docs" / "results")
    args = options.parse_args()
    snapshot.FILE_BYTES, saver.LOOK_SECONDS = 256, 0.001  # more files, and less waiting
    threading.excepthook = lambda args: None  # the threads of processes that are dead
    job = resolve({"name": "chaos", "model": {"depth": 1}, "data": {"path": "nowhere", "sources": SOURCES}}, "chaos")
    text = HEAD
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for mode in MODES:
            for step, again in ((30, "a new step"), (20, "a step that was saved before")):
                found = _operations(root / f"{mode}-{step}", job, step, mode)
                text += _row(f"{SAID[mode]}, saving {again}", found)
        text += _row("kill -9 of a process that saves, at a random moment", _random_kills(root / "random", job))
        text += _row("a flipped byte, over all files of a checkpoint and `latest`: found", _flips(root / "flips", job))
    (args.folder / "chaos.md").write_text(text)
    print(text)


def _row(said: str, found: Counter) -> str:
    print(f"{said}: {dict(found)}", flush=True)
    return f"| {said} | {found['survived'] + found['wrong']} | {found['survived']} | {found['wrong']} |\n"


def _tried(act: Callable[[], object], found: Counter) -> object:
    try:
        answer = act()
    except (AssertionError, ArmillaryError, OSError) as error:
        print(f"WRONG: {error}", flush=True)
        found["wrong"] += 1
        return None
    found["survived"] += 1
    return answer


def _operations(root: Path, job: Job, step: int, mode: str) -> Counter:
    found: Counter = Counter()
    for end in itertools.count(1):
        disk = _tried(lambda end=end: at_operation(root / str(end), job, step, end, mode), found)
        if disk is not None and not disk.dead:
            found["survived"] -= 1  # the save came to its end
            return found


def _random_kills(root: Path, job: Job) -> Counter:
    found, chance = Counter(), random.Random(0)
    run = two_saves(root, job)
    for _ in range(RANDOM_KILLS):
        _tried(lambda: at_random(run.path, chance.random() / 10), found)
    return found


def _flips(root: Path, job: Job) -> Counter:
    found, chance = Counter(), random.Random(0)
    run = two_saves(root, job)
    files = [*Path(run.latest().at()).iterdir(), root / "checkpoints" / "latest"]
    places = [(file, place) for file in files for place in range(file.stat().st_size)]
    for file, place in chance.sample(places, FLIPS):
        good = file.read_bytes()
        file.write_bytes(good[:place] + bytes([good[place] ^ (1 << chance.randrange(8))]) + good[place + 1 :])
        found["survived" if _noticed(run) else "wrong"] += 1
        file.write_bytes(good)
    assert latest(run) == (20, 2)
    return found


def _noticed(run: Run) -> bool:
    try:
        return bool(verify(run.latest())[1])
    except ArmillaryError:
        return True


if __name__ == "__main__":
    main()
