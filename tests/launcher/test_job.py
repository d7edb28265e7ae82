import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.errors import JobError
from armillary.launcher.job import Job, apply_overrides, explain, load_job, resolve
from tests.conftest import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda p: p.name)
def test_every_example_is_right(path):
    assert load_job(path).parallel.world_size >= 1


def test_the_resolved_job_reads_back_as_itself(job_file, tmp_path):
    job = load_job(job_file, ["parallel.tensor=2"])
    again = tmp_path / "again.toml"
    again.write_text(job.to_toml())
    assert load_job(again) == job
    assert load_job(again).hash() == job.hash()
    assert load_job(job_file).hash() != job.hash()


@given(st.dictionaries(st.sampled_from("abc"), st.integers() | st.booleans() | st.text("xyz ", min_size=1), min_size=1))
def test_overrides_set_what_they_name(values):
    spelled = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in values.items()}
    job = apply_overrides({"t": {"kept": 1}}, [f"t.{k}={v}" for k, v in spelled.items()])
    assert job == {"t": {"kept": 1, **{k: v if not isinstance(v, str) else str(v) for k, v in values.items()}}}


def test_overrides_take_toml_values(job_file):
    job = load_job(job_file, ["optimizer.learning_rate=1e-4", 'data.sources=[{kind="pydoc"}]', "name=other"])
    assert job.optimizer.learning_rate == 1e-4
    assert [source.kind for source in job.data.sources] == ["pydoc"]
    assert job.name == "other"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.stepz=5", ["training.stepz", "no such key", "training.steps"]),
        ("trainng.steps=5", ["trainng", "training"]),
        ("modle={depth=2}", ["modle", "model"]),
        ("data.sources=[{kind='easy_vqa', wieght=1}]", ["wieght", "weight"]),
        ("data.sources=[{kind='imagenet'}]", ["data.sources.0.kind", "easy_vqa"]),
        ("data.sources=[]", ["at least one source"]),
        ("data.sources=[{kind='pydoc'},{kind='pydoc'}]", ["same name"]),
        ("data.sources=[{kind='pydoc', weight=0}]", ["weights from position 0", "not all 0"]),
        ("data.sources=[{kind='pydoc', weight=inf}]", ["weight", "finite number"]),
        ("data.schedule=[{from_positions=5, weights={pydocs=1}}]", ["pydocs"]),
        ("data.sources=[{kind=pydoc}]", ["not valid TOML", "single quotes"]),
        ("steps=5", ["did you mean training.steps?"]),
        ("model=3", ["a table is needed"]),
        ("training.steps=many", ["training.steps", "a whole number is needed"]),
        ("training.steps=1.5", ["training.steps", "a whole number is needed"]),
        ("optimizer.learning_rate=inf", ["optimizer.learning_rate", "a finite number is needed"]),
        ("training.steps=0", ["training.steps", "greater"]),
        ("training.precision=fp8", ["training.precision", "fp32"]),
        ("name='../outside'", ["name"]),
        ("model.vocab_size=300", ["vocab_size"]),
        ("model.num_heads=5", ["num_heads=5"]),
        ("parallel.tensor=3", ["tensor=3 does not divide", "model.num_heads", "1, 2 would"]),
        ("parallel.pipeline=4", ["pipeline=4", "model.depth"]),
        ("parallel.data=3", ["global_batch"]),
        ("parallel.world_size=3", ["global_batch"]),
        ("parallel.sequence_parallel=true", ["parallel.tensor above 1"]),
        ("training", ["table.key=value"]),
        ("=3", ["table.key=value"]),
        ("name.first=3", ["not a table"]),
    ],
)
def test_a_refusal_names_file_key_and_remedy(job_file, override, words):
    with pytest.raises(JobError) as error:
        load_job(job_file, [override])
    for word in words:
        assert word in str(error.value)
    assert error.value.where in (str(job_file), "command line")
    assert error.value.fix


def test_a_world_size_that_the_layout_does_not_divide_is_refused(job_file):
    with pytest.raises(JobError, match="world_size=3"):
        load_job(job_file, ["parallel.world_size=3", "parallel.tensor=2"])


@pytest.mark.parametrize("content", ["name = ", "[model\n", "\xff\xfe"])
def test_what_is_not_toml_is_refused(tmp_path, content):
    path = tmp_path / "job.toml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(JobError):
        load_job(path)
    with pytest.raises(JobError, match="no such job file"):
        load_job(tmp_path / "none.toml")


def test_an_empty_job_is_a_job_of_defaults():
    assert resolve({}, "test").model.vocab_size == 512


def test_explain_covers_every_key_with_a_meaning():
    rows = {key: (kind, default, meaning) for key, kind, default, meaning in explain()}

    def keys(value, prefix=""):
        for key, inner in value.items():
            if isinstance(inner, dict) and prefix + key not in rows:
                yield from keys(inner, f"{prefix}{key}.")
            elif isinstance(inner, list):
                yield from keys(inner[0], f"{prefix}{key}[].")
            else:
                yield prefix + key

    schedule = {"schedule": [{"from_positions": 1, "weights": {"easy_vqa": 2.0}}]}
    assert set(rows) == set(keys(tomllib.loads(Job.model_validate({"data": schedule}).to_toml())))
    assert all(kind and default and meaning for kind, default, meaning in rows.values())
    assert rows["training.precision"][0] == '"fp32" | "bf16"'
    assert rows["data.sources[].kind"][1] == "(required)"


def test_components_see_only_their_own_tables():
    from armillary.training.config import TrainJob

    assert set(Job.model_fields) - set(TrainJob.model_fields) == {"name", "cluster", "kubernetes"}


def test_paths_are_made_absolute_from_the_home_and_the_folder_that_a_command_is_run_in(job_file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    source = 'data.sources=[{ kind = "jsonl", path = "texts" }, { kind = "images", path = "~/pictures" }]'
    given = ["data.path=~/shards", "data.cache=cache", "data.tokenizer=~/t.json", source]
    data = load_job(job_file, given).with_absolute_paths().data
    assert (data.path, data.cache) == ("/home/somebody/shards", str(tmp_path / "cache"))
    assert data.tokenizer == "/home/somebody/t.json"
    assert [one.path for one in data.sources] == [str(tmp_path / "texts"), "/home/somebody/pictures"]
    assert load_job(job_file, ["data.path=s3://bucket/x"]).with_absolute_paths().data.path == "s3://bucket/x"


@pytest.mark.parametrize("path", ["s3://", "s3:///b", "s3:/b/c", "://b", "s3://bucket with space/c", "s3://?x"])
@pytest.mark.parametrize("key", ["checkpoint.path", "checkpoint.start", "data.path"])
def test_what_is_meant_for_a_url_and_is_none_is_refused(key, path):
    table, name = key.split(".")
    with pytest.raises(JobError, match=rf"{table}\.{name}: it is no URL"):
        resolve({table: {name: path}}, "test")


@pytest.mark.parametrize(
    "path", ["s3://u:planted@b/c", "s3://b/c?secret_access_key=planted", "s3://b/c?endpoint=http://u:planted@h"]
)
def test_a_secret_in_a_url_is_refused_and_not_shown(path):
    tables = ({"checkpoint": {"path": path}}, {"data": {"sources": [{"kind": "text", "path": path}]}})
    for one in tables:
        with pytest.raises(JobError, match="there is a secret in it") as refused:
            resolve(one, "test")
        assert "planted" not in str(refused.value)


@pytest.mark.parametrize(
    "path", ["", "runs", "/a/b", "../c", "s3://b", "s3://b/c/d", "memory://x", "file:///tmp/x", "a:b"]
)
def test_paths_and_urls_are_taken(path):
    assert resolve({"checkpoint": {"path": path}}, "test").checkpoint.path == path
