"""What would run in a cluster's pods, run once for real: submit, train, status, preemption, resume, cancel.

The pods of the RayJob are processes of this machine (tests/k8s/kuberay.py), with the commands, hooks and environment
that it gives them.
"""

import contextlib
import json
import re
import shutil
import urllib.request
from pathlib import Path

import pytest
import tomli_w

from armillary.k8s.rayjob import METRICS_PORT
from armillary.launcher import metric_docs
from armillary.launcher.run import Run
from tests.chaos.nodes import each_step_once
from tests.conftest import refused
from tests.k8s.api import Api
from tests.k8s.controllers import Kueue
from tests.k8s.kuberay import KubeRay, RayCluster
from tests.launcher.shell import IMAGE, Shell, wait_for

PLANTED = "planted-7d3f1c"  # the value of a secret, which nothing may show
KUBERNETES = {"image": IMAGE, "queue": "train", "volume": "armillary", "gpu": "", "cpus_per_rank": 1, "head_cpus": 1,
              "ranks_per_pod": 1, "memory_per_rank": "1Gi", "secret": "store"}  # fmt: skip


@pytest.fixture
def volume(tmp_path, shards):
    """What all pods share."""
    shutil.copytree(shards, tmp_path / "volume" / "shards")
    return tmp_path / "volume"


class Cluster(contextlib.ExitStack):
    """A cluster's API server, Kueue and operator, a user's command line there, and the run `mine`."""

    def __init__(self, folder: Path, volume: Path):
        super().__init__()
        self.run = Run(volume / "runs" / "mine")
        self.api = self.enter_context(Api(folder))
        self.kueue = self.enter_context(Kueue(self.api))
        self.operator = self.enter_context(KubeRay(self.api, volume, {"store": {"KEY": PLANTED}}))
        self.api.namespace("armillary", **{"pod-security.kubernetes.io/enforce": "restricted"})
        self.shell = Shell(folder, self.api.kubeconfig(namespace="armillary"))

    def status(self) -> dict:
        for controller in (self.kueue, self.operator):
            assert not controller.error, controller.error
        return json.loads(self.shell("status", "mine", "--json").stdout)

    def training_beyond(self, step: int) -> dict:
        """The status of the run, once it says that it trains and is beyond that step."""

        def beyond():
            progress = (found := self.status())["progress"]
            return found if progress and progress["state"] == "training" and progress["step"] > step else None

        return wait_for(beyond, 240)

    def layouts(self) -> list[int]:
        """Data-parallel sizes of the launches."""
        return [event["layout"]["data"] for event in self.run.events("launch")]


def test_a_run_is_submitted_trains_is_suspended_goes_on_and_is_cancelled(tables, volume, tmp_path):
    data = tables["data"] | {"path": "shards"}
    training = tables["training"] | {"steps": 100_000, "deterministic": True}
    job = tables | {"data": data, "training": training, "parallel": {"data": 2}, "kubernetes": KUBERNETES}
    (tmp_path / "job.toml").write_text(tomli_w.dumps(job))
    with Cluster(tmp_path, volume) as cluster:
        api, run, shell = cluster.api, cluster.run, cluster.shell
        assert shell("submit", "job.toml", "--run", "mine", "--detach").returncode == 0
        found = cluster.training_beyond(10)
        assert found["phase"] == "running"
        assert found["progress"]["ranks"] == 2
        assert found["progress"]["tokens_per_second"] > 0
        assert found["progress"]["eta_seconds"] > 0
        assert run.job().cluster.address == "auto"
        (of_ray,) = cluster.operator.clusters.values()
        assert_all_metrics_are_there(of_ray)

        # The stream of the driver's output breaks: the submitter asks for it anew, and the run knows nothing of it.
        of_ray.service.cut()
        cluster.training_beyond(found["progress"]["step"])
        (lines,) = api.logs.values()
        said = [line for _, line in lines if line.startswith('{"')]
        assert len(said) == len(set(said))

        # One pod has to make room: its rank saves, and the run goes on with the other.
        of_ray.workers[1].end()
        wait_for(lambda: cluster.layouts() == [2, 1], 60)
        assert [event["interrupted"] for event in run.events("ended")] == [True]

        # All are suspended, and come back before they are gone, as Kueue may let them: who comes waits for who goes.
        at = run.latest_step()
        cluster.training_beyond(at)
        assert shell("suspend", "mine").returncode == 0
        wait_for(lambda: api.store.select("ray.io/v1", "rayjobs")[0]["status"]["jobDeploymentStatus"] == "Suspended")
        assert cluster.status()["phase"] == "stopping"
        refused(shell("resume", "mine"), "the run mine is stopping", "wait for it")
        (workload,) = [key for key in api.store.objects if key.plural == "workloads"]
        api.store.update(workload, {"spec": {"active": True}})
        wait_for(lambda: cluster.layouts() == [2, 1, 2], 120)
        saved = list(run.events("launch"))[-1]["from_step"]
        assert run.latest_step() == run.curve()[-1]["step"] == saved > at, "all that was done was saved"

        cluster.training_beyond(saved)
        assert shell("cancel", "mine").returncode == 0
        wait_for(lambda: not api.store.select("v1", "pods"), 60)
        assert not [key for key in api.store.objects if key.plural in ("rayjobs", "workloads")]
        assert run.latest_step() == run.curve()[-1]["step"] > saved
    assert each_step_once(run)
    for secret in (PLANTED, *cluster.operator.tokens):
        assert secret not in shell("render", "job.toml").stdout
        assert_nowhere(secret, api, run)


def assert_nowhere(secret: str, api: Api, run: Run) -> None:
    """Not in any object, request or log of the cluster, nor in a file of the run."""
    said = "\n".join(line for lines in api.logs.values() for _, line in lines)
    assert secret not in json.dumps([change.thing for change in api.store.changes]) + said + str(api.requests)
    for path in run.path.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path


def assert_all_metrics_are_there(cluster: RayCluster) -> None:
    """On the port that the PodMonitor names: the run's from the head's pod, a rank's own from each worker's."""
    texts = []
    for pod in (cluster.head, *cluster.workers):
        with urllib.request.urlopen(f"http://127.0.0.1:{pod.ports[METRICS_PORT]}/metrics", timeout=20) as reply:
            texts.append(reply.read().decode())
    assert {name for text in texts for name in re.findall(r"^(armillary_\w+)", text, re.M)} == metric_docs.names()
    head, *workers = [re.findall(r'steps_total{.*rank="(\d)"', text) for text in texts]
    assert head == []
    assert sorted(workers) == [["0"], ["1"]]
