"""The RayJob that a run becomes: by its golden, the CRD's schema, Pod Security and the operator's rules."""

import copy
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from armillary.errors import JobError
from armillary.k8s.config import KubernetesConfig
from armillary.k8s.lints import lint, pods
from armillary.k8s.rayjob import Submission, ray_job, times
from tests.conftest import ROOT
from tests.k8s import pod_security, schemas

IMAGE = "registry.example/armillary@sha256:" + "0" * 64
GOLDENS = ROOT / "tests" / "k8s" / "goldens"
FULL = {
    "image": IMAGE, "queue": "train", "priority": "armillary-high", "network": "rdma/hca_shared_devices",
    "rack": "topology.kubernetes.io/rack", "volume": "armillary", "secret": "store", "service_account": "armillary-run",
}  # fmt: skip

with_crds = pytest.mark.skipif(not schemas.CRDS.is_dir(), reason="../shared/crds, with KubeRay's schema, is not here")


def submission(world_size=16, tensor=4, **config) -> Submission:
    return Submission(
        "demo-1", "20260101-000000", "demo-1", 'name = "demo"\n', world_size, tensor, 30.0, KubernetesConfig(**config)
    )


def made(**config) -> dict:
    return ray_job(submission(**{"image": IMAGE} | config))


def containers(job: dict) -> list[dict]:
    return [one for _, pod in pods(job["spec"]) for one in pod["spec"]["containers"]]


@pytest.mark.parametrize(("name", "config"), [("full", FULL), ("least", {"image": IMAGE, "gpu": ""})])
def test_is_what_the_golden_says(name, config):
    """`python -m tests.k8s.test_rayjob` writes them anew: read the difference before you keep it."""
    golden = yaml.safe_load((GOLDENS / f"{name}.yaml").read_text())
    job = made(**config)
    assert golden["spec"]["rayClusterSpec"].pop("rayVersion")
    assert re.fullmatch(r"2\.\d+\.\d+", job["spec"]["rayClusterSpec"].pop("rayVersion"))
    assert job == golden


@with_crds
@pytest.mark.parametrize("config", [FULL, {}, {"gpu": ""}, {"queue": "train"}, {"volume": "armillary"}])
def test_the_operators_schema_takes_it_with_no_field_unknown(config):
    job = made(**config)
    assert schemas.check(job)[1] == []
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    assert "imagee" in schemas.check(job)[1][0]


@pytest.mark.parametrize("config", [FULL, {}, {"gpu": ""}])
def test_all_three_kinds_of_pods_are_restricted_and_have_no_token(config):
    found = dict(pods(made(**config)["spec"]))
    assert len(found) == 3
    for path, pod in found.items():
        assert pod_security.violations(pod["spec"], "restricted") == [], path
        assert pod["spec"]["automountServiceAccountToken"] is False
    loose = copy.deepcopy(found["spec.submitterPodTemplate"])
    loose["spec"]["containers"][0]["securityContext"]["capabilities"]["add"] = ["IPC_LOCK"]
    assert pod_security.violations(loose["spec"], "baseline"), "the check can see something"


def test_secrets_come_by_reference_to_ray_containers_alone():
    named = [one for one in containers(made(secret="store")) if "envFrom" in one]
    assert [one["name"] for one in named] == ["ray-head", "ray-worker"]
    assert named[0]["envFrom"] == [{"secretRef": {"name": "store"}}]


def test_what_a_pod_asks_for_is_what_it_may_use():
    worker = next(one for one in containers(made(**FULL)) if one["name"] == "ray-worker")
    assert worker["resources"]["limits"] == worker["resources"]["requests"] == {
        "cpu": "64", "memory": "512Gi", "nvidia.com/gpu": "8", "rdma/hca_shared_devices": "8",
    }  # fmt: skip
    assert all(one["resources"]["limits"] == one["resources"]["requests"] for one in containers(made()))


def test_a_pod_has_time_to_save_and_to_leave():
    for _, pod in list(pods(made()["spec"]))[1:]:
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 30 + 30, "the save's grace and Ray's drain"
        assert pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1] == "stop"


def test_a_queued_run_waits_for_kueue_and_one_without_a_queue_starts():
    assert made(queue="train")["spec"]["suspend"] is True
    assert made()["spec"]["suspend"] is False


def test_kubernetes_puts_no_variable_into_the_job_file():
    one = submission(image=IMAGE)
    job = ray_job(Submission(one.name, one.made, one.run, "a = '$(HOME) $$ $'", 1, 1, 30.0, one.config))
    (text,) = (entry["value"] for one in containers(job) for entry in one.get("env", ())
               if entry["name"] == "ARMILLARY_JOB")  # fmt: skip
    assert text == "a = '$$(HOME) $$$$ $$'"


@given(tensor=st.sampled_from([1, 2, 4, 8]), groups=st.integers(1, 300), most=st.integers(1, 16))
def test_pods_hold_all_ranks_and_no_tensor_parallel_group_is_cut(tensor, groups, most):
    one = submission(world_size=tensor * groups, tensor=tensor, ranks_per_pod=most)
    if tensor > most:
        with pytest.raises(JobError, match="tensor"):
            _ = one.pods
        return
    count, ranks = one.pods
    assert count * ranks == tensor * groups
    assert ranks <= most
    assert ranks % tensor == 0
    larger = [size for size in range(ranks + 1, most + 1) if size % tensor == 0 and (tensor * groups) % size == 0]
    assert not larger


def test_memory_is_multiplied_in_its_unit():
    assert times("64Gi", 8) == "512Gi"
    assert times("100Mi", 3) == "300Mi"


# What is changed in a RayJob, and which field is named for it.
WRONG = {
    "a long name": (lambda job: job["metadata"].update(name="a" * 48), "metadata.name"),
    "a name with a point": (lambda job: job["metadata"].update(name="a.b"), "metadata.name"),
    "ttl without an end": (
        lambda job: job["spec"].update(shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=9),
        "ttlSecondsAfterFinished",
    ),
    "suspend without an end": (
        lambda job: job["spec"].update(shutdownAfterJobFinishes=False, suspend=True, ttlSecondsAfterFinished=0),
        "spec.suspend",
    ),
    "another's cluster with retries": (lambda job: job["spec"].update(clusterSelector={"a": "b"}), "backoffLimit"),
    "a template for no pod": (lambda job: job["spec"].update(submissionMode="SidecarMode"), "submitterPodTemplate"),
    "an old Ray": (lambda job: job["spec"]["rayClusterSpec"].update(rayVersion="2.53.0"), "rayVersion"),
    "no Ray": (lambda job: job["spec"]["rayClusterSpec"].pop("rayVersion"), "rayVersion"),
    "no token": (lambda job: job["spec"]["rayClusterSpec"].pop("authOptions"), "authOptions.mode"),
    "a token of Kubernetes": (
        lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(enableK8sTokenAuth=True), "enableK8sTokenAuth",
    ),
    "a head without a dashboard": (
        lambda job: next(one for one in containers(job) if one["name"] == "ray-head").update(
            ports=[{"name": "metrics", "containerPort": 8080}]
        ), "ports",
    ),
    "a tag": (lambda job: containers(job)[0].update(image="armillary:1"), "image"),
    "no image": (lambda job: containers(job)[0].update(image=""), "image"),
    "a service account's token": (
        lambda job: job["spec"]["submitterPodTemplate"]["spec"].pop("automountServiceAccountToken"), "automount",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_the_operator_would_refuse_is_refused_before(name):
    change, field = WRONG[name]
    job = made()
    assert lint(job) == []
    change(job)
    assert any(field in path for path, _ in lint(job)), lint(job)


def test_a_tag_may_be_allowed():
    job = made(image="armillary:1")
    assert lint(job)
    assert lint(job, allow_tag=True) == []


if __name__ == "__main__":
    from armillary.launcher.submission import to_yaml

    GOLDENS.mkdir(exist_ok=True)
    (GOLDENS / "full.yaml").write_text(to_yaml(made(**FULL)))
    (GOLDENS / "least.yaml").write_text(to_yaml(made(gpu="")))
