"""A run on a cluster whose ranks, agents and nodes are killed while it trains, and what must be true when it ends."""

import os
import random
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from armillary.launcher.run import Run
from tests.cluster import Cluster, Node, kill_rank
from tests.conftest import ARMILLARY

WAIT_SECONDS = 180.0
CPUS = (2, 1, 1)  # of the nodes
KINDS = ("rank", "raylet", "node")


@dataclass
class Told:
    """What was done to a run, and how long it took to train again: (kind, seconds from the kill to the first step),
    and seconds from the stop of a smaller launch to the first step of the larger one."""

    faults: list[tuple[str, float]] = field(default_factory=list)
    growths: list[float] = field(default_factory=list)


class Victim:
    """`armillary train` in a process of its own, on a cluster."""

    def __init__(self, cluster: Cluster, folder: Path, *words: str):
        self.cluster, self.run = cluster, Run(folder / "run")
        with open(folder / "out", "w") as log:
            self.process = subprocess.Popen(
                [ARMILLARY, "train", folder / "job.toml", "--run-dir", "run", "--address", cluster.address, *words],
                cwd=folder, env=os.environ | cluster.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait(self, condition, what: str, seconds: float = WAIT_SECONDS):
        """What `condition` gives, once it is true; AssertionError where the run ends first or it takes too long."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert self.process.poll() is None, f"the run ended ({self.process.returncode}), waiting for {what}"
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            time.sleep(0.02)
        return found

    def stepped(self, launches: int) -> dict | None:
        """The first step of a launch after the first `launches`, if there is one."""
        seen = 0
        for event in self.run.events():
            seen += event["event"] == "launch"
            if event["event"] == "step" and seen > launches:
                return event
        return None

    def launches(self) -> int:
        return len(list(self.run.events("launch")))

    def ranks(self) -> list[dict]:
        return list(self.run.events("placed"))[-1]["ranks"]

    def end(self, seconds: float = WAIT_SECONDS) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(seconds)


def strike(victim: Victim, kind: str, chance: random.Random) -> tuple[float, Node | None]:
    """Kill one thing that has ranks on it; when, and the node that is gone, if one is."""
    place = chance.choice(victim.ranks())
    if kind == "rank":
        kill_rank(place)
        return time.time(), None
    node = next(node for node in victim.cluster.nodes if node.has(place["pid"]))
    (node.kill if kind == "node" else node.kill_raylet)()
    return time.time(), node


def strikes(victim: Victim, kinds: list[str], seed: int, told: Told, say=lambda line: None) -> None:
    """Do all this to a run, one after the other: each when the last is over, and what was lost is back."""
    chance = random.Random(seed)
    victim.wait(lambda: victim.stepped(0), "the first step")
    for kind in kinds:
        time.sleep(chance.uniform(2, 20))
        before = victim.launches()
        at, node = strike(victim, kind, chance)
        first = victim.wait(lambda n=before: victim.stepped(n), f"a step after the loss of a {kind}")
        told.faults.append((kind, first["time"] - at))
        if node is not None:
            victim.cluster.remove(node)
            time.sleep(chance.uniform(0, 5))
            victim.cluster.add(node.cpus)
            grown = victim.launches()
            if len(victim.ranks()) < sum(CPUS):
                first = victim.wait(lambda n=grown: victim.stepped(n), "a step on more ranks")
                stopped = list(victim.run.events("growing"))
                if stopped:
                    told.growths.append(first["time"] - stopped[-1]["time"])
        say(f"{kind}: {told.faults[-1][1]:.1f} s" + (f", grown in {told.growths[-1]:.1f} s" if node else ""))


def figures(run: Run) -> list[tuple]:
    """Of every step that counts: its number, loss, gradient norm and cursor."""
    return [(e["step"], e["loss"], e["grad_norm"], e["cursor"]) for e in run.curve()]


def each_step_once(run: Run) -> bool:
    """Whether the steps that count are 1, 2, 3 and so on, each with data of its own."""
    curve = run.curve()
    places = Counter((event["cursor"]["block"], event["cursor"]["row"]) for event in curve)
    return [event["step"] for event in curve] == list(range(1, len(curve) + 1)) and max(places.values()) == 1
