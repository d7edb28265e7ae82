"""What a pod's command does of its own, without a cluster."""

import contextlib
import json
import os
import subprocess
import sys
import threading

import psutil
import pytest

from armillary.errors import JobError
from armillary.launcher import pod
from armillary.training.metrics import sign_in, sign_out


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """The environment of a pod."""
    (tmp_path / "metrics").mkdir()
    names = {"RUN": "mine", "SUBMISSION": "mine-r2 1", "ROOT": tmp_path, "METRICS": tmp_path / "metrics",
             "JOB": "[training]\nsteps = 7\n[kubernetes]\ncpus_per_rank = 3\n"}  # fmt: skip
    for name, value in names.items():
        monkeypatch.setenv(f"ARMILLARY_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_job_is_that_of_the_environment_on_this_pods_cluster(inside, monkeypatch):
    job, path = pod.job_of_pod()
    assert (job.training.steps, job.cluster.address, job.cluster.cpus_per_rank) == (7, "auto", 3)
    assert str(path) == "runs/mine"
    monkeypatch.delenv("ARMILLARY_JOB")
    with pytest.raises(JobError, match="ARMILLARY_JOB"):
        pod.job_of_pod()


@pytest.mark.parametrize("code", [1, 2])
@pytest.mark.parametrize("path", ["", "store"])
def test_what_ended_by_itself_does_not_start_anew_and_says_why_again(inside, monkeypatch, capsys, code, path):
    job, run = pod.job_of_pod()
    job, starts = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"path": path})}), []

    def ends(with_code: int):
        def act(said) -> int:
            said.append("no bucket of that name\n")
            starts.append(with_code)
            return with_code

        return act

    assert pod._only_once(job, run, ends(code)) == code
    assert pod._only_once(job, run, ends(0)) == code, "the operator's retry"
    assert starts == [code]
    assert "it has ended before, and said:\nno bucket of that name" in capsys.readouterr().err
    monkeypatch.setenv("ARMILLARY_SUBMISSION", "mine-r2 2")
    assert pod._only_once(job, run, ends(0)) == 0, "another submission, though of the same name"


@pytest.mark.parametrize("code", [0, 75, 137, 143])
def test_one_that_was_lost_or_preempted_does(inside, code):
    job, run = pod.job_of_pod()
    assert pod._only_once(job, run, lambda said: code) == code
    assert pod._only_once(job, run, lambda said: 0) == 0


def test_an_end_that_cannot_be_written_down_is_the_same_end(inside, capsys):
    job, run = pod.job_of_pod()
    assert pod._only_once(job, run, lambda said: (inside / "runs").write_text("no folder") and 1) == 1
    assert "cannot be written down" in capsys.readouterr().err


def test_events_are_printed_from_now_on_and_how_the_run_stands(inside, capsys):
    path = inside / "events.jsonl"
    old = {"time": 1.0, "event": "launch", "generation": 0, "layout": {"world_size": 1}, "from_step": 0, "until": 7}
    path.write_text(json.dumps(old) + "\n")
    ended = threading.Event()
    reporter = threading.Thread(target=pod.report, args=(path, 7, ended))
    reporter.start()
    new = {"time": 1e12, "event": "checkpoint", "step": 3, "path": "/c"}
    with open(path, "a") as file:
        file.write(
            json.dumps({"time": 1e12, "event": "step", "step": 3, "loss": 1.0, "tokens": 5, "seconds": 1.0}) + "\n"
        )
        file.write(json.dumps(new) + "\n")
    ended.set()
    reporter.join(10)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one for one in said if one["event"] != "progress"] == [new]
    assert (said[-1]["event"], said[-1]["step"], said[-1]["checkpoint_step"]) == ("progress", 3, 3)


def test_stop_ends_who_has_signed_in_with_the_children_of_the_driver_and_nobody_else(inside, monkeypatch):
    parent = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    driver = psutil.Popen([sys.executable, "-c", parent], start_new_session=True)
    rank, other = psutil.Popen(["sleep", "60"]), psutil.Popen(["sleep", "60"])
    while not driver.children():
        pass
    (child,) = driver.children()
    for name, process in ((pod.DRIVER, driver), ("rank-00001", rank), ("run", other)):
        began = process.create_time()
        text = json.dumps({"pid": process.pid, "began": began, "address": ""})
        (inside / "metrics" / name).write_text(text)
    reused = json.dumps({"pid": other.pid, "began": other.create_time() - 9, "address": ""})
    (inside / "metrics" / "rank-00002").write_text(reused)
    try:
        pod.stop(inside / "metrics")
        assert not [one for one in (driver, rank, child) if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        assert other.is_running()
    finally:
        for one in (driver, rank, other):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
                one.wait()


def test_who_is_not_in_a_pod_signs_in_nowhere(monkeypatch):
    monkeypatch.delenv("ARMILLARY_METRICS", raising=False)
    assert sign_in("rank-00000") is None
    sign_out(None)


def test_a_pod_without_its_environment_says_so():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ARMILLARY_")}
    done = subprocess.run([sys.executable, "-m", "armillary.launcher.pod", "train"], env=environment,
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "armillary submit" in done.stderr
    assert "Traceback" not in done.stderr
