"""KubeRay's operator, as far as a run needs it: a RayJob's phases, its cluster, its submitter, its retries.

What the operator adds to a pod's command and environment, and when it takes a run for ended, failed or suspended, is
written down here once more, from how KubeRay 1.7 does it. Ray, and all that pods do, is real.
"""

import contextlib
import json
import secrets
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from tests.cluster import SETTINGS
from tests.k8s.api import Api
from tests.k8s.controllers import RAYJOBS, Controller
from tests.k8s.pods import Machine, Pod, Service, free_port
from tests.k8s.store import Key, now

ASK_SECONDS = 1.0  # between two questions to Ray; the operator's are three apart
SUBMITTER_SECONDS = 30.0  # that a run may go on without its submitter
SUBMITTERS = 3  # that are made for one run of the command: a Job's backoffLimit is 2
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")


class KubeRay(Controller):
    """Sees to every RayJob, and says what becomes of it."""

    def __init__(self, api: Api, volume: Path, secrets: dict[str, dict[str, str]] | None = None):
        """volume, secrets: see Machine."""
        super().__init__(api)
        self.machine = Machine(api, volume, secrets or {})
        self.clusters: dict[str, RayCluster] = {}
        self.tokens: list[str] = []
        self._leaving: list[threading.Thread] = []

    def look(self) -> None:
        there = {rayjob["metadata"]["uid"]: rayjob for rayjob in self.store.select(*RAYJOBS)}
        for uid in self.clusters.keys() - there.keys():
            self.clusters[uid].stop_job()
            self._let_go(uid)
        for uid, rayjob in there.items():
            meta = rayjob["metadata"]
            change = self._see_to(uid, rayjob)
            if change is not None:
                self.store.update(Key(*RAYJOBS, meta["namespace"], meta["name"]), {"status": change})

    def _see_to(self, uid: str, rayjob: dict) -> dict | None:
        """What changes in its status; None where nothing does."""
        status, suspend = rayjob.get("status", {}), rayjob["spec"].get("suspend", False)
        match status.get("jobDeploymentStatus", ""):
            case "":
                number = secrets.token_hex(3)
                names = {name: f"{rayjob['metadata']['name']}-{number}" for name in ("jobId", "rayClusterName")}
                return names | {"jobDeploymentStatus": "Initializing", "jobStatus": "", "startTime": now()}
            case "Initializing" | "Running" if suspend:
                return {"jobDeploymentStatus": "Suspending"}
            case "Initializing":
                cluster = self.clusters[uid] = RayCluster(self.machine, rayjob)
                self.tokens.append(cluster.token)
                cluster.start()
                return {"jobDeploymentStatus": "Running", "dashboardURL": cluster.service.address}
            case "Running":
                return _after(rayjob, self.clusters[uid].progress())
            case "Suspending" | "Retrying" as state:
                # The pods of a cluster that is deleted take their time, which the operator does not wait for.
                self._let_go(uid)
                none = dict.fromkeys(("jobId", "rayClusterName", "dashboardURL", "message", "reason", "jobStatus"), "")
                return none | {"jobDeploymentStatus": "Suspended" if state == "Suspending" else ""}
            case "Suspended" if not suspend:
                return {"jobDeploymentStatus": ""}
            case "Complete" | "Failed" if uid in self.clusters and not self.clusters[uid].gone:
                assert rayjob["spec"]["ttlSecondsAfterFinished"] == 0
                self._leaving.append(self.clusters[uid].leave(with_submitter=False))
        return None

    def _let_go(self, uid: str) -> None:
        if uid in self.clusters:
            self._leaving.append(self.clusters.pop(uid).leave(with_submitter=True))

    def end(self) -> None:
        for uid in list(self.clusters):
            self._let_go(uid)
        for one in self._leaving:
            one.join()


def _after(rayjob: dict, progress: tuple[str, str, str]) -> dict | None:
    """What the progress of a run that is running changes: see RayCluster.progress."""
    status, (state, job_status, message) = rayjob["status"], progress
    change = {"jobDeploymentStatus": state, "jobStatus": job_status, "message": message}
    if state == "Running":
        return None if job_status == status["jobStatus"] else change
    change |= {"endTime": now()}
    if state == "Complete":
        return change | {"succeeded": 1}
    failed = status.get("failed", 0) + 1
    again = failed <= rayjob["spec"]["backoffLimit"]
    return change | {"failed": failed, "reason": "AppFailed" if job_status == "FAILED" else "SubmissionFailed",
                     "jobDeploymentStatus": "Retrying" if again else "Failed"}  # fmt: skip


class RayCluster:
    """The pods of one RayCluster, and those that submit to it, from their start to their end."""

    def __init__(self, machine: Machine, rayjob: dict):
        self._machine, self._rayjob = machine, rayjob
        self._folder = Path(tempfile.mkdtemp(prefix="k-"))  # sockets live in it, whose paths may not be long
        self.token, self._gcs, self._dashboard = secrets.token_hex(32), free_port(), free_port()
        self._name, self._job = (rayjob["status"][name] for name in ("rayClusterName", "jobId"))
        self.service = Service(self._dashboard)
        self._pods: list[Pod] = []
        self._submitters: list[Pod] = []
        self.gone, self._asked, self._job_status, self._message, self._submitted = False, 0.0, "", "", None

    @property
    def head(self) -> Pod:
        return self._pods[0]

    @property
    def workers(self) -> list[Pod]:
        return self._pods[1:]

    def start(self) -> None:
        spec = self._rayjob["spec"]["rayClusterSpec"]
        head = spec["headGroupSpec"]
        named = {port["name"] for port in head["template"]["spec"]["containers"][0]["ports"]}
        assert named >= {"gcs-server", "dashboard"}, "the head's service has no other ports"
        self._add("head", head["template"], "head", [
            "ray", "start", "--head", "--block", f"--port={self._gcs}", f"--dashboard-port={self._dashboard}",
            f"--ray-client-server-port={free_port()}", f"--temp-dir={self._folder}/ray",
            *_flags(head["rayStartParams"]),
        ])  # fmt: skip
        for group in spec["workerGroupSpecs"]:
            for number in range(group["replicas"]):
                cpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
                self._add(f"{group['groupName']}{number}", group["template"], "worker", [
                    "ray", "start", "--block", f"--address=127.0.0.1:{self._gcs}", f"--num-cpus={cpus}",
                    *_flags(group["rayStartParams"]),
                ])  # fmt: skip
        self._submit()

    def _add(self, name: str, template: dict, kind: str, command: list[str]) -> None:
        pod = self._made(name, template, kind)
        self._pods.append(pod)
        pod.start(command)
        pod.wait_for_ray()  # Ray takes nodes that start at once at one address for each other

    def _made(self, name: str, template: dict, kind: str) -> Pod:
        labels = {"ray.io/cluster": self._name, "ray.io/node-type": kind} if kind else {}
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token} | SETTINGS
        if not kind:
            environment |= {"RAY_DASHBOARD_ADDRESS": self.service.address, "RAY_JOB_SUBMISSION_ID": self._job,
                            "PYTHONUNBUFFERED": "1"}  # fmt: skip
        template = template | {"metadata": {"labels": template["metadata"]["labels"] | labels}}
        namespace = self._rayjob["metadata"]["namespace"]
        return Pod(self._machine, namespace, f"{self._name}-{name}", template, environment, self._folder)

    def _submit(self) -> None:
        template = self._rayjob["spec"]["submitterPodTemplate"]
        pod = self._made(f"submitter{len(self._submitters)}", template, "")
        pod.start(template["spec"]["containers"][0]["command"], logged=True)
        self._submitters.append(pod)

    def progress(self) -> tuple[str, str, str]:
        """(the state of the RayJob's deployment, the job's status, its message), by Ray and the submitter."""
        code = self._submitters[-1].code()
        if code and len(self._submitters) < SUBMITTERS:
            self._submit()
        elif code is not None and self._submitted is None:
            self._submitted = time.monotonic()
        if code and self._submitted:
            return "Failed", self._job_status, "Job submission has failed. Reason: BackoffLimitExceeded"
        if time.monotonic() - self._asked > ASK_SECONDS:
            self._asked = time.monotonic()
            if (found := self._ask("GET", "")) is not None:
                self._job_status, self._message = found["status"], found["message"]
        if self._submitted:
            if self._job_status in TERMINAL:
                return "Failed" if self._job_status == "FAILED" else "Complete", self._job_status, self._message
            if time.monotonic() - self._submitted > SUBMITTER_SECONDS:
                return "Failed", "FAILED", "The submitter finished but the ray job did not reach terminal state"
        return "Running", self._job_status, self._message

    def stop_job(self) -> None:
        """What the operator does before the pods of a RayJob go that was deleted."""
        if self._job_status not in TERMINAL:
            self._ask("POST", "/stop")

    def _ask(self, method: str, what: str) -> dict | None:
        request = urllib.request.Request(f"http://{self.service.address}/api/jobs/{self._job}{what}", method=method,
                                         headers={"Authorization": f"Bearer {self.token}"})  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=2) as reply:
                return json.load(reply)
        except (OSError, urllib.error.HTTPError):
            return None

    def leave(self, with_submitter: bool) -> threading.Thread:
        """Begin to end all pods that are left, but the submitter only if that is wanted."""
        pods = [] if self.gone else self._pods
        self.gone = True
        thread = threading.Thread(target=self._end, args=(pods + (self._submitters if with_submitter else []),))
        thread.start()
        return thread

    def _end(self, pods: list[Pod]) -> None:
        enders = [threading.Thread(target=pod.end) for pod in pods]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join()
        self.service.close()
        for process in psutil.process_iter(["environ"]):  # what had left its parent
            if (process.info["environ"] or {}).get("RAY_AUTH_TOKEN") == self.token:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def _flags(parameters: dict[str, str]) -> list[str]:
    own = [f"--{key}={value}" for key, value in parameters.items() if key != "dashboard-host"]  # loopback here
    return [*own, "--node-ip-address=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats",
            f"--dashboard-agent-listen-port={free_port()}"]  # fmt: skip
