import json
from pathlib import Path

import pytest

from tests.conftest import refused


def test_job_check_says_what_it_comes_to(job_file, armillary):
    done = armillary("job", "check", job_file, "parallel.tensor=2")
    assert done.returncode == 0
    assert "2 ranks" in done.stdout
    report = json.loads(armillary("job", "check", job_file, "--json").stdout)
    assert report["job"]["model"]["hidden_size"] == 32
    assert report["warnings"] == []


def test_job_check_warns_of_what_is_not_there_and_of_what_never_comes(job_file, armillary, tmp_path):
    sources = 'data.sources=[{ kind = "jsonl", name = "web", path = "~/none" }, { kind = "pydoc" }]'
    schedule = "data.schedule=[{ from_positions = 1_000_000_000, weights = { web = 0.5 } }]"
    given = (sources, schedule, "data.tokenizer=none.json", f"data.path={tmp_path / 'nowhere'}")
    done = armillary("job", "check", job_file, *given)
    assert done.returncode == 0
    assert f"# warning: data.sources: web: there is nothing at {Path.home() / 'none'}\n" in done.stdout
    assert "# warning: data.tokenizer: there is nothing at " in done.stdout
    assert "# warning: data.schedule: a change at 1,000,341,504 positions never comes" in done.stdout
    assert len(json.loads(armillary("job", "check", job_file, *given, "--json").stdout)["warnings"]) == 3
    trained = armillary("train", job_file, *given)
    refused(trained, "neither a file nor a folder", "none")
    assert "warning: data.schedule: a change at 1,000,341,504 positions never comes" in trained.stderr
    refused(armillary("job", "check", job_file, "data.seq_length=8"), "data.seq_length", "an image takes")


def test_job_explain_lists_every_key(armillary):
    done = armillary("job", "explain")
    assert done.returncode == 0
    assert "optimizer.learning_rate" in done.stdout
    rows = json.loads(armillary("job", "explain", "--json").stdout)
    assert {"key", "type", "default", "meaning"} == set(rows[0])


def test_version_and_help(armillary):
    from armillary import __version__

    assert armillary("--version").stdout.strip() == __version__
    assert "train" in armillary("--help").stdout


@pytest.mark.parametrize("words", [(), ("nonsense",), ("train",), ("generate", "run")])
def test_wrong_usage_exits_2(armillary, words):
    done = armillary(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_generate_refuses_what_it_cannot_answer(armillary, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("not an image")
    refused(armillary("generate", "run", "--prompt", "  "), "prompt is empty")
    refused(armillary("generate", "run", "--prompt", "what?", "--image", text), "cannot be decoded", "text.png")
    refused(armillary("generate", "run", "--prompt", "what?", "--image", "none.png"), "cannot be read", "none.png")
    refused(armillary("generate", "run", "--prompt", "what?"), "no run here")


def test_an_unknown_suite_is_refused(armillary):
    refused(armillary("eval", "run", "mmlu", "--model", "run"), "no suite mmlu", "easy-vqa")


def test_kernels_list_says_what_runs_and_why(armillary):
    found = json.loads(armillary("kernels", "list", "--json").stdout)
    assert {one["operation"] for one in found} >= {"attention", "norm", "rope", "swiglu"}
    assert {one["runs"] for one in found} == {"reference"}
    shown = armillary("kernels", "list").stdout
    assert "the tensors are on CPU" in shown
    assert "attention" in shown


def test_wrong_kernels_are_refused_before_anything_is_built(armillary, job_file, monkeypatch, tmp_path):
    monkeypatch.setenv("ARMILLARY_KERNELS", "reference:normal")
    done = armillary("train", job_file, f"data.path={tmp_path / 'built'}")
    refused(done, "ARMILLARY_KERNELS=reference:normal means nothing", "attention, cross_entropy, norm")
    assert not (tmp_path / "built").exists()
