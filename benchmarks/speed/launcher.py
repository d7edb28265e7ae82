"""Steps under `armillary train` (Ray's processes, the driver, metrics) and under torchrun, by turns."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import tomli_w

from tests.conftest import free_port

TURNS, STEPS, WARM_UP = 9, 60, 10


def measure(tables: dict, ranks: int, scratch: Path) -> dict:
    """Medians over turns of seconds a step, and the median of each turn's ratio. Who goes first changes."""
    tables = tables | {
        "model": {"depth": 2},
        "parallel": {"data": ranks},
        "training": {"steps": STEPS, "global_batch": 2 * ranks, "evaluate": False},
        "cluster": {"cpus_per_rank": 1},
        "checkpoint": {"every": STEPS},
    }
    job = scratch / f"job-{ranks}.toml"
    job.write_text(tomli_w.dumps(tables))
    turns, losses = [], []
    for turn in range(TURNS):
        found = {}
        for name in ("armillary", "torchrun") if turn % 2 else ("torchrun", "armillary"):
            steps = _steps([*_command(name, ranks), job, "--run-dir", scratch / f"{name}-{ranks}-{turn}"])
            losses.append([step["loss"] for step in steps])
            found[name] = statistics.median(step["seconds"] for step in steps[WARM_UP:])
        turns.append((found["armillary"], found["torchrun"]))
        print(f"{ranks} ranks, turn {turn + 1} of {TURNS}: {turns[-1][0] / turns[-1][1]:.3f}", flush=True)
    assert all(one == losses[0] for one in losses), "both launchers train the same run, to the last bit"
    return {
        "ranks": ranks,
        "ratio": statistics.median(ours / other for ours, other in turns),
        "seconds": statistics.median(ours for ours, _ in turns),
        "torchrun": statistics.median(other for _, other in turns),
        "turns": turns,
    }


def _command(name: str, ranks: int) -> list:
    if name == "armillary":
        return [Path(sys.executable).with_name("armillary"), "train"]
    where = ["--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *where, "-m", "armillary.launcher.torchrun"]


def _steps(command: list) -> list[dict]:
    """Of a run that `command` makes in its last argument. What it says is shown where it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}")
    events = [json.loads(line) for line in (command[-1] / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "step"]
