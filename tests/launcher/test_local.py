"""Runs of this machine by the verbs that runs in a cluster have too."""

import json
import os
import socket
import subprocess
import time

import pytest

from armillary.launcher.run import Run
from tests.conftest import ARMILLARY, refused
from tests.launcher.runs import assert_gone, placed, started, wait_for


def test_a_local_run_is_seen_suspended_resumed_and_cancelled(job_file, armillary, tmp_path):
    run = Run(tmp_path / "runs" / "mine")
    process = started(tmp_path, "train", job_file, "training.steps=100000", "--run-dir", "runs/mine")
    wait_for(lambda: len(run.curve()) > 5, process)
    status = json.loads(armillary("status", "runs/mine", "--json").stdout)
    assert (status["phase"], status["reason"]) == (
        "running",
        f"process {process.pid} on {socket.gethostname()} drives it",
    )
    assert status["progress"]["steps"] == 100_000
    assert status["progress"]["tokens_per_second"] > 0
    told = armillary("status", "runs/mine").stdout
    assert "of 100,000" in told
    assert "tokens/s, ETA" in told
    assert [one["phase"] for one in json.loads(armillary("list", "--json").stdout)["runs"]] == ["running"]

    following = started(tmp_path, "logs", "-f", "runs/mine")
    assert armillary("suspend", "runs/mine").returncode == 0
    assert process.wait(5) == 75, "it is gone when the command returns"
    said, err = following.communicate(timeout=20)
    assert following.returncode == 0, err
    assert "ended at step" in said.splitlines()[-1]
    assert run.latest_step() == run.curve()[-1]["step"]
    assert json.loads(armillary("status", "runs/mine", "--json").stdout)["phase"] == "suspended"
    refused(armillary("suspend", "runs/mine"), "nobody drives this run", "armillary resume")
    process.communicate()

    process = started(tmp_path, "resume", "runs/mine")
    wait_for(lambda: len(list(run.events("launch"))) == 2 and len(run.curve()) > run.latest_step() + 5, process)
    ranks = list(run.events("placed"))[-1]["ranks"]
    assert armillary("cancel", "runs/mine").returncode == 0
    process.communicate(timeout=10)
    assert_gone(ranks)
    assert json.loads(armillary("status", "runs/mine", "--json").stdout)["phase"] == "cancelled"
    refused(armillary("resume", "runs/mine"), "the run was cancelled", "--from-step")
    events = [json.loads(line) for line in armillary("logs", "runs/mine", "--json").stdout.splitlines()]
    assert events == list(run.events())


def test_a_run_whose_driver_was_killed_says_so(job_file, armillary, tmp_path):
    run = Run(tmp_path / "run")
    process = started(tmp_path, "train", job_file, "training.steps=100000", "--run-dir", "run")
    wait_for(lambda: run.curve(), process)
    ranks = placed(run)["ranks"]
    process.kill()
    process.communicate()
    status = json.loads(armillary("status", "run", "--json").stdout)
    assert status["phase"] == "failed"
    assert "its driver is gone" in status["reason"]
    assert status["progress"]["step"] >= 1
    assert (status["progress"]["tokens_per_second"], status["progress"]["eta_seconds"]) == (None, None)
    assert_gone(ranks)


@pytest.mark.parametrize("command", ["status", "logs", "suspend", "cancel"])
def test_what_is_no_run_is_refused(command, armillary, tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("folder", "no/such"):
        refused(armillary(command, name), "there is no run here")


def test_a_name_that_is_no_directory_is_a_clusters_run(tmp_path):
    environment = os.environ | {"KUBECONFIG": str(tmp_path / "none")}
    done = subprocess.run([ARMILLARY, "status", "mine"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    refused(done, "no cluster can be asked", "KUBECONFIG")


def test_watching_ends_with_the_run(job_file, armillary, tmp_path):
    process = started(tmp_path, "train", job_file, "training.steps=30", "--run-dir", "run")
    run = Run(tmp_path / "run")
    wait_for(lambda: run.path.exists() and run.events_file.exists(), process)
    began = time.monotonic()
    watched = armillary("status", "run", "--watch", "--json")
    phases = [json.loads(line)["phase"] for line in watched.stdout.splitlines()]
    assert phases[-1] == "done"
    assert set(phases) <= {"starting", "running", "done"}
    assert time.monotonic() - began < 60
    assert process.wait(20) == 0
    process.communicate()
