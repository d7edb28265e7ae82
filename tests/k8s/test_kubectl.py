"""The real kubectl: on the overlays, and on an API server with the real CRDs' schemas."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ARMILLARY, ROOT
from tests.k8s import schemas
from tests.k8s.api import Api
from tests.k8s.test_rayjob import FULL, made, with_crds

KUBECTL = Path(ARMILLARY).with_name("kubectl")
OVERLAYS = sorted(path.name for path in (ROOT / "k8s" / "overlays").iterdir())
OF_CLUSTER = {"Namespace", "ClusterQueue", "ResourceFlavor", "Topology", "WorkloadPriorityClass"}


def kubectl(*words: str, given: str = "", kubeconfig: Path | str = "/dev/null") -> subprocess.CompletedProcess:
    environment = os.environ | {"KUBECONFIG": str(kubeconfig)}
    return subprocess.run([KUBECTL, *words], input=given, env=environment, capture_output=True, text=True, timeout=60,
                          check=False)  # fmt: skip


def built(overlay: str = "") -> list[dict]:
    """The objects of an overlay; without one, what a cluster has once."""
    done = kubectl("kustomize", str(ROOT / "k8s" / ("overlays" if overlay else "cluster") / overlay))
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(things: list[dict], kind: str) -> list[dict]:
    return [thing for thing in things if thing["kind"] == kind]


def test_the_overlays_are_these():
    assert OVERLAYS == ["dev", "prod", "rdma"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_whole_and_each_object_right(overlay):
    things = built(overlay)
    kinds = {thing["kind"] for thing in things}
    assert kinds >= {"Namespace", "Role", "RoleBinding", "ServiceAccount", "NetworkPolicy", "PersistentVolumeClaim",
                     "ClusterQueue", "LocalQueue", "PodMonitor"}  # fmt: skip
    assert_right(things)
    (namespace,) = of_kind(things, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    homes = {thing["metadata"]["namespace"] for thing in things if thing["kind"] not in OF_CLUSTER}
    assert homes == {namespace["metadata"]["name"]}
    queues = {thing["metadata"]["name"] for thing in of_kind(things, "ClusterQueue")}
    assert {thing["spec"]["clusterQueue"] for thing in of_kind(things, "LocalQueue")} == queues
    (queue,) = of_kind(things, "ClusterQueue")
    chosen = queue["spec"]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert chosen == namespace["metadata"]["name"]
    (group,) = queue["spec"]["resourceGroups"]
    counted = [one["name"] for one in group["flavors"][0]["resources"]]
    assert counted == group["coveredResources"]
    assert ("rdma/hca_shared_devices" in counted) == (overlay == "rdma")


def assert_right(things: list[dict]) -> None:
    for thing in things:
        if schemas.CRDS.is_dir() or "." not in thing["apiVersion"] or ".k8s.io/v1" in thing["apiVersion"][-10:]:
            assert schemas.check(thing)[1] == [], thing["metadata"]["name"]


def test_what_a_cluster_has_once_is_in_no_overlay_and_no_two_overlays_share_a_namespace_or_a_queue():
    once = {(thing["kind"], thing["metadata"]["name"]) for thing in built()}
    assert_right(built())
    assert {kind for kind, _ in once} == {"ResourceFlavor", "Topology", "WorkloadPriorityClass", "PrometheusRule",
                                          "ConfigMap"}  # fmt: skip
    homes = {thing["metadata"].get("namespace") for thing in built()}
    assert homes == {None, "monitoring"}
    named = {}
    for overlay in ("dev", "prod"):  # rdma is prod, with more in its queue
        things = built(overlay)
        named[overlay] = {(thing["kind"], thing["metadata"]["name"]) for thing in things if thing["kind"] in OF_CLUSTER}
        assert not named[overlay] & once
        flavors = {one["name"] for thing in of_kind(things, "ClusterQueue")
                   for group in thing["spec"]["resourceGroups"] for one in group["flavors"]}  # fmt: skip
        assert {("ResourceFlavor", name) for name in flavors} <= once
    assert not named["dev"] & named["prod"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_submitters_role_names_no_secret_and_no_way_into_a_pod(overlay):
    (role,) = of_kind(built(overlay), "Role")
    resources = {resource for rule in role["rules"] for resource in rule["resources"]}
    assert resources == {"rayjobs", "workloads", "pods", "pods/log"}
    assert not [rule for rule in role["rules"] if "*" in rule["verbs"] + rule["resources"] + rule["apiGroups"]]
    (account,) = of_kind(built(overlay), "ServiceAccount")
    assert account["automountServiceAccountToken"] is False


def test_network_policies_let_in_who_has_to_come_in_and_nobody_else():
    policies = {thing["metadata"]["name"]: thing["spec"] for thing in of_kind(built("prod"), "NetworkPolicy")}
    assert policies["armillary-none"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    doors = policies["armillary-cluster"]["ingress"]
    ports = [sorted(port["port"] for port in door.get("ports", ())) for door in doors]
    assert ports == [[], [8265], [52365], [8080, 9400]]
    assert all("ipBlock" not in one for door in doors for one in door["from"])
    job = made(**FULL)
    labels = job["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    assert policies["armillary-submitter"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert policies["armillary-dns"]["podSelector"]["matchLabels"].items() <= labels.items()
    (storage,) = policies["armillary-storage"]["egress"]
    assert "169.254.0.0/16" in storage["to"][0]["ipBlock"]["except"], "the cloud's metadata address"


def test_what_is_scraped_are_the_ports_that_pods_have():
    (monitor,) = of_kind(built("prod"), "PodMonitor")
    job = made(**FULL)
    cluster = job["spec"]["rayClusterSpec"]
    for pod in (cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]):
        names = {port["name"] for one in pod["spec"]["containers"] for port in one.get("ports", ())}
        assert names >= {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        assert monitor["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    with Api(tmp_path_factory.mktemp("api")) as api:
        yield api


@with_crds
def test_a_cluster_takes_what_it_has_once(api):
    api.namespace("monitoring")
    text, config = kubectl("kustomize", str(ROOT / "k8s" / "cluster")).stdout, api.kubeconfig()
    for words in (("--dry-run=server",), ()):
        done = kubectl("apply", "--server-side", *words, "-f", "-", given=text, kubeconfig=config)
        assert done.returncode == 0, done.stderr


@with_crds
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_cluster_takes_an_overlay(api, overlay):
    text = kubectl("kustomize", str(ROOT / "k8s" / "overlays" / overlay)).stdout
    namespace = of_kind(built(overlay), "Namespace")[0]["metadata"]["name"]
    config = api.kubeconfig(namespace=namespace)
    for words in (("--dry-run=server",), ()):
        if words and not api.store.select("v1", "namespaces", query={"fieldSelector": f"metadata.name={namespace}"}):
            continue  # nothing can be tried in a namespace that is not there
        done = kubectl("apply", "--server-side", *words, "-f", "-", given=text, kubeconfig=config)
        assert done.returncode == 0, done.stderr
    assert kubectl("get", "localqueues", "-o", "name", kubeconfig=config).stdout.strip().endswith("/train")


@with_crds
def test_kubectl_takes_explains_shows_and_waits_for_what_is_rendered(api, tmp_path):
    api.namespace("kubectl")
    config = api.kubeconfig(namespace="kubectl")
    job = made(**FULL)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    dry = kubectl("apply", "--dry-run=server", "-f", str(tmp_path / "job.yaml"), kubeconfig=config)
    assert "created (server dry run)" in dry.stdout, dry.stderr
    assert kubectl("get", "rayjob", "demo-1", kubeconfig=config).returncode != 0
    done = kubectl("apply", "-f", str(tmp_path / "job.yaml"), kubeconfig=config)
    assert done.returncode == 0, done.stderr
    shown = json.loads(kubectl("get", "rayjob", "demo-1", "-o", "json", kubeconfig=config).stdout)
    assert shown["spec"]["entrypoint"] == job["spec"]["entrypoint"]
    assert "demo-1" in kubectl("get", "rayjobs", kubeconfig=config).stdout
    assert "preRunningDeadlineSeconds" in kubectl("explain", "rayjob.spec", kubeconfig=config).stdout
    key = next(key for key in api.store.objects if key.name == "demo-1")
    api.store.update(key, {"status": {"jobDeploymentStatus": "Complete"}})
    waited = kubectl("wait", "rayjob/demo-1", "--for=jsonpath={.status.jobDeploymentStatus}=Complete", "--timeout=20s",
                     kubeconfig=config)  # fmt: skip
    assert waited.returncode == 0, waited.stderr
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["contaners"] = []
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(job))
    wrong = kubectl("apply", "-f", str(tmp_path / "wrong.yaml"), kubeconfig=config)
    assert wrong.returncode != 0
    assert "contaners" in wrong.stderr


@with_crds
def test_pod_security_refuses_what_rdma_used_to_ask_for(api):
    """The check has teeth: the same pod with IPC_LOCK is refused, by 'restricted' and by 'baseline'."""
    pod = made(**FULL)["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    thing = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod["spec"]}
    for level in ("restricted", "baseline"):
        api.namespace(f"ps-{level}", **{"pod-security.kubernetes.io/enforce": level})
        config = api.kubeconfig(f"ps-{level}", "system:masters", namespace=f"ps-{level}")
        words = ("create", "--dry-run=server", "-f", "-")
        taken = kubectl(*words, given=json.dumps(thing), kubeconfig=config)
        assert taken.returncode == 0, taken.stderr
        loose = json.loads(json.dumps(thing))
        loose["spec"]["containers"][0]["securityContext"]["capabilities"]["add"] = ["IPC_LOCK"]
        refused = kubectl(*words, given=json.dumps(loose), kubeconfig=config)
        assert refused.returncode != 0
        assert "violates PodSecurity" in refused.stderr
