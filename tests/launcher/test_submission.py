"""From a job file to a RayJob: whatever is in the file, it is refused with a message, or a cluster takes it."""

import re

import pytest
import tomli_w
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from armillary.errors import ArmillaryError, JobError
from armillary.k8s.lints import LONGEST_NAME, NAME, lint, pods
from armillary.launcher.job import explain, parse_toml, resolve
from armillary.launcher.submission import LONGEST_RUN, new_name, rayjob_of, to_yaml
from tests.conftest import ROOT, refused
from tests.k8s import pod_security, schemas

IMAGE = "registry.example/armillary@sha256:" + "0" * 64
TABLES = {
    "name": "fuzz",
    "parallel": {"data": 2, "tensor": 2},
    "kubernetes": {"image": IMAGE, "queue": "train", "volume": "armillary"},
}
KEYS = [key for key, *_ in explain() if "[]" not in key]
VALUES = st.one_of(
    st.integers(-3, 2**40),
    st.floats(allow_nan=True),
    st.booleans(),
    st.text(max_size=30),
    st.sampled_from(
        ["", "none", "1Gi", "$(HOME)", "a: b", "- x", "{}", "\n---\n", "s3://b/c", "nvidia.com/gpu", "~", "é"]
    ),
    st.lists(st.integers(), max_size=3),
)


def job_of(**kubernetes):
    return resolve(TABLES | {"kubernetes": TABLES["kubernetes"] | kubernetes}, "test")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=4))
@example([("kubernetes.memory_per_rank", "007Gi")])
@example([("kubernetes.gpu", "a//b")])
@example([("name", "..")])
@example([("checkpoint.path", "s3://[x")])
def test_every_mutated_job_is_refused_or_taken(changes):
    tables = {key: dict(value) if isinstance(value, dict) else value for key, value in TABLES.items()}
    for key, value in changes:
        table = tables
        *path, last = key.split(".")
        for name in path:
            table = table.setdefault(name, {})
        table[last] = value
    try:
        job = resolve(parse_toml(tomli_w.dumps(tables), "fuzz.toml"), "fuzz.toml")
        name = new_name(job)
        rayjob = rayjob_of(job, name, name, "fuzz.toml")
    except ArmillaryError as refusal:
        told = refusal
        assert told.exit_code == 2
        assert told.what
        assert told.fix
        return
    assert yaml.safe_load(to_yaml(rayjob)) == rayjob
    assert lint(rayjob) == []
    if schemas.CRDS.is_dir():
        assert schemas.check(rayjob)[1] == []
    for _, pod in pods(rayjob["spec"]):
        assert pod_security.violations(pod["spec"], "restricted") == []


@given(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,80}\Z"))
def test_every_jobs_name_makes_one_for_a_run(name):
    run = new_name(resolve(TABLES | {"name": name}, "test"))
    assert NAME.fullmatch(run)
    assert len(run) <= LONGEST_RUN < LONGEST_NAME


@pytest.mark.parametrize(
    ("kubernetes", "tables", "words"),
    [
        ({"image": ""}, {}, "kubernetes.image: a cluster needs an image"),
        ({"image": "armillary:latest"}, {}, "not named by its digest"),
        ({"queue": "", "priority": "high"}, {}, "kubernetes.priority"),
        ({"volume": ""}, {}, "checkpoint.path: pods without kubernetes.volume"),
        ({"volume": ""}, {"checkpoint": {"path": "s3://b/c"}}, "data.path: pods without"),
        ({}, {"checkpoint": {"path": "/elsewhere/c"}}, "checkpoint.path: /elsewhere/c is not on the volume"),
        ({}, {"data": {"path": "../up"}}, "data.path: ../up is not on the volume"),
        ({}, {"cluster": {"address": "h:1"}}, "cluster.address"),
        ({"ranks_per_pod": 1}, {}, "parallel.tensor: 2 ranks are more than a pod's"),
        ({"gpu_model": "x101"}, {}, "x101"),
    ],
)
def test_what_cannot_work_in_a_cluster_is_refused(kubernetes, tables, words):
    job = resolve(TABLES | tables | {"kubernetes": TABLES["kubernetes"] | kubernetes}, "test")
    with pytest.raises(JobError, match=re.escape(words)):
        rayjob_of(job, "r", "r", "job.toml")


def test_shards_may_have_been_built_from_what_pods_do_not_have():
    data = {"path": "s3://bucket/shards", "sources": [{"kind": "text", "path": "/home/me/raw"}]}
    assert rayjob_of(resolve(TABLES | {"data": data}, "test"), "r", "r", "job.toml")


def test_what_does_not_fit_the_gpus_is_refused_unless_forced():
    large = {"model": {"depth": 80, "hidden_size": 8192, "num_heads": 64}, "kubernetes": {"gpu_model": "h100"}}
    job = resolve(TABLES | large | {"kubernetes": TABLES["kubernetes"] | large["kubernetes"]}, "test")
    with pytest.raises(JobError, match="the layout needs"):
        rayjob_of(job, "r", "r", "job.toml")
    assert rayjob_of(job, "r", "r", "job.toml", force=True)


@pytest.mark.parametrize("run", ["A", "1a", "a_b", "a" * 44, "a-", ""])
def test_a_run_is_named_as_a_service_may_be(run):
    with pytest.raises(JobError, match="cannot be named"):
        rayjob_of(job_of(), run, run, "job.toml")


def test_render_prints_what_submit_would_create(armillary, tmp_path):
    (tmp_path / "job.toml").write_text(tomli_w.dumps(TABLES))
    done = armillary("render", "job.toml", "--run", "mine", "--queue", "other", "training.steps=7")
    assert done.returncode == 0, done.stderr
    rayjob = yaml.safe_load(done.stdout)
    assert rayjob["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "other"
    assert "steps = 7" in done.stdout
    if schemas.CRDS.is_dir():
        assert schemas.check(rayjob)[1] == []
    refused(armillary("render", "job.toml", "kubernetes.image=armillary:1"), "by its digest", "--allow-tag")
    assert armillary("render", "job.toml", "kubernetes.image=armillary:1", "--allow-tag").returncode == 0


def test_the_job_of_the_documentation_is_taken():
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "kubernetes.md").read_text(), re.S)
    job = resolve(parse_toml(text.replace("sha256:...", "sha256:" + "0" * 64), "docs"), "docs")
    assert lint(rayjob_of(job, "llm-7b", "llm-7b", "docs")) == []
