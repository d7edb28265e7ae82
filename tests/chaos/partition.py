"""Two nodes in network namespaces of their own, and the link between them cut. Needs the right to make namespaces."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from armillary.training.checkpoint.manifest import part_name, read_manifest
from tests.chaos.nodes import Victim, each_step_once
from tests.cluster import Cluster

HERE, THERE = "10.231.7.1", "10.231.7.2"
ZOMBIE_SECONDS = 120.0


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def namespace() -> Iterator[tuple[list[str], str]]:
    """Within, there is another network namespace at THERE; the words that a command begins with which runs in it, and
    the name of the link's near end."""
    name, near, far = f"arm{os.getpid()}", f"na{os.getpid()}", f"fa{os.getpid()}"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", near, "type", "veth", "peer", "name", far)
        _ip("link", "set", far, "netns", name)
        _ip("addr", "add", f"{HERE}/24", "dev", near)
        _ip("link", "set", near, "up")
        inside = ["ip", "netns", "exec", name]
        for words in (
            ["addr", "add", f"{THERE}/24", "dev", far],
            ["link", "set", far, "up"],
            ["link", "set", "lo", "up"],
        ):
            subprocess.run([*inside, "ip", *words], check=True, capture_output=True)
        yield inside, near
    finally:
        _ip("netns", "del", name)


def cut(folder: Path) -> dict[str, float]:
    """Cut off one of two ranks of the run of folder/job.toml; how long what follows took, see benchmarks.chaos.cluster.
    AssertionError where something of it does not follow."""
    with namespace() as (inside, link), Cluster(HERE) as cluster:
        cluster.add(1)
        lost = cluster.add(1, THERE, inside)
        victim = Victim(cluster, folder)
        try:
            run = victim.run
            victim.wait(lambda: victim.stepped(0), "the first step")
            victim.wait(lambda: run.has_checkpoint, "a checkpoint")
            zombie = next(rank for rank in victim.ranks() if rank["address"] == THERE)
            _ip("link", "set", link, "down")
            at, found = time.time(), {}
            (verdict,) = victim.wait(lambda: list(run.events("verdict")), "a verdict")
            assert (verdict["kind"], verdict["node"]) == ("lost node", zombie["node"])
            found["verdict"] = verdict["time"] - at
            found["first_step"] = victim.wait(lambda: victim.stepped(1), "a step alone")["time"] - at
            assert len(victim.ranks()) == 1
            victim.wait(lambda: not psutil.pid_exists(zombie["pid"]), "the zombie's end", ZOMBIE_SECONDS)
            found["zombie_gone"] = time.time() - at
            _ip("link", "set", link, "up")
            cluster.remove(lost)
            at = time.time()
            cluster.add(1, THERE, inside)
            found["grown"] = victim.wait(lambda: victim.stepped(2), "a step on two ranks")["time"] - at
            victim.process.terminate()
            assert victim.end() == 75
            assert each_step_once(run)
            begins = part_name(victim.launches() - 1, 0).partition("r")[0]
            assert all(chunk.file.startswith(begins) for chunk in read_manifest(run.latest()).chunks)
        finally:
            victim.process.kill()
    return found
