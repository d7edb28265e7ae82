"""What a run becomes in Kubernetes: one RayJob, and nothing else. Pure."""

from dataclasses import dataclass
from importlib.metadata import version

from armillary.errors import JobError
from armillary.k8s.config import KubernetesConfig

ROOT = "/armillary"  # where the volume is mounted: relative paths of a job begin here
METRICS = "/run/armillary"  # where the ranks of a pod say on which ports their metrics are
METRICS_PORT = 9400
PORTS = {"metrics": 8080}
HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001} | PORTS  # the operator makes a service of them
DRAIN = 30  # seconds that Ray takes to leave a node (RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S)
SLACK = 30  # seconds for what comes before and after an emergency save
# The operator has a label app.kubernetes.io/name of its own, by which its services find pods.
APP, RUN, PART = (f"app.kubernetes.io/{name}" for name in ("part-of", "instance", "component"))
RAYJOB = "armillary/rayjob"  # label of pods: of which of a run's RayJobs
SUBMITTERS = 20  # times that the submitter's pod may be lost: each finds what it was to begin
SUBMITTER = "ray-job-submitter"  # the container whose output is the driver's
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
RACK = "kueue.x-k8s.io/podset-preferred-topology"
USER = 1000
PYTHON = "python -m armillary.launcher.pod"
ENTRYPOINT = f"{PYTHON} train"


@dataclass(frozen=True)
class Submission:
    """One submission of a run. name: the RayJob's; made: when, which tells it from all others of the run; job: the job
    file; grace: seconds for an emergency save."""

    name: str
    made: str
    run: str
    job: str
    world_size: int
    tensor: int
    grace: float
    config: KubernetesConfig

    @property
    def pods(self) -> tuple[int, int]:
        """(pods, ranks of each): as few as possible of one size, with each tensor-parallel group in one of them.

        JobError where a group is larger than a pod.
        """
        most = self.config.ranks_per_pod
        if self.tensor > most:
            raise JobError(
                f"parallel.tensor: {self.tensor} ranks are more than a pod's kubernetes.ranks_per_pod = {most}", "",
                "tensor-parallel ranks have to be on one node: lower parallel.tensor, or raise ranks_per_pod",
            )  # fmt: skip
        sizes = range(self.tensor, most + 1, self.tensor)
        ranks = max(size for size in sizes if self.world_size % size == 0)
        return self.world_size // ranks, ranks


def ray_job(submission: Submission) -> dict:
    """The RayJob, for KubeRay 1.7 and Kueue 0.19, in the 'restricted' Pod Security profile."""
    config = submission.config
    labels = {APP: "armillary", RUN: submission.run, RAYJOB: submission.name}
    queued = {QUEUE: config.queue} | ({PRIORITY: config.priority} if config.priority else {}) if config.queue else {}
    pods, ranks = submission.pods
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": submission.name, "labels": labels | queued},
        "spec": {
            "entrypoint": ENTRYPOINT,
            "suspend": bool(queued),  # until Kueue has room for all of it
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 0,  # of the machines: the RayJob and the driver's log stay until it is cancelled
            "preRunningDeadlineSeconds": config.start_deadline,
            "backoffLimit": config.retries,
            "submitterConfig": {"backoffLimit": SUBMITTERS},
            "submitterPodTemplate": {"metadata": {"labels": labels | {PART: "submitter"}}, "spec": _submitter(config)},
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": {"metadata": {"labels": labels | {PART: "head"}}, "spec": _head(submission)},
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "ranks",
                        "replicas": pods,
                        "minReplicas": pods,
                        "maxReplicas": pods,
                        "rayStartParams": {},
                        "template": {
                            "metadata": {"labels": labels | {PART: "ranks"}} | _annotations(config),
                            "spec": _worker(submission, ranks),
                        },
                    }
                ],
            },
        },
    }


def _annotations(config: KubernetesConfig) -> dict:
    return {"annotations": {RACK: config.rack}} if config.rack else {}


def _submitter(config: KubernetesConfig) -> dict:
    """Hands the command to Ray's head and shows its output. The operator's own template is not 'restricted', and where
    its own command loses the log's stream, the run fails."""
    container = _container(SUBMITTER, config, {"cpu": "500m", "memory": "1Gi"})
    container["command"] = [*PYTHON.split(), "submit"]
    return _pod(config, [container]) | {"restartPolicy": "Never"}


def _head(submission: Submission) -> dict:
    config = submission.config
    resources = {"cpu": str(config.head_cpus), "memory": config.head_memory}
    # Kubernetes puts the value of NAME for $(NAME), and $ for $$.
    environment = {
        "ARMILLARY_RUN": submission.run,
        "ARMILLARY_SUBMISSION": f"{submission.name} {submission.made}",
        "ARMILLARY_JOB": submission.job.replace("$", "$$"),
        "RAY_JOB_STOP_WAIT_TIME_S": str(round(submission.grace) + SLACK),  # of a run that is cancelled; else 3
    }
    return _ray_pod("ray-head", submission, resources, HEAD_PORTS, environment)


def _worker(submission: Submission, ranks: int) -> dict:
    config = submission.config
    resources = {"cpu": str(config.cpus_per_rank * ranks), "memory": times(config.memory_per_rank, ranks)}
    resources |= {name: str(ranks) for name in (config.gpu, config.network) if name}
    return _ray_pod("ray-worker", submission, resources, PORTS, {})


def times(memory: str, count: int) -> str:
    """So many times a quantity of memory: times("64Gi", 8) is "512Gi"."""
    return f"{int(memory[:-2]) * count}{memory[-2:]}"


def _ray_pod(name: str, submission: Submission, resources: dict, ports: dict[str, int], environment: dict) -> dict:
    config = submission.config
    mounts = [{"name": "runs", "mountPath": ROOT}, {"name": "shm", "mountPath": "/dev/shm"},
              {"name": "metrics", "mountPath": METRICS}]  # fmt: skip
    container = _container(name, config, resources)
    environment |= {"ARMILLARY_ROOT": ROOT, "ARMILLARY_METRICS": METRICS,
                    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN)}  # fmt: skip
    container["env"] = [{"name": key, "value": value} for key, value in environment.items()]
    if config.secret:
        container["envFrom"] = [{"secretRef": {"name": config.secret}}]
    container["ports"] = [{"name": port, "containerPort": number} for port, number in ports.items()]
    container["volumeMounts"] = mounts
    # Ray would end its processes at once: first the ranks save, which this waits for.
    container["lifecycle"] = {"preStop": {"exec": {"command": f"{PYTHON} stop".split()}}}
    exporter = _container("metrics", config, {"cpu": "100m", "memory": "256Mi"})
    exporter["command"] = [*f"{PYTHON} metrics".split(), "--folder", METRICS, "--port", str(METRICS_PORT)]
    exporter["ports"] = [{"name": "train-metrics", "containerPort": METRICS_PORT}]
    exporter["volumeMounts"] = [{"name": "metrics", "mountPath": METRICS, "readOnly": True}]
    runs = {"persistentVolumeClaim": {"claimName": config.volume}} if config.volume else {"emptyDir": {}}
    return _pod(config, [container, exporter]) | {
        "terminationGracePeriodSeconds": round(submission.grace) + DRAIN + SLACK,
        "volumes": [
            {"name": "runs"} | runs,
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # counts as the container's memory
            {"name": "metrics", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
        ],
    }


def _pod(config: KubernetesConfig, containers: list[dict]) -> dict:
    return {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": containers,
    } | ({"serviceAccountName": config.service_account} if config.service_account else {})


def _container(name: str, config: KubernetesConfig, resources: dict) -> dict:
    """Requests are limits: no pod is evicted for what another one uses."""
    return {
        "name": name,
        "image": config.image,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "resources": {"requests": dict(resources), "limits": dict(resources)},
    }
