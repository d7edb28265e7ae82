"""What goes wrong with ranks, machines and losses while a run trains: it is named, and the run goes on or ends well."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import tomli_w
import torch

from armillary.data_pipeline.cursor import Cursor
from armillary.launcher.job import resolve
from armillary.launcher.run import Run
from armillary.training.loop import Assignment, Trainer
from armillary.training.process_group import Rank, join, leave
from tests.chaos.nodes import Victim, each_step_once, figures
from tests.cluster import Cluster
from tests.conftest import ARMILLARY, refused
from tests.launcher.runs import assert_gone, placed, started, wait_for

ENDLESS = {"steps": 100_000, "global_batch": 4, "evaluate": False, "deterministic": True}
COMPARED = 400  # steps


@pytest.fixture(scope="module")
def job(tables):
    """A run that ends when it is told to."""
    checkpoint = {"every": 20, "keep_last": 2}
    return tables | {"parallel": {"data": 2}, "checkpoint": checkpoint, "training": ENDLESS}


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """What its steps come to in one process, if nothing goes wrong."""
    torch.set_num_threads(1)
    alone = resolve(job | {"parallel": {"data": 1}}, "test").train_job()
    join(Rank(), alone.parallel)
    trainer = Trainer(Assignment("whole", alone, "hash", Rank(), tmp_path_factory.mktemp("whole"), None, COMPARED))
    steps = [trainer.train_step()[0] for _ in range(COMPARED)]
    trainer.close()
    leave()
    return [(step["step"], step["loss"], step["grad_norm"], step["cursor"]) for step in steps]


def verdicts(run: Run) -> list[dict]:
    return list(run.events("verdict"))


def newest(run: Run) -> list[dict]:
    """The places of the last launch's ranks."""
    return list(run.events("placed"))[-1]["ranks"]


def wait_for_steps(run: Run, process, launch: int):
    """Until the launch of this number has trained for a while."""

    def trained():
        events = list(run.events())
        launches = [number for number, event in enumerate(events) if event["event"] == "launch"]
        steps = [event for event in events[launches[-1] :] if event["event"] == "step"] if launches else []
        return len(launches) > launch and len(steps) > 25

    wait_for(trained, process)


@contextlib.contextmanager
def slowed(pid: int):
    """Within, a process has a quarter of the time."""
    process, ended = psutil.Process(pid), threading.Event()

    def work():
        while not ended.is_set():
            process.suspend()
            time.sleep(0.015)
            process.resume()
            time.sleep(0.005)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_run_whose_ranks_are_slowed_frozen_killed_and_told_to_go_ends_as_if_nothing_had_been(job, tmp_path, whole):
    (tmp_path / "job.toml").write_text(tomli_w.dumps(job | {"cluster": {"standby": True, "hang_timeout": 3.0,
                                                                        "start_timeout": 60.0}}))  # fmt: skip
    run = Run(tmp_path / "run")
    process = started(tmp_path, "train", "job.toml", "--run-dir", "run")
    wait_for_steps(run, process, 0)
    ranks = newest(run)
    with slowed(ranks[1]["pid"]):
        slow = wait_for(lambda: [one for one in verdicts(run) if one["kind"] == "straggler"], process)[0]
    assert (slow["rank"], slow["node"]) == (1, ranks[1]["node"])

    os.kill(ranks[1]["pid"], signal.SIGSTOP)
    hung = wait_for(lambda: [one for one in verdicts(run) if one["kind"] == "hung rank"], process)[0]
    assert (hung["rank"], hung["node"]) == (1, ranks[1]["node"])
    assert hung["phase"] in ("data", "compute", "reduce", "checkpoint")
    assert "does not answer" in hung["what"]
    wait_for_steps(run, process, 1)
    assert_gone(ranks)

    os.kill(newest(run)[0]["pid"], signal.SIGKILL)
    lost = wait_for(lambda: [one for one in verdicts(run) if one["kind"] == "lost process"], process)[0]
    assert lost["rank"] == 0
    wait_for_steps(run, process, 2)

    os.kill(newest(run)[1]["pid"], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "preempted; go on with" in err
    last = run.curve()[-1]["step"]
    assert run.latest_step() == last
    assert run.verdicts() == {"straggler": 1, "hung rank": 1, "lost process": 1}
    for verdict in verdicts(run):
        assert f"{verdict['kind']}: {verdict['what']}" in err

    process = started(tmp_path, "resume", "run", "cluster.grace=2.0", "cluster.standby=false")
    wait_for_steps(run, process, 3)
    os.kill(newest(run)[0]["pid"], signal.SIGSTOP)
    process.terminate()
    out, err = process.communicate(timeout=60)
    refused(subprocess.CompletedProcess([], process.returncode, out, err), "within the grace of 2 s", code=75)
    assert_gone(newest(run))
    assert each_step_once(run)
    assert figures(run)[:COMPARED] == whole[: len(run.curve())]


def test_a_run_on_a_cluster_loses_a_node_and_takes_one_back(job, tmp_path, whole):
    """With fewer ranks in between; of the lost node only the agent was killed, and its rank ended by itself. With
    another token than the cluster's nothing starts."""
    (tmp_path / "job.toml").write_text(tomli_w.dumps(job))
    with Cluster() as cluster:
        kept, lost = cluster.add(1), cluster.add(1)
        other = tmp_path / "other"
        other.write_text("6" * 64)
        stranger = subprocess.run(
            [ARMILLARY, "train", "job.toml", "--run-dir", "refused", "--address", cluster.address],
            cwd=tmp_path, env=os.environ | cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(other)},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        refused(stranger, "could not be reached", "token")
        assert not (tmp_path / "refused").exists()

        victim = Victim(cluster, tmp_path)
        run = victim.run
        victim.wait(lambda: victim.stepped(0), "the first step")
        ranks = victim.ranks()
        assert len({rank["node"] for rank in ranks}) == 2
        orphan = next(rank for rank in ranks if lost.has(rank["pid"]))
        lost.kill_raylet()
        victim.wait(lambda: victim.stepped(1), "a step on one rank")
        (verdict,) = verdicts(run)
        assert (verdict["kind"], verdict["node"]) == ("lost node", orphan["node"])
        assert len(victim.ranks()) == 1
        assert kept.has(victim.ranks()[0]["pid"])
        assert_gone([orphan])

        cluster.remove(lost)
        cluster.add(1)
        victim.wait(lambda: victim.stepped(2), "a step on two ranks")
        assert len(victim.ranks()) == 2
        assert [event["layout"]["data"] for event in run.events("launch")] == [2, 1, 2]
        time.sleep(1)
        victim.process.terminate()
        assert victim.end() == 75
        assert kept.process.poll() is None, "the cluster goes on without us"
    assert Run(tmp_path / "run").job().parallel.data == 2, "what is asked for stays"
    assert each_step_once(run)
    assert figures(run)[:COMPARED] == whole[: len(run.curve())]


def test_a_rank_that_dies_at_start_ends_the_run_with_its_name(job_file, tmp_path):
    dying, run = 1, Run(tmp_path / "run")
    process = started(tmp_path, "train", job_file, "parallel.data=2", "cluster.max_restarts=0", "--run-dir", "run")
    ranks = wait_for(lambda: placed(run), process)["ranks"]
    os.kill(ranks[dying]["pid"], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    log = f"rank-{dying:05d}.log"
    refused(subprocess.CompletedProcess([], process.returncode, out, err), f"rank {dying} of 2 died", log, code=1)
    assert (run.path / "generations/000/logs" / log).exists()
    assert "start it again" in err
    assert_gone(ranks)
    assert not run.curve()
    assert not run.store().sizes()
    assert f"rank {dying} of 2 died" in next(run.events("failed"))["error"]


def test_sigterm_saves_a_checkpoint_too_and_a_second_signal_ends_at_once(job_file, tmp_path, armillary):
    run = Run(tmp_path / "run")
    process = started(tmp_path, "train", job_file, "training.steps=100000", "cluster.grace=15.0", "--run-dir", "run")
    wait_for(lambda: run.curve(), process)
    refused(armillary("resume", "run"), "being trained already")
    process.terminate()
    _, err = process.communicate(timeout=15)
    assert process.returncode == 75, err
    last = run.curve()[-1]["step"]
    assert run.latest().at().endswith(f"/step-{last:08d}")
    process = started(tmp_path, "resume", "run")
    ranks = wait_for(lambda: len(list(run.events("placed"))) == 2 and newest(run), process)
    refused(armillary("resume", "run"), "being trained already")
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):  # both are there when it wakes
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    refused(subprocess.CompletedProcess([], process.returncode, out, err), "stopped at once", code=75)
    assert_gone(ranks)
    assert run.latest()


def test_a_rank_under_torchrun_saves_at_sigterm_and_exits_alike(job_file, tmp_path):
    command = [
        sys.executable,
        "-m",
        "armillary.launcher.torchrun",
        job_file,
        "--run-dir",
        "run",
        "training.steps=100000",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    run = Run(tmp_path / "run")
    wait_for(lambda: run.curve(), process)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert "stopped by SIGTERM after step" in err
    assert run.latest_step() == run.curve()[-1]["step"]


def test_a_loss_that_is_not_finite_stops_the_run(job_file, armillary, tmp_path):
    done = armillary("train", job_file, "optimizer.learning_rate=1e30", "optimizer.clip_grad=1e30", "--run-dir", "run")
    refused(done, "the loss is", "at step", "learning_rate", code=1)
    assert "the loss is" in next(Run(tmp_path / "run").events("failed"))["error"]


def test_after_a_spike_a_run_goes_back_and_leaves_the_data_out(job_file, armillary, tmp_path):
    words = ("training.spike=2.5", "training.steps=120", "checkpoint.every=10", "training.bad_step=rewind")
    done = armillary("train", job_file, *words, "cluster.standby=true", "--run-dir", "run", "--json")
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "run")
    spikes, rewinds, launches = verdicts(run), list(run.events("rewind")), list(run.events("launch"))
    assert 0 < len(spikes) == len(rewinds) == len(launches) - 1
    for spike, rewind, launch in zip(spikes, rewinds, launches[1:], strict=True):
        assert rewind["cursor"] == spike["cursor"]
        assert rewind["from_step"] == launch["from_step"] < spike["step"]
    assert [event["step"] for event in run.curve()] == list(range(1, 121))
    places = [(event["cursor"]["block"], event["cursor"]["row"]) for event in run.curve()]
    assert places == sorted(set(places))
    left_out = {(one["cursor"]["block"], one["cursor"]["row"]) for one in spikes}
    assert not left_out & set(places), "no step that counts ended with what a spike read last"


def test_where_to_go_on_is_forgotten_with_an_explicit_step(tmp_path):
    run = Run(tmp_path)
    run.leave_out(20, 27, {"block": 1, "row": 5})
    assert run.beyond(20) == run.beyond(26) == Cursor(block=1, row=5)
    assert run.beyond(10) == run.beyond(27) == Cursor(), "it has not come there, or has left it behind"
    run.leave_out(10, 24, {"block": 2, "row": 0})
    assert run.beyond(20) == run.beyond(10) == Cursor(block=2, row=0)
    assert run.beyond(25) == Cursor(block=1, row=5)
    run.event("rewound", step=10)
    assert run.beyond(10) == run.beyond(20) == Cursor()
