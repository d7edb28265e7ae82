"""The command line of a user of a cluster, and what its operator does meanwhile, by hand."""

import os
import subprocess
import time

from tests.conftest import ARMILLARY, HEEDING
from tests.k8s.store import Key

IMAGE = "registry.example/armillary@sha256:" + "0" * 64
JOB = {"name": "tiny", "kubernetes": {"image": IMAGE, "queue": "train", "volume": "armillary", "cpus_per_rank": 2}}
PROGRESS = {"time": 1e9, "event": "progress", "state": "training", "step": 40, "steps": 100, "loss": 2.5, "tokens": 9,
            "tokens_per_second": 1234.0, "eta_seconds": 61.0, "ranks": 1, "generation": 1, "restarts": 1,
            "checkpoint_step": 20, "checkpoint_time": None, "error": None,
            "verdict": {"event": "verdict", "kind": "lost node", "what": "rank 1 is gone", "remedy": ""}}  # fmt: skip


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
