"""What the command line refuses before any rank starts, and that nothing is left behind."""

import pytest

from tests.conftest import refused
from tests.data_pipeline.test_build import own_source

TINY = ("model.depth=1", "model.hidden_size=32", "model.num_heads=2", "model.vision_num_heads=2")


def test_a_run_directory_that_exists_is_not_touched(job_file, armillary, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refused(armillary("train", job_file, "--run-dir", "run"), "exists already", "--run-dir")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_resuming_from_nothing_is_refused(armillary):
    refused(armillary("resume", "nowhere"), "no run here", "armillary train")


def test_paths_in_a_job_are_those_of_the_folder_it_was_started_in(armillary, tmp_path):
    own_source(tmp_path / "source")
    job = tmp_path / "job.toml"
    job.write_text('[data]\npath = "shards"\nsources = [{kind = "easy_vqa", path = "source"}]\n')
    first = armillary("data", "build", job, "--json")
    assert first.returncode == 0
    assert armillary("data", "build", job, "--json").stdout == first.stdout, "built once, reported twice"
    refused(armillary("data", "build", job, "data.vocab_size=300"), "data.vocab_size", "--force")
    done = armillary("train", job, "parallel.tensor=7", "model.depth=1")  # would build, or refuse the shards
    refused(done, "tensor=7")
    done = armillary("train", job, "--run-dir", "run", "metrics.port=1", "metrics.host=192.0.2.77", *TINY)
    refused(done, "the metrics of the driver cannot be served")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["job.toml", "shards", "source"]


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_shard_is_refused_before_anything_starts(armillary, tmp_path, damage):
    source = own_source(tmp_path / "source")
    job = tmp_path / "job.toml"
    job.write_text(f'[data]\npath = "shards"\nsources = [{{kind = "easy_vqa", path = "{source}"}}]\n')
    assert armillary("data", "build", job).returncode == 0
    shard = tmp_path / "shards" / "easy_vqa-00000-00000.arrow"
    if damage == "flip":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    else:
        shard.unlink()
    done = armillary("train", job, "--run-dir", "run")
    refused(done, str(shard.name), "data build", "corrupted" if damage == "flip" else "missing")
    assert not (tmp_path / "run").exists()


def test_an_unreadable_image_is_refused_and_no_shards_are_left(armillary, tmp_path):
    source = own_source(tmp_path / "source")
    (source / "train" / "images" / "1.png").write_bytes(b"\x89PNG not really")
    job = tmp_path / "job.toml"
    job.write_text(f'[data]\npath = "shards"\nsources = [{{kind = "easy_vqa", path = "{source}"}}]\n')
    for command in (("data", "build", job), ("train", job, "--run-dir", "run")):
        refused(armillary(*command), "cannot be decoded", "1.png")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["job.toml", "source"]


def test_misspelt_keys_and_layouts_are_refused(job_file, armillary, tmp_path):
    refused(armillary("train", job_file, "training.stepz=3"), "training.stepz", "did you mean training.steps?")
    refused(armillary("train", job_file, "parallel.tensor=3"), "tensor=3", "model.num_heads=4")
    refused(armillary("job", "check", job_file, "parallel.pipeline=3"), "pipeline=3", "model.depth=2")
    refused(armillary("train", "none.toml"), "no such job file")
    assert [p.name for p in tmp_path.iterdir()] == ["job.toml"]


def test_joining_a_cluster_needs_its_token(job_file, armillary, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    done = armillary("train", job_file, "--address", "127.0.0.1:1", "--run-dir", "run")
    refused(done, "no token", "RAY_AUTH_TOKEN_PATH")
    assert not (tmp_path / "run").exists()
