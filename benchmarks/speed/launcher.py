"""Steps under `armillary train` (Ray's processes, the driver, metrics) and under torchrun, by turns."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import tomli_w

TURNS, STEPS, WARM_UP = 5, 60, 10


def measure(tables: dict, ranks: int, scratch: Path) -> dict:
    """Medians over turns of seconds a step, and the median of each turn's ratio."""
    tables = tables | {
        "model": {"depth": 2},
        "parallel": {"data": ranks},
        "training": {"steps": STEPS, "global_batch": 2 * ranks, "evaluate": False},
        "cluster": {"cpus_per_rank": 1},
        "checkpoint": {"every": STEPS},
    }
    job = scratch / f"job-{ranks}.toml"
    job.write_text(tomli_w.dumps(tables))
    armillary = [Path(sys.executable).with_name("armillary"), "train"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "29511"]
    torchrun += ["-m", "armillary.launcher.torchrun"]
    turns, losses = [], []
    for turn in range(TURNS):
        found = []
        for name, command in (("armillary", armillary), ("torchrun", torchrun)):
            run = scratch / f"{name}-{ranks}-{turn}"
            subprocess.run(
                [*command, job, "--run-dir", run], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )  # fmt: skip
            events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
            steps = [event for event in events if event["event"] == "step"]
            losses.append([step["loss"] for step in steps])
            found.append(statistics.median(step["seconds"] for step in steps[WARM_UP:]))
        turns.append(found)
        print(f"{ranks} ranks, turn {turn + 1} of {TURNS}: {found[0] / found[1]:.3f}", flush=True)
    assert all(one == losses[0] for one in losses), "both launchers train the same run, to the last bit"
    return {
        "ranks": ranks,
        "ratio": statistics.median(ours / other for ours, other in turns),
        "seconds": statistics.median(ours for ours, _ in turns),
        "torchrun": statistics.median(other for _, other in turns),
        "turns": turns,
    }
