"""Whole runs through the command line: Ray, live metrics, Ctrl-C, resume on other layouts, and what goes wrong."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from armillary.data_pipeline.folder import LocalFolder
from armillary.data_pipeline.shards import read_manifest, write_manifest
from armillary.data_pipeline.sources.easy_vqa import easy_vqa_questions
from armillary.launcher.metric_docs import names
from armillary.launcher.run import Run
from armillary.launcher.standing import STATES
from tests.conftest import free_port, refused
from tests.data_pipeline.test_build import own_source
from tests.launcher.runs import assert_gone, placed, started, wait_for
from tests.training.test_metrics import scrape


def listeners(pid: int) -> set[tuple[str, str]]:
    """(process, address) of every port that a process and its descendants listen on."""
    found = set()
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.add((f"{process.name()}:{connection.laddr.port}", connection.laddr.ip))
    return found


@pytest.fixture(scope="module")
def interrupted(tables, tmp_path_factory):
    """A run on two tensor-parallel ranks, scraped while it trained and then ended with Ctrl-C."""
    import tomli_w

    folder = tmp_path_factory.mktemp("run")
    (folder / "job.toml").write_text(tomli_w.dumps(tables | {"parallel": {"tensor": 2}, "checkpoint": {"every": 5}}))
    process = started(folder, "train", "job.toml", "training.steps=100000", "--run-dir", "run", "--json")
    run = Run(folder / "run")
    wait_for(lambda: list(run.events("checkpoint")), process)
    targets = json.loads(run.targets_file.read_text())
    first = [scrape(target["targets"][0]) for target in targets]
    time.sleep(1)
    second = [scrape(target["targets"][0]) for target in targets]
    listening = listeners(process.pid)
    commands = [" ".join(p.cmdline()) for p in psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return {
        "run": run,
        "targets": targets,
        "scrapes": (first, second),
        "listening": listening,
        "commands": commands,
        "code": process.returncode,
        "out": out,
        "err": err,
    }


def test_a_live_run_answers_prometheus_on_every_rank(interrupted):
    targets, (first, second) = interrupted["targets"], interrupted["scrapes"]
    assert [t["labels"]["instance"] for t in targets] == ["run/driver", "run/0", "run/1"]
    assert all(t["targets"][0].startswith("127.0.0.1:") for t in targets)
    assert {name for found in second for name in found} == names(), "all that docs/metrics.md has, and nothing else"
    driver, reader = second[:2]
    assert {one.labels["source"]: one.value > 0 for one in reader["armillary_train_samples_total"]} == {
        "easy_vqa": True, "pydoc": True,
    }  # fmt: skip
    assert first[0]["armillary_run_step"][0].value < driver["armillary_run_step"][0].value
    assert driver["armillary_run_ranks"][0].value == driver["armillary_run_ranks_planned"][0].value == 2
    states = {one.labels["state"]: one.value for one in driver["armillary_run_state"]}
    assert states == {state: float(state == "training") for state in STATES}
    assert time.time() - driver["armillary_run_checkpoint_last_success_timestamp_seconds"][0].value < 120
    for rank, (before, after) in enumerate(zip(first[1:], second[1:], strict=True)):
        steps = [found["armillary_train_steps_total"][0] for found in (before, after)]
        place = {"tp": str(rank), "pp": "0", "dp": "0", "generation": "0"}
        assert steps[0].labels == {"run": "run", "rank": str(rank)} | place
        assert 0 < steps[0].value < steps[1].value
        assert after["armillary_train_tokens_total"][0].value == steps[1].value * 4 * 128 / 2
        assert 0 < after["armillary_train_loss"][0].value < 10
        assert after["armillary_train_checkpoint_interval_seconds"][0].value > 0
        assert after["armillary_train_host_memory_bytes"][0].value > 2**26
        times = ("compute", "collective_wait", "reduce", "data_wait")
        spent = sum(after[f"armillary_train_{name}_seconds_total"][0].value for name in times)
        assert 0.9 < spent / after["armillary_train_step_duration_seconds_sum"][0].value <= 1


def test_ctrl_c_saves_a_checkpoint_and_leaves_nothing_running(interrupted):
    run = interrupted["run"]
    assert interrupted["code"] == 130
    assert "Traceback" not in interrupted["err"]
    assert f"armillary resume {run.path}" in interrupted["err"]
    summary = json.loads(interrupted["out"])
    last = run.curve()[-1]["step"]
    assert summary["interrupted"]
    assert summary["steps"] == last == [e["step"] for e in run.events("checkpoint")][-1]
    assert run.latest().at().endswith(f"/step-{last:08d}")
    assert_gone(placed(run)["ranks"])
    assert [p.name for p in sorted((run.path / "generations/000").rglob("*"))] == [
        "logs",
        "rank-00000.log",
        "rank-00001.log",
    ]


def test_a_local_run_listens_on_loopback_only(interrupted):
    assert len(interrupted["listening"]) >= 4, "metrics of two ranks, and Ray's own"
    assert {address.removeprefix("::ffff:") for _, address in interrupted["listening"]} == {"127.0.0.1"}


def test_the_token_is_in_no_log_and_no_argument(interrupted):
    token = re.compile(rb"[0-9a-f]{64}")
    assert not any(token.search(line.encode()) for line in interrupted["commands"])
    texts = [p for p in interrupted["run"].path.rglob("*") if p.is_file() and p.suffix not in (".bin", ".png")]
    assert len(texts) > 5
    for path in texts:
        assert not token.search(path.read_bytes()), path


def test_a_run_is_resumed_on_another_layout_and_ends(interrupted, armillary):
    run = interrupted["run"]
    done = run.curve()[-1]["step"]
    later = "data.schedule=[{from_positions=1_000_000_000, weights={pydoc=9.0}}]"
    for layout, steps in ((["parallel.tensor=1", "parallel.pipeline=2", later], 2), (["parallel.pipeline=1"], 4)):
        until = done + steps
        result = armillary("resume", run.path, *layout, "--stop-at", until, "--json")
        assert result.returncode == 0, result.stderr
        summary = json.loads(result.stdout)
        assert summary["steps"] == until
        assert not summary["interrupted"]
    curve = run.curve()
    assert [e["step"] for e in curve] == list(range(1, done + 5))
    assert len(list(run.events("step"))) == len(curve), "no step was done twice"
    assert [e["layout"]["world_size"] for e in run.events("launch")] == [2, 2, 1]
    assert (run.path / "loss.png").stat().st_size > 10_000
    refused(armillary("resume", run.path, "--stop-at", done), "is done already")
    refused(armillary("resume", run.path, "model.depth=4"), "model.depth")
    refused(armillary("resume", run.path, "data.seed=4"), "data.seed")
    refused(armillary("resume", run.path, "training.stepz=4"), "training.steps")


def test_a_checkpoint_answers_and_is_scored(interrupted, armillary):
    run = interrupted["run"].path
    image = easy_vqa_questions("test")[0].image

    def answer(*words):
        done = armillary("generate", run, "--prompt", "what shape is in the image?", "--json", *words)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["answer"]

    sampled = ("--image", image, "--temperature", "3", "--max-tokens", "20")
    asked = [("--image", image)] * 2 + [(*sampled, "--seed", seed) for seed in "112"]
    asked += [("--max-tokens", "5"), ("--max-tokens", "5", "--temperature", "3")]
    with ThreadPoolExecutor(2) as pool:
        likeliest, again, one, one_again, two, short, sampled = pool.map(lambda words: answer(*words), asked)
    assert likeliest == again
    assert one == one_again != two
    assert short != sampled
    done = armillary("eval", "run", "easy-vqa", "--model", run, "--limit", "200", "--json")
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)
    assert score["questions"] == 200
    assert score["accuracy"] == score["correct"] / 200
    assert abs(score["blind_accuracy"] - 0.67) < 0.1


def test_a_port_in_use_is_refused_and_leaves_no_run_and_a_run_as_it_was(interrupted, job_file, armillary, tmp_path):
    run = interrupted["run"]
    before = (run.path / "job.toml").read_text()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = armillary("train", job_file, f"metrics.port={port}", "--run-dir", "run")
        refused(done, "metrics of rank 0", str(port), "metrics.port")
        done = armillary("resume", run.path, f"metrics.port={port}")
        refused(done, "metrics of rank 0", str(port), "metrics.port")
    assert (run.path / "job.toml").read_text() == before
    assert not (tmp_path / "run").exists()


def test_runs_the_same_under_torchrun(interrupted, job_file, tmp_path):
    def launch(*words):
        return subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
                *("--master-port", str(free_port()), "-m", "armillary.launcher.torchrun"),
                *map(str, words),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    first = launch(job_file, "--run-dir", "run", "parallel.tensor=2", "training.steps=3")
    assert first.returncode == 0, first.stderr
    second = launch(job_file, "--run-dir", "run", "parallel.data=2", "training.steps=5")
    assert second.returncode == 0, second.stderr
    run = Run(tmp_path / "run")
    losses = [e["loss"] for e in run.events("step")]
    assert [e["step"] for e in run.events("step")] == [1, 2, 3, 4, 5]
    # The run under Ray has more steps, which tell in the learning rate of step 4 and so in the loss of step 5.
    assert losses[:4] == pytest.approx([e["loss"] for e in interrupted["run"].curve()[:4]], rel=1e-5)
    assert run.latest().at().endswith("/step-00000005")
    assert "resuming from step 3" in second.stderr
    targets = [target["labels"]["instance"] for target in json.loads(run.targets_file.read_text())]
    assert targets == ["run/driver", "run/0", "run/1"]
    done = launch(job_file, "--run-dir", "run", "parallel.data=2", "training.steps=5")
    assert done.returncode != 0
    assert "step 5 is done already" in done.stderr
    changed = launch(job_file, "--run-dir", "run", "parallel.data=2", "training.steps=6", "data.seed=9")
    assert changed.returncode != 0
    assert "cannot be resumed with another data.seed" in changed.stderr
    wrong = launch(job_file, "--run-dir", "other", "parallel.world_size=4")
    assert wrong.returncode != 0
    assert "the layout has 4 ranks, torchrun started 2" in wrong.stderr
    assert not (tmp_path / "other").exists()


def test_other_shards_are_not_trained_on(interrupted, armillary, tmp_path, tables):
    """The same keys built from other files: the cursor would mean other documents."""
    job = tmp_path / "job.toml"
    source = own_source(tmp_path / "source")
    job.write_text(f'[data]\npath = "shards"\nsources = [{{kind = "easy_vqa", path = "{source}"}}]\n')
    assert armillary("data", "build", job).returncode == 0
    done = armillary("resume", interrupted["run"].path, f'data.path="{tmp_path / "shards"}"')
    refused(done, "the shards were built with another")
    run = Run(interrupted["run"].path)
    shards = tmp_path / "copy"
    shutil.copytree(tables["data"]["path"], shards)
    manifest = read_manifest(LocalFolder(shards))
    write_manifest(shards, manifest.model_copy(update={"arrow_schema": "another"}).sealed())
    refused(armillary("resume", run.path, f'data.path="{shards}"'), "not the shards")
