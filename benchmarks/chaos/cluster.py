"""A run on three nodes whose ranks, agents and nodes are killed, and one whose network is cut."""

import json
import statistics
import subprocess
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import tomli_w

from armillary.launcher.run import Run
from tests.chaos.nodes import CPUS, KINDS, Told, Victim, each_step_once, figures, strikes
from tests.chaos.partition import cut
from tests.cluster import Cluster
from tests.conftest import ARMILLARY, MODEL, SOURCES

STRIKES = 20
HEAD = """## A cluster

Four data-parallel ranks on three Ray nodes of this machine (with 2, 1 and 1 processors, all on its two cores), with
standby processes and `training.deterministic`. {faults} times one rank, one node's agent (raylet) or a whole node is
killed with -9, at random; a node that is lost comes back within five seconds. Where a node is lost the run goes on with
two ranks (three do not divide the batch), and then with four again. After the last kill it is ended with SIGTERM. Each
time is from the kill to the end of the first step after it: to notice, to place ranks, to load the checkpoint, and one
step.

| | median | worst | bar |
|---|---|---|---|
"""


def job() -> dict:
    """A run whose steps take a tenth of a second or so."""
    return {
        "name": "chaos",
        "model": MODEL | {"hidden_size": 128, "depth": 4},
        "data": {"path": "data", "sources": SOURCES, "seq_length": 128},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 20},
        "training": {"steps": 100_000, "global_batch": 8, "evaluate": False, "deterministic": True},
        "checkpoint": {"every": 20, "keep_last": 3},
        "parallel": {"data": 4},
        "cluster": {"standby": True, "cpus_per_rank": 1},
    }


def chaos(folder: Path, strike_count: int = STRIKES) -> str:
    """Run it, and the same undisturbed; the section of the report. Figures and plots go into `folder`."""
    with tempfile.TemporaryDirectory() as place:
        root, told = Path(place), Told()
        (root / "job.toml").write_text(tomli_w.dumps(job()))
        kinds = [KINDS[number % len(KINDS)] for number in range(strike_count)]
        with Cluster() as cluster:
            for cpus in CPUS:
                cluster.add(cpus)
            victim = Victim(cluster, root)
            try:
                strikes(victim, kinds, 0, told, lambda line: print(line, flush=True))
                victim.process.terminate()
                assert victim.end() == 75, (root / "out").read_text()[-2000:]
            finally:
                victim.process.kill()
        run, whole = Run(root / "run"), Run(root / "whole")
        steps = run.latest_step()
        words = ("train", "job.toml", "--run-dir", "whole", "parallel.data=2", "--stop-at", str(steps))
        subprocess.run([ARMILLARY, *words, "cluster.standby=false"], cwd=root, check=True, capture_output=True)
        equal = sum(a == b for a, b in zip(figures(run), figures(whole), strict=True))
        once, launches = each_step_once(run), len(list(run.events("launch")))
        _draw(folder / "chaos.png", run, whole, told)
    (folder / "chaos.json").write_text(json.dumps(vars(told), indent=1) + "\n")
    text = HEAD.format(faults=strike_count)
    for kind in KINDS:
        text += _row(f"kill of a {kind} to first step", [s for k, s in told.faults if k == kind], "15 s")
    text += _row("every kill to first step", [seconds for _, seconds in told.faults], "15 s")
    text += _row("stop to first step, growing onto standby", told.growths, "5 s")
    return (
        text
        + f"""
{launches} launches, {steps:,} steps. Steps whose loss, gradient norm and place in the data are those of an undisturbed
run of two ranks, bit for bit: {equal:,} of {steps:,}. Each step's data used exactly once: {"yes" if once else "NO"}.

![Seconds from each kill to the first step, and both loss curves](chaos.png)
"""
    )


def partition() -> str:
    """Cut the network between two nodes; the section of the report."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        tables = job()
        (root / "job.toml").write_text(tomli_w.dumps(tables | {"parallel": {"data": 2}}))
        found = cut(root)
    return f"""## A cut network

Two nodes in network namespaces of their own; the link between them goes down while both train. Seconds from the cut:

| | seconds |
|---|---|
| the verdict `lost node` | {found["verdict"]:.1f} |
| the first step of the rank that is left | {found["first_step"]:.1f} |
| the process of the rank that was cut off has ended itself | {found["zombie_gone"]:.1f} |
| after the link is up and the node joins anew: the first step of two ranks | {found["grown"]:.1f} |

Nothing that the cut-off rank wrote is part of a later checkpoint, and each step's data was used exactly once.
"""


def _row(said: str, seconds: list[float], bar: str) -> str:
    if not seconds:
        return ""
    return f"| {said} ({len(seconds)}) | {statistics.median(seconds):.1f} s | {max(seconds):.1f} s | {bar} |\n"


def _draw(path: Path, run: Run, whole: Run, told: Told) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for kind in KINDS:
        points = [(number + 1, seconds) for number, (k, seconds) in enumerate(told.faults) if k == kind]
        left.plot(*zip(*points, strict=True), "o", label=kind)
    left.axhline(15, color="gray", linewidth=0.8, linestyle="--")
    left.set(title="Kill to first step", xlabel="kill", ylabel="seconds", ylim=(0, None))
    left.legend(frameon=False)
    curve = run.curve()
    right.plot([e["step"] for e in whole.curve()], [e["loss"] for e in whole.curve()], linewidth=2, color="lightgray",
               label="undisturbed")  # fmt: skip
    right.plot([e["step"] for e in curve], [e["loss"] for e in curve], linewidth=0.5, label=f"{len(told.faults)} kills")
    for event in run.events("restart"):
        right.axvline(event["from_step"], color="tab:red", linewidth=0.4)
    right.set(title="Loss", xlabel="step", ylabel="nats")
    right.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
