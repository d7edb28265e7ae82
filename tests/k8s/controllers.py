"""Kueue and KubeRay, as far as a run needs them, beside the API server of the tests.

Pods are processes of this machine, with the commands and the environment that the RayJob gives them: Ray's head and
workers, the submitter, the exporter beside each. Where a container mounts a volume at a path, the path is put for a
folder of the test's. What the operator adds to a pod's command and environment is written down here once more, from
KubeRay's documentation.
"""

import abc
import contextlib
import os
import re
import secrets as secrets_
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from tests.k8s import pod_security
from tests.k8s.api import Api
from tests.k8s.store import Key, now

LOOK_SECONDS = 0.1
UID = "kueue.x-k8s.io/job-uid"
RAYJOBS, WORKLOADS = ("ray.io/v1", "rayjobs"), ("kueue.x-k8s.io/v1beta2", "workloads")
JOB = "the-job"  # as which Ray knows a run's command
LITTLE_QUOTA = (
    "couldn't assign flavors to pod set ranks: insufficient quota for {} in flavor armillary, "
    "request > maximum capacity ({} > {})"
)
FAST = {  # a node that is gone is to be seen within seconds
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_worker_niceness": "0",
}


class Controller(threading.Thread, abc.ABC):
    """Looks at the cluster again and again; use as a context."""

    def __init__(self, api: Api):
        super().__init__(daemon=True)
        self.api, self.store = api, api.store
        self._over, self.error = threading.Event(), None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self.join()
        if self.error:
            raise self.error

    def run(self) -> None:
        try:
            while not self._over.wait(LOOK_SECONDS):
                self.look()
        except Exception as error:
            self.error = error
        finally:
            self.end()

    @abc.abstractmethod
    def look(self) -> None:
        """See how the cluster is, and do what there is to do."""

    def end(self) -> None:
        """Leave nothing."""


class Kueue(Controller):
    """Admits a run when there are as many of a resource as its workers ask for."""

    def __init__(self, api: Api, resource: str = "cpu", quota: int = 1000):
        super().__init__(api)
        self.resource, self.quota = resource, quota

    def look(self) -> None:
        for rayjob in self.store.select(*RAYJOBS):
            meta = rayjob["metadata"]
            if "kueue.x-k8s.io/queue-name" not in meta.get("labels", {}):
                continue
            job = Key(*RAYJOBS, meta["namespace"], meta["name"])
            key = Key(*WORKLOADS, meta["namespace"], f"rayjob-{meta['name']}-{meta['uid'][:5]}")
            workload = self.store.get(key)
            if workload is None:
                owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": meta["name"], "uid": meta["uid"]}
                self.store.add(key, {
                    "apiVersion": key.api, "kind": "Workload", "spec": {"active": True},
                    "metadata": {"name": key.name, "namespace": key.namespace, "labels": {UID: meta["uid"]},
                                 "ownerReferences": [owner]},
                })  # fmt: skip
                continue
            wanted = _asked_for(rayjob, self.resource)
            if workload["spec"]["active"] is False:
                self._say(key, workload, "QuotaReserved", "False", "The workload is deactivated")
                self._suspend(job, rayjob, True)
            elif wanted > self.quota:
                self._say(
                    key, workload, "QuotaReserved", "False", LITTLE_QUOTA.format(self.resource, wanted, self.quota)
                )
            else:
                self._say(key, workload, "Admitted", "True", "The workload is admitted")
                self._suspend(job, rayjob, False)

    def _say(self, key: Key, workload: dict, kind: str, status: str, message: str) -> None:
        conditions = [{"type": kind, "status": status, "reason": kind, "message": message}]
        if workload.get("status", {}).get("conditions") != conditions:
            self.store.update(key, {"status": {"conditions": conditions}})

    def _suspend(self, key: Key, rayjob: dict, suspended: bool) -> None:
        if rayjob["spec"].get("suspend", False) != suspended:
            self.store.update(key, {"spec": {"suspend": suspended}})


def _asked_for(rayjob: dict, resource: str) -> int:
    groups = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = [(group, group["template"]["spec"]["containers"][0]["resources"]["limits"]) for group in groups]
    return sum(group["replicas"] * int(limit.get(resource, 0)) for group, limit in limits)


class KubeRay(Controller):
    """Runs the pods of each RayJob that is not suspended, and says what becomes of it."""

    def __init__(self, api: Api, volume: Path, secrets: dict[str, dict[str, str]] | None = None):
        """volume: every PersistentVolumeClaim; secrets: the keys and values of each."""
        super().__init__(api)
        self.volume, self.secrets, self.clusters, self.tokens = volume, secrets or {}, {}, []

    def look(self) -> None:
        there = {}
        for rayjob in self.store.select(*RAYJOBS):
            there[rayjob["metadata"]["uid"]] = rayjob
        for uid in self.clusters.keys() - there.keys():
            self.clusters[uid].cancel()
            del self.clusters[uid]
        for uid, rayjob in there.items():
            self._see_to(uid, rayjob)

    def _see_to(self, uid: str, rayjob: dict) -> None:
        meta, state = rayjob["metadata"], rayjob.get("status", {}).get("jobDeploymentStatus", "")
        key = Key(*RAYJOBS, meta["namespace"], meta["name"])
        cluster = self.clusters.get(uid)
        if rayjob["spec"].get("suspend"):
            if cluster is not None:
                self.store.update(key, {"status": {"jobDeploymentStatus": "Suspending"}})
                self._remove(uid)
                self.store.update(key, {"status": {"jobDeploymentStatus": "Suspended"}})
        elif cluster is None and state in ("", "Suspended"):
            self.store.update(key, {"status": {"jobDeploymentStatus": "Initializing", "startTime": now()}})
            self.clusters[uid] = Cluster(self.api, rayjob, self.volume, self.secrets)
            self.tokens.append(self.clusters[uid].token)
            self.store.update(key, {"status": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}})
        elif cluster is not None and state == "Running" and (code := cluster.code()) is not None:
            self._remove(uid)
            ended = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "failed": 1,
                     "message": f"Job entrypoint command failed with exit code {code}"}  # fmt: skip
            if code == 0:
                ended = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "succeeded": 1}
            self.store.update(key, {"status": ended | {"endTime": now()}})

    def _remove(self, uid: str) -> None:
        self.clusters[uid].stop()
        del self.clusters[uid]

    def end(self) -> None:
        for cluster in self.clusters.values():
            cluster.stop()


class Cluster:
    """The pods of one RayJob, from their start to their end."""

    def __init__(self, api: Api, rayjob: dict, volume: Path, secrets: dict[str, dict[str, str]]):
        self._api, self._rayjob, self._volume, self._secrets = api, rayjob, volume, secrets
        self._folder = Path(tempfile.mkdtemp(prefix="k-"))  # sockets live in it, whose paths may not be long
        self.token, self._gcs, self.dashboard = secrets_.token_hex(32), _free_port(), _free_port()
        self.pods: list[Pod] = []
        spec = rayjob["spec"]["rayClusterSpec"]
        head = spec["headGroupSpec"]
        self.head = self._pod("head", head["template"], [
            "ray", "start", "--head", "--block", f"--port={self._gcs}", f"--dashboard-port={self.dashboard}",
            f"--temp-dir={self._folder}/ray", *_flags(head["rayStartParams"]),
        ])  # fmt: skip
        for group in spec["workerGroupSpecs"]:
            for number in range(group["replicas"]):
                cpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
                words = ["ray", "start", "--block", f"--address=127.0.0.1:{self._gcs}", f"--num-cpus={cpus}"]
                self._pod(f"{group['groupName']}-{number}", group["template"], words + _flags(group["rayStartParams"]))
        self.submitter = self._submit()

    def _pod(self, name: str, template: dict, command: list[str]) -> "Pod":
        words = ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats",
                 f"--dashboard-agent-listen-port={_free_port()}"]  # fmt: skip
        pod = self._made(name, template)
        pod.start(command + words)
        pod.wait_for_ray()
        self.pods.append(pod)
        return pod

    def _submit(self) -> "Pod":
        template = self._rayjob["spec"]["submitterPodTemplate"]
        pod = self._made("submitter", template)
        entrypoint = shlex.split(self._rayjob["spec"]["entrypoint"])
        pod.start(["ray", "job", "submit", self._at, f"--submission-id={JOB}", "--", *entrypoint], logged=True)
        self.pods.append(pod)
        return pod

    def _made(self, name: str, template: dict) -> "Pod":
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "PYTHONUNBUFFERED": "1"} | FAST
        return Pod(self._api, self._rayjob, name, template, environment, self._volume, self._folder, self._secrets)

    @property
    def _at(self) -> str:
        return f"--address=http://127.0.0.1:{self.dashboard}"

    def cancel(self) -> None:
        """What the operator does before the pods of a RayJob go that was deleted."""
        self.submitter.run(["ray", "job", "stop", "--no-wait", self._at, JOB]).wait()
        self.stop()

    def code(self) -> int | None:
        """Of the command, once it has ended."""
        return self.submitter.process.poll()

    def stop(self) -> None:
        """End the pods as a kubelet does: each one's hook, SIGTERM, and SIGKILL when its time is over."""
        enders = [threading.Thread(target=pod.end) for pod in self.pods]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join()
        for process in psutil.process_iter(["environ"]):  # what had left its parent
            if (process.info["environ"] or {}).get("RAY_AUTH_TOKEN") == self.token:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


class Pod:
    """One pod: its first container and, beside it, the others."""

    def __init__(
        self, api: Api, rayjob: dict, name: str, template: dict, environment: dict, volume: Path, folder: Path,
        secrets: dict[str, dict[str, str]],
    ):  # fmt: skip
        meta = rayjob["metadata"]
        self.name, self._api, self._spec = f"{meta['name']}-{name}", api, template["spec"]
        self._folder = folder / name
        self._paths: dict[str, Path] = {}
        for one in self._spec.get("volumes", ()):
            self._paths[one["name"]] = volume if "persistentVolumeClaim" in one else self._folder / one["name"]
            self._paths[one["name"]].mkdir(parents=True, exist_ok=True)
        self._environment, self._said, self._secrets = environment, self._folder / "said", secrets
        ports = [port["containerPort"] for one in self._spec["containers"] for port in one.get("ports", ())]
        self.ports = {port: _free_port() for port in ports}  # all pods have this machine's
        self._folder.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen | None = None
        self._beside: list[subprocess.Popen] = []
        level = api.store.get(Key("v1", "namespaces", "", meta["namespace"]))["metadata"]["labels"].get(
            "pod-security.kubernetes.io/enforce", "privileged"
        )
        found = pod_security.violations(self._spec, level)
        assert not found, found
        owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": meta["name"], "uid": meta["uid"]}
        self._key = Key("v1", "pods", meta["namespace"], self.name)
        api.store.remove(self._key)
        api.store.add(self._key, {
            "apiVersion": "v1", "kind": "Pod", "spec": self._spec, "status": {"phase": "Pending"},
            "metadata": {"name": self.name, "namespace": meta["namespace"], "ownerReferences": [owner],
                         "labels": template["metadata"]["labels"]},
        })  # fmt: skip

    def start(self, command: list[str], logged: bool = False) -> None:
        first, *others = self._spec["containers"]
        with open(self._said, "w") as said:
            self.process = self._run(first, command, subprocess.PIPE if logged else said)
        if logged:
            threading.Thread(target=self._log, daemon=True).start()
        with open(self._folder / "beside", "w") as said:
            self._beside = [self._run(one, one["command"], said) for one in others]
        self._api.store.update(self._key, {"status": {"phase": "Running"}})

    def wait_for_ray(self) -> None:
        deadline = time.monotonic() + 180
        while "Ray runtime started" not in (text := self._said.read_text()):
            assert self.process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.05)

    def end(self) -> None:
        first = self._spec["containers"][0]
        deadline = time.monotonic() + self._spec.get("terminationGracePeriodSeconds", 30)
        if hook := first.get("lifecycle", {}).get("preStop"):
            self._run(first, hook["exec"]["command"], subprocess.DEVNULL).wait(deadline - time.monotonic())
        for process in (self.process, *self._beside):
            process.terminate()
        for process in (self.process, *self._beside):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(5, max(0, deadline - time.monotonic())))
            process.kill()
            process.wait()
        phase = "Succeeded" if self.process.returncode == 0 else "Failed"
        if self._api.store.get(self._key):
            self._api.store.update(self._key, {"status": {"phase": phase}})

    def run(self, command: list[str]) -> subprocess.Popen:
        """One more command in the first container."""
        return self._run(self._spec["containers"][0], command, subprocess.DEVNULL)

    def _run(self, container: dict, command: list[str], output) -> subprocess.Popen:
        own = {one["name"]: self._mapped(container, one["value"]) for one in container.get("env", ())}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self._folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        for source in container.get("envFrom", ()):
            environment |= self._secrets[source["secretRef"]["name"]]
        return subprocess.Popen(
            [self._mapped(container, word) for word in command], env=environment | self._environment | own,
            stdout=output, stderr=subprocess.STDOUT, text=True, cwd=self._folder, start_new_session=True,
        )  # fmt: skip

    def _mapped(self, container: dict, text: str) -> str:
        """What a kubelet's mounts, a network of its own and `$(...)` come to."""
        if text.isdecimal() and int(text) in self.ports:
            return str(self.ports[int(text)])
        for mount in container.get("volumeMounts", ()):
            if text == mount["mountPath"] or text.startswith(f"{mount['mountPath']}/"):
                return str(self._paths[mount["name"]]) + text[len(mount["mountPath"]) :]
        return re.sub(r"\$\$|\$\((\w+)\)", lambda found: "$" if found[0] == "$$" else os.environ["HOME"], text)

    def _log(self) -> None:
        lines = self._api.logs.setdefault(self.name, [])
        for line in self.process.stdout:
            at = time.time()
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1e9):09d}Z"
            lines.append((stamp, line.rstrip("\n")))


def _flags(parameters: dict[str, str]) -> list[str]:
    return [f"--{key}={value}" for key, value in parameters.items() if key != "dashboard-host"]  # loopback here


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
