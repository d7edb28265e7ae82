"""Saves killed at every operation and every request, processes killed at random, bytes flipped."""

import itertools
import logging
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from s3fs import S3FileSystem

from armillary.errors import ArmillaryError
from armillary.launcher.job import Job, resolve
from armillary.launcher.run import Run
from armillary.training.checkpoint import saver, snapshot
from armillary.training.checkpoint.catalog import verify
from tests.chaos.disk import MODES
from tests.chaos.kills import at_operation, at_random, at_request, two_saves
from tests.chaos.saves import latest
from tests.conftest import SOURCES
from tests.s3 import s3_server

RANDOM_KILLS, FLIPS = 100, 500
SAID = {
    "before": "killed before an operation", "half": "killed in the middle of a write, or before what is no write",
    "after": "killed after an operation", "power": "power lost: what was not synced is cut off or has not happened",
}  # fmt: skip
HEAD = """## Saves

Two ranks' saves, with the commit, `latest` and the removal of an older checkpoint, on a file system that fails
(`tests/chaos/disk.py`), and on S3 over HTTP (`tests/s3.py`). After each fault every listed checkpoint was read whole,
every number compared, the newest had to be the old or the new one, and the next launch had to go on from it and clear
up.

| fault | injected | survived | lost or wrong |
|---|---|---|---|
"""
STEPS = ((30, "a new step"), (20, "a step that was saved before"))


def chaos() -> str:
    """All of it; the section of the report."""
    snapshot.FILE_BYTES, saver.LOOK_SECONDS = 256, 0.001  # more files, and less waiting
    threading.excepthook = lambda args: None  # the threads of processes that are dead
    text, job = HEAD, _job("")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for mode in MODES:
            for step, again in STEPS:
                found = _to_its_end(
                    lambda end, s=step, m=mode: not at_operation(root / f"{m}-{s}-{end}", job, s, end, m).dead
                )
                text += _row(f"{SAID[mode]}, saving {again}", found)
        text += _row("kill -9 of a process that saves, at a random moment", _random_kills(root / "random", job))
        text += _row("a flipped byte, over all files of a checkpoint and `latest`: found", _flips(root / "flips", job))
        text += _requests(root)
    return text


def _job(path: str) -> Job:
    tables = {"name": "chaos", "model": {"depth": 1}, "data": {"path": "nowhere", "sources": SOURCES}}
    return resolve(tables | {"checkpoint": {"path": path}}, "chaos")


def _requests(root: Path) -> str:
    text, S3FileSystem.retries = "", 1  # a dead server stays dead
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_server() as proxy:
        for passed, said in ((False, "before"), (True, "after")):
            for step, again in STEPS:

                def ends(end: int, passed=passed, step=step) -> bool:
                    name = f"{step}-{passed}-{end}"
                    return not at_request(proxy, root / name, _job(f"s3://bucket/{name}"), step, end, passed)

                text += _row(f"S3: killed {said} a request that changes something, saving {again}", _to_its_end(ends))
    return text


def _to_its_end(ends: Callable[[int], bool]) -> Counter:
    """Kill at operation 1, 2 and so on, until one is not reached."""
    found: Counter = Counter()
    for number in itertools.count(1):
        if _tried(lambda n=number: ends(n), found):
            found["survived"] -= 1  # the save came to its end
            return found


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
