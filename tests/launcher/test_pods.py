"""What would run in a cluster's pods, run once for real: submit, train, status, preemption, resume, cancel.

The pods of the RayJob are processes of this machine (tests/k8s/kuberay.py), with the commands, hooks and environment
that it gives them.
"""

import json
import re
import shutil
import urllib.request

import pytest
import tomli_w

from armillary.k8s.rayjob import METRICS_PORT
from armillary.launcher import metric_docs
from armillary.launcher.run import Run
from tests.chaos.nodes import each_step_once
from tests.conftest import refused
from tests.k8s.api import Api
from tests.k8s.controllers import Kueue
from tests.k8s.kuberay import Cluster, KubeRay
from tests.launcher.shell import IMAGE, Shell, wait_for

PLANTED = "planted-7d3f1c"  # the value of a secret, which nothing may show
KUBERNETES = {"image": IMAGE, "queue": "train", "volume": "armillary", "gpu": "", "cpus_per_rank": 1, "head_cpus": 1,
              "ranks_per_pod": 1, "memory_per_rank": "1Gi", "secret": "store"}  # fmt: skip


@pytest.fixture
def volume(tmp_path, shards):
    """What all pods share."""
    shutil.copytree(shards, tmp_path / "volume" / "shards")
    return tmp_path / "volume"


def test_a_run_is_submitted_trains_is_suspended_goes_on_and_is_cancelled(tables, volume, tmp_path):
    data = tables["data"] | {"path": "shards"}
    training = tables["training"] | {"steps": 100_000, "deterministic": True}
    job = tables | {"data": data, "training": training, "parallel": {"data": 2}, "kubernetes": KUBERNETES}
    (tmp_path / "job.toml").write_text(tomli_w.dumps(job))
    run = Run(volume / "runs" / "mine")
    with Api(tmp_path) as api, Kueue(api) as kueue, KubeRay(api, volume, {"store": {"KEY": PLANTED}}) as operator:
        api.namespace("armillary", **{"pod-security.kubernetes.io/enforce": "restricted"})
        shell = Shell(tmp_path, api.kubeconfig(namespace="armillary"))
        assert shell("submit", "job.toml", "--run", "mine", "--detach").returncode == 0

        def status() -> dict:
            assert not kueue.error, kueue.error
            assert not operator.error, operator.error
            return json.loads(shell("status", "mine", "--json").stdout)

        def training_at(least: int) -> dict:
            return wait_for(
                lambda: (
                    (found := status())["progress"] is not None
                    and found["progress"]["state"] == "training"
                    and found["progress"]["step"] > least
                    and found
                ),
                240,
            )

        found = training_at(10)
        assert found["phase"] == "running"
        assert found["progress"]["ranks"] == 2
        assert found["progress"]["tokens_per_second"] > 0
        assert found["progress"]["eta_seconds"] > 0
        (cluster,) = operator.clusters.values()
        in_one_place = metrics_of_pods(cluster)
        emitted = {name for text in in_one_place for name in re.findall(r"^(armillary_\w+)", text, re.M)}
        assert emitted == metric_docs.names()
        head, *workers = [re.findall(r'steps_total{.*rank="(\d)"', text) for text in in_one_place]
        assert head == []
        assert sorted(workers) == [["0"], ["1"]]
        assert run.job().cluster.address == "auto"

        # The stream of the driver's output breaks: the submitter asks for it anew, and the run knows nothing of it.
        cluster.service.cut()
        training_at(found["progress"]["step"])
        (lines,) = api.logs.values()
        said = [line for _, line in lines if line.startswith('{"')]
        assert len(said) == len(set(said))

        # One pod has to make room: its rank saves, and the run goes on with the other.
        cluster.workers[1].end()
        wait_for(lambda: layouts(run) == [2, 1], 60)
        assert [event["interrupted"] for event in run.events("ended")] == [True]

        # All are suspended, and come back before they are gone, as Kueue may let them: who comes waits for who goes.
        at = run.latest_step()
        training_at(at)
        assert shell("suspend", "mine").returncode == 0
        wait_for(lambda: api.store.select("ray.io/v1", "rayjobs")[0]["status"]["jobDeploymentStatus"] == "Suspended")
        assert status()["phase"] == "stopping"
        refused(shell("resume", "mine"), "the run mine is stopping", "wait for it")
        (workload,) = [key for key in api.store.objects if key.plural == "workloads"]
        api.store.update(workload, {"spec": {"active": True}})
        wait_for(lambda: layouts(run) == [2, 1, 2], 120)
        saved = list(run.events("launch"))[-1]["from_step"]
        assert run.latest_step() == run.curve()[-1]["step"] == saved > at, "all that was done was saved"

        training_at(saved)
        assert shell("cancel", "mine").returncode == 0
        wait_for(lambda: not api.store.select("v1", "pods"), 60)
        assert not [key for key in api.store.objects if key.plural in ("rayjobs", "workloads")]
        assert run.latest_step() == run.curve()[-1]["step"] > saved
    assert each_step_once(run)
    for secret in (PLANTED, *operator.tokens):
        assert secret not in shell("render", "job.toml").stdout
        assert_nowhere(secret, api, run)


def layouts(run: Run) -> list[int]:
    return [event["layout"]["data"] for event in run.events("launch")] if run.path.exists() else []


def assert_nowhere(secret: str, api: Api, run: Run) -> None:
    """Not in any object, request or log of the cluster, nor in a file of the run."""
    said = "\n".join(line for lines in api.logs.values() for _, line in lines)
    assert secret not in json.dumps([change.thing for change in api.store.changes]) + said + str(api.requests)
    for path in run.path.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path


def metrics_of_pods(cluster: Cluster) -> list[str]:
    """Of the head's and each worker's, from the port that the PodMonitor names."""
    found = []
    for pod in (cluster.head, *cluster.workers):
        with urllib.request.urlopen(f"http://127.0.0.1:{pod.ports[METRICS_PORT]}/metrics", timeout=20) as reply:
            found.append(reply.read().decode())
    return found
