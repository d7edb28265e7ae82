"""Runs in a cluster as a user sees them, by the command line, against an API server with the real CRDs' schemas."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
import tomli_w
import yaml

from armillary.k8s import client
from armillary.k8s.phase import Phase
from armillary.launcher import remote
from tests.conftest import ARMILLARY, HEEDING, ROOT, refused
from tests.k8s import schemas
from tests.k8s.api import Api
from tests.k8s.controllers import Kueue
from tests.k8s.store import Key

IMAGE = "registry.example/armillary@sha256:" + "0" * 64
JOB = {"name": "tiny", "kubernetes": {"image": IMAGE, "queue": "train", "volume": "armillary", "cpus_per_rank": 2}}
PROGRESS = {"time": 1e9, "event": "progress", "state": "training", "step": 40, "steps": 100, "loss": 2.5, "tokens": 9,
            "tokens_per_second": 1234.0, "eta_seconds": 61.0, "ranks": 1, "generation": 1, "restarts": 1,
            "checkpoint_step": 20, "checkpoint_time": None, "error": None,
            "verdict": {"event": "verdict", "kind": "lost node", "what": "rank 1 is gone", "remedy": ""}}  # fmt: skip

pytestmark = pytest.mark.skipif(not schemas.CRDS.is_dir(), reason="../shared/crds, with the real schemas, is not here")


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    with Api(tmp_path_factory.mktemp("api")) as api:
        yield api


@pytest.fixture
def space(api, request):
    """A namespace of this test's own."""
    name = f"n{abs(hash(request.node.name)) % 10**8}"
    api.namespace(name, **{"pod-security.kubernetes.io/enforce": "restricted"})
    return name


class Shell:
    """The command line of one user."""

    def __init__(self, folder, kubeconfig):
        self.folder, self.environment = folder, os.environ | {"KUBECONFIG": str(kubeconfig)}

    def __call__(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run([ARMILLARY, *words], cwd=self.folder, env=self.environment, capture_output=True,
                              text=True, timeout=60, check=False)  # fmt: skip

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen([ARMILLARY, *words], cwd=self.folder, env=self.environment, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, preexec_fn=HEEDING)  # fmt: skip

    def kubectl(self, *words: str, given: str = "") -> subprocess.CompletedProcess:
        command = [os.path.join(os.path.dirname(ARMILLARY), "kubectl"), *words]
        return subprocess.run(command, env=self.environment, input=given, capture_output=True, text=True, timeout=60,
                              check=False)  # fmt: skip


@pytest.fixture
def shell(api, space, tmp_path):
    (tmp_path / "job.toml").write_text(tomli_w.dumps(JOB))
    return Shell(tmp_path, api.kubeconfig(space, namespace=space))


def rayjob(space: str, name: str = "mine") -> Key:
    return Key("ray.io/v1", "rayjobs", space, name)


def wait_for(condition, seconds: float = 20):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def submitted(shell) -> None:
    done = shell("submit", "job.toml", "--run", "mine", "--detach")
    assert done.returncode == 0, done.stderr


def begin(api, space: str, *lines: str, name: str = "mine") -> str:
    """What the operator does: the driver's pod is there and says this; its name."""
    key = rayjob(space, name)
    job = api.store.get(key)
    template = job["spec"]["submitterPodTemplate"]
    pod = Key("v1", "pods", space, f"{name}-submitter")
    owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": name, "uid": job["metadata"]["uid"]}
    meta = {"name": pod.name, "namespace": space, "labels": template["metadata"]["labels"], "ownerReferences": [owner]}
    api.store.add(pod, {"apiVersion": "v1", "kind": "Pod", "spec": template["spec"], "metadata": meta,
                        "status": {"phase": "Running"}})  # fmt: skip
    api.store.update(key, {"spec": {"suspend": False}, "status": {"jobDeploymentStatus": "Running"}})
    api.logs[pod.name] = [(stamp(number), line) for number, line in enumerate(lines)]
    return pod.name


def stamp(number: int) -> str:
    return f"2026-01-01T00:00:00.{number:09d}Z"


def end(api, space: str, succeeded: bool = True, name: str = "mine") -> None:
    """What the operator does when the driver has ended."""
    status = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
    if not succeeded:
        status = {"jobDeploymentStatus": "Failed", "reason": "AppFailed", "message": "exit code 1", "failed": 1}
    api.store.update(rayjob(space, name), {"status": status})
    api.store.update(Key("v1", "pods", space, f"{name}-submitter"), {"status": {"phase": "Succeeded"}})


def test_a_run_is_submitted_seen_and_cancelled_and_nothing_is_left(api, space, shell):
    first = len(api.requests)
    submitted(shell)
    posts = [path for method, path in api.requests[first:] if method == "POST"]
    assert len(posts) == 2
    assert "dryRun=All" in posts[0]
    assert "dryRun" not in posts[1]
    assert all("fieldValidation=Strict" in path for path in posts)
    assert api.store.get(rayjob(space))["spec"]["backoffLimit"] == 1

    refused(shell("submit", "job.toml", "--run", "mine", "--detach"), "the run mine is in the cluster already", "--run")
    said = PROGRESS | {"time": time.time(), "checkpoint_time": time.time() - 30}
    begin(api, space, json.dumps(said), "a line for people")
    status = json.loads(shell("status", "mine", "--json").stdout)
    assert (status["phase"], status["queue"]) == ("running", "train")
    assert status["progress"]["step"] == 40
    told = shell("status", "mine").stdout
    for words in ("running", "40 of 100", "1,234 tokens/s, ETA 1:01", "of step 20, 0:3", "restarts  1",
                  "lost node: rank 1 is gone"):  # fmt: skip
        assert words in told
    assert shell("logs", "mine").stdout == "a line for people\n"
    assert json.loads(shell("logs", "mine", "--json").stdout) == said
    old = remote.up_to_date(said, Phase("running"), said["time"] + 3600)
    assert (old["checkpoint_age_seconds"], old["tokens_per_second"], old["step"]) == (3630.0, None, 40)
    assert [one["run"] for one in json.loads(shell("list", "--cluster", "--json").stdout)["runs"]] == ["mine"]

    assert shell("cancel", "mine").returncode == 0
    assert not [key for key in api.store.objects if key.namespace == space]
    refused(shell("status", "mine"), "there is no run mine")
    refused(shell("resume", "mine"), "there is no run mine", "armillary submit JOB.toml --run mine")
    assert not [key for key in api.store.objects if key.namespace == space]


def test_what_a_run_says_is_shown_once_though_its_stream_breaks_and_its_end_is_the_rayjobs(api, space, shell):
    submitted(shell)
    pod = begin(api, space, *(f"line {number}" for number in range(5)))
    api.broken_logs = 2
    process = shell.start("logs", "-f", "mine")
    seen = [process.stdout.readline() for _ in range(5)]
    api.store.update(Key("v1", "pods", space, pod), {"status": {"phase": "Succeeded"}})
    time.sleep(3)
    assert process.poll() is None, "the pod has ended, and with it the stream; not the run"
    end(api, space)
    rest, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "".join(seen) + rest == "".join(f"line {number}\n" for number in range(5))
    assert api.broken_logs == 0


def test_a_stream_that_stays_open_says_no_more_than_one_that_ends(api, space, shell, monkeypatch):
    monkeypatch.setattr(client, "SILENCE", 0.5)
    monkeypatch.setenv("KUBECONFIG", shell.environment["KUBECONFIG"])
    submitted(shell)
    begin(api, space, "hello")
    with client.connected() as connected:
        lines = remote.log(connected, "mine", follow=True)
        assert next(lines) == "hello"
        api.store.update(rayjob(space), {"status": {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}})
        assert list(lines) == []


@pytest.mark.parametrize("succeeded", [True, False])
def test_who_follows_learns_how_it_ended(api, space, shell, succeeded):
    with Kueue(api):
        process = shell.start("submit", "job.toml", "--run", "mine")
        wait_for(lambda: (api.store.get(rayjob(space)) or {"spec": {"suspend": True}})["spec"]["suspend"] is False)
        begin(api, space, "hello")
        time.sleep(2)
        end(api, space, succeeded)
        out, err = process.communicate(timeout=30)
    if succeeded:
        assert process.returncode == 0, err
        assert err.splitlines()[-1] == "mine is done"
    else:
        done = subprocess.CompletedProcess([], process.returncode, out, err)
        refused(done, "the run mine failed: AppFailed: exit code 1", "armillary resume mine", code=1)
    assert "hello" in err


def test_kueues_runs_are_suspended_and_resumed_by_their_workload_alone(api, space, shell):
    with Kueue(api):
        submitted(shell)
        workload = wait_for(lambda: [key for key in api.store.objects if key[1:3] == ("workloads", space)])[0]
        wait_for(lambda: api.store.get(rayjob(space))["spec"]["suspend"] is False)
        begin(api, space)
        first = len(api.requests)
        assert shell("suspend", "mine").returncode == 0
        assert api.store.get(workload)["spec"]["active"] is False
        wait_for(lambda: api.store.get(rayjob(space))["spec"]["suspend"])
        api.store.update(rayjob(space), {"status": {"jobDeploymentStatus": "Suspended"}})
        assert json.loads(shell("status", "mine", "--json").stdout)["phase"] == "suspended"
        assert shell("resume", "mine", "--detach").returncode == 0
        assert api.store.get(workload)["spec"]["active"] is True
        wait_for(lambda: api.store.get(rayjob(space))["spec"]["suspend"] is False)
    changed = [path for method, path in api.requests[first:] if method == "PATCH"]
    assert len(changed) == 2
    assert all("/workloads/" in path for path in changed), changed


def test_without_kueue_the_rayjob_itself_is_suspended(api, space, shell):
    done = shell("submit", "job.toml", "kubernetes.queue=", "--run", "mine", "--detach")
    assert done.returncode == 0, done.stderr
    begin(api, space)
    assert shell("suspend", "mine").returncode == 0
    assert api.store.get(rayjob(space))["spec"]["suspend"] is True
    api.store.update(rayjob(space), {"status": {"jobDeploymentStatus": "Suspended"}})
    assert shell("resume", "mine", "--detach").returncode == 0
    assert api.store.get(rayjob(space))["spec"]["suspend"] is False


def test_a_failed_run_goes_on_as_a_new_rayjob_and_one_that_runs_or_is_done_does_not(api, space, shell):
    submitted(shell)
    begin(api, space)
    refused(shell("resume", "mine"), "the run mine is running")
    end(api, space, succeeded=False)
    for number in (2, 3):
        assert shell("resume", "mine", "--detach").returncode == 0
        again = api.store.get(rayjob(space, f"mine-r{number}"))
        assert again["metadata"]["labels"]["app.kubernetes.io/instance"] == "mine"
        assert again["spec"]["suspend"] is True
        begin(api, space, name=f"mine-r{number}")
        end(api, space, succeeded=number == 3, name=f"mine-r{number}")
    refused(shell("resume", "mine"), "the run mine is done", "training.steps")
    more = shell("submit", "job.toml", "training.steps=2000", "--run", "mine", "--detach")
    assert "submitted as mine-r4" in more.stderr
    assert "steps = 2000" in remote.job_of(api.store.get(rayjob(space, "mine-r4"))).to_toml()
    refused(shell("resume", "mine", "parallel.data=2"), "goes on as it was submitted", "armillary submit")
    assert shell("cancel", "mine").returncode == 0
    assert not [key for key in api.store.objects if key.namespace == space]


def test_too_little_quota_is_told_in_kueues_words(api, space, shell):
    with Kueue(api, quota=1):
        submitted(shell)
        found = wait_for(
            lambda: (one := json.loads(shell("status", "mine", "--json").stdout))["reason"].count(">") and one
        )
    assert found["phase"] == "queued"
    assert "insufficient quota for cpu in flavor armillary, request > maximum capacity (2 > 1)" in found["reason"]
    assert found["progress"] is None


def test_pods_that_cannot_start_say_why(api, space, shell):
    submitted(shell)
    pod = begin(api, space)
    api.store.update(rayjob(space), {"status": {"jobDeploymentStatus": "Initializing"}})
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    api.store.update(
        Key("v1", "pods", space, pod), {"status": {"containerStatuses": [{"state": {"waiting": waiting}}]}}
    )
    status = json.loads(shell("status", "mine", "--json").stdout)
    assert (status["phase"], status["reason"]) == ("starting", f"pod {pod}: ImagePullBackOff: no such image")


def test_the_submitters_role_is_enough_and_has_no_secrets(api, space, shell, tmp_path):
    """k8s/base/rbac.yaml, put there by the real kubectl."""
    rules = shell.kubectl("apply", "--server-side", "-f", "-", given=(ROOT / "k8s/base/rbac.yaml").read_text())
    assert rules.returncode == 0, rules.stderr
    one = Shell(tmp_path, api.kubeconfig(f"{space}-one", "armillary-submitters", namespace=space))
    with Kueue(api):
        submitted(one)
        wait_for(lambda: api.store.get(rayjob(space))["spec"]["suspend"] is False)
        begin(api, space, "hello")
        assert one("status", "mine").returncode == 0
        assert one("logs", "mine").stdout == "hello\n"
        assert one("list", "--cluster").returncode == 0
        assert one("suspend", "mine").returncode == 0
        assert one("cancel", "mine").returncode == 0
    denied = one.kubectl("get", "secrets")
    assert denied.returncode != 0
    assert "forbidden" in denied.stderr


def test_who_may_not_is_told_what_to_ask_for(api, space, shell, tmp_path):
    stranger = Shell(tmp_path, api.kubeconfig(f"{space}-stranger", "nobody", namespace=space))
    for command in (["submit", "job.toml", "--detach"], ["list", "--cluster"], ["cancel", "mine"]):
        refused(stranger(*command), "you may not do this", "cannot", "armillary-submitter")
    assert not [key for key in api.store.objects if key.namespace == space]


def test_no_cluster_no_context_no_namespace(api, shell, tmp_path):
    refused(shell("submit", "job.toml", "--namespace", "nowhere", "--detach"), "there is no namespace nowhere")
    refused(shell("submit", "job.toml", "--context", "other", "--detach"), "other", "--context")
    config = yaml.safe_load(Path(shell.environment["KUBECONFIG"]).read_text())
    config["users"][0]["user"]["token"] = "wrong"
    (tmp_path / "wrong").write_text(yaml.safe_dump(config))
    refused(Shell(tmp_path, tmp_path / "wrong")("list", "--cluster"), "does not know who you are", "log in")
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    (tmp_path / "closed").write_text(yaml.safe_dump(config))
    refused(
        Shell(tmp_path, tmp_path / "closed")("submit", "job.toml", "--detach"), "does not answer", "check the network"
    )
    refused(
        Shell(tmp_path, tmp_path / "none")("submit", "job.toml", "--detach"), "no cluster can be asked", "KUBECONFIG"
    )
    (tmp_path / "text").write_text("{")
    refused(Shell(tmp_path, tmp_path / "text")("submit", "job.toml", "--detach"), "no cluster can be asked")


def test_a_cluster_without_kuberay_or_with_an_old_one(tmp_path, monkeypatch):
    (tmp_path / "job.toml").write_text(tomli_w.dumps(JOB))
    with Api(tmp_path, without=("RayJob",)) as bare:
        refused(Shell(tmp_path, bare.kubeconfig())("submit", "job.toml", "--detach"), "knows no RayJob", "KubeRay 1.7")
    _, version = schemas.crds()["ray.io/v1", "RayJob"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    monkeypatch.delitem(spec, "preRunningDeadlineSeconds")
    schemas._of_crd.cache_clear()
    try:
        with Api(tmp_path) as old:
            done = Shell(tmp_path, old.kubeconfig())("submit", "job.toml", "--detach")
            refused(done, "lacks what a run needs", "preRunningDeadlineSeconds", "KubeRay 1.7")
            assert not [key for key in old.store.objects if key.plural == "rayjobs"]
    finally:
        schemas._of_crd.cache_clear()


def test_who_follows_is_patient_with_a_cluster_that_cannot_answer(api, space, shell, monkeypatch):
    monkeypatch.setattr(remote, "LOOK_SECONDS", 0.1)
    monkeypatch.setenv("KUBECONFIG", shell.environment["KUBECONFIG"])
    submitted(shell)
    begin(api, space, "hello")
    end(api, space)
    with client.connected() as connected:
        api.busy = 5
        assert list(remote.log(connected, "mine", follow=True)) == ["hello"]
        assert api.busy == 0
        api.busy = 1
        with pytest.raises(client.Unreachable, match="cannot answer now"):
            remote.look(connected, "mine")
        api.busy = 1000
        monkeypatch.setattr(remote, "PATIENCE", 0.3)
        with pytest.raises(client.Unreachable):
            list(remote.log(connected, "mine", follow=True))
        api.busy = 0
        api.store.remove(rayjob(space))
        assert remote.watched(connected, "mine").phase.name == "cancelled"


def test_a_log_that_may_not_be_read_is_no_log_that_is_not_there(api, space, shell, tmp_path):
    rules = yaml.safe_load_all((ROOT / "k8s/base/rbac.yaml").read_text())
    role, binding, _ = rules
    role["rules"] = [rule for rule in role["rules"] if rule["resources"] != ["pods/log"]]
    for thing in (role, binding):
        shell.kubectl("apply", "--server-side", "-f", "-", given=yaml.safe_dump(thing))
    submitted(shell)
    begin(api, space, "hello")
    blind = Shell(tmp_path, api.kubeconfig(f"{space}-blind", "armillary-submitters", namespace=space))
    for command in (["logs", "-f", "mine"], ["logs", "mine"], ["status", "mine"]):
        refused(blind(*command), "you may not do this", "pods/log")


def test_who_interrupts_a_submit_leaves_the_run_there(api, space, shell):
    process = shell.start("submit", "job.toml", "--run", "mine")
    wait_for(lambda: api.store.get(rayjob(space)))
    threading.Timer(1.5, process.send_signal, [2]).start()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "the run goes on without you" in err
    assert "Traceback" not in err
    assert api.store.get(rayjob(space))
