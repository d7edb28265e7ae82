"""A pod's run under the real Prometheus: its end wakes nobody, and its loss does."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import tomli_w

from armillary.launcher.pod import DRIVER
from armillary.launcher.run import Run
from tests.cluster import Cluster
from tests.conftest import HEEDING, free_port
from tests.launcher.runs import wait_for
from tests.monitoring.tools import tool
from tests.monitoring.watching import PACE, Monitoring

QUIET = 12 * 60 * PACE  # longer than any alert about what is gone waits
POD = [sys.executable, "-m", "armillary.launcher.pod"]


@pytest.fixture
def pod(tables, tmp_path, monkeypatch):
    """What starts the driver of a pod, for so many steps, on a cluster of this machine."""
    (tmp_path / "metrics").mkdir()
    monkeypatch.setenv("ARMILLARY_METRICS", str(tmp_path / "metrics"))  # of Ray's nodes too
    training = {"global_batch": 4, "evaluate": False}
    job = tables | {"checkpoint": {"every": 50}, "training": training, "kubernetes": {"cpus_per_rank": 1}}
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster())
        cluster.add(1)
        environment = os.environ | cluster.environment | {
            "RAY_ADDRESS": cluster.address, "ARMILLARY_ROOT": str(tmp_path), "ARMILLARY_RUN": "run",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

        def start(name: str, steps: int) -> subprocess.Popen:
            text = tomli_w.dumps(job | {"training": job["training"] | {"steps": steps}})
            own = environment | {"ARMILLARY_JOB": text, "ARMILLARY_SUBMISSION": name}
            with open(tmp_path / f"{name}.log", "w") as log:
                process = subprocess.Popen([*POD, "train"], env=own, stdout=log, stderr=log, preexec_fn=HEEDING)
            stack.callback(process.kill)
            return process

        yield start


def test_an_end_and_a_suspension_wake_nobody_and_a_loss_does(pod, tmp_path, webhook):
    tool("prometheus")
    metrics, run, port = tmp_path / "metrics", Run(tmp_path / "runs" / "run"), free_port()
    targets = [{"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "armillary"}}]
    (tmp_path / "targets.json").write_text(json.dumps(targets))
    exporter = subprocess.Popen([*POD, "metrics", "--folder", metrics, "--port", str(port)])
    try:
        with contextlib.closing(Monitoring(tmp_path, tmp_path / "targets.json", webhook.url)) as monitoring:

            def state() -> str:
                found = [dict(labels)["state"] for labels in monitoring.ask("armillary_run_state == 1")]
                return found[0] if len(found) == 1 else ""

            process = pod("run", 100)
            wait_for(lambda: state() == "training", process)
            wait_for(lambda: state() == "done", process)
            assert process.wait(60) == 0
            time.sleep(QUIET)
            assert not webhook.heard, "it has ended"

            process = pod("run-r2", 1_000_000)
            wait_for(lambda: state() == "training" and run.curve()[-1]["step"] > 150, process)
            stop = subprocess.Popen([*POD, "stop"])
            assert process.wait(60) == 75
            assert stop.wait(20) == 0
            assert run.latest_step() == run.curve()[-1]["step"]
            time.sleep(QUIET)
            assert not webhook.heard, "it was suspended"

            process = pod("run-r3", 1_000_000)
            wait_for(lambda: state() == "training", process)
            everything = [process, *psutil.Process(process.pid).children(recursive=True)]
            for one in everything:
                one.send_signal(signal.SIGKILL)
            process.wait()
            assert (metrics / DRIVER).exists(), "it could not sign out"
            wait_for(lambda: webhook.of("firing", "ArmillaryGone"), exporter, 60)
    finally:
        exporter.kill()
        exporter.wait(20)
