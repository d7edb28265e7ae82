"""What looks at a cluster and changes it: the loop of every controller, and Kueue as far as a run needs it."""

import abc
import threading

from tests.k8s.api import Api
from tests.k8s.store import Key, merged

LOOK_SECONDS = 0.1
UID = "kueue.x-k8s.io/job-uid"
RAYJOBS, WORKLOADS = ("ray.io/v1", "rayjobs"), ("kueue.x-k8s.io/v1beta2", "workloads")
LITTLE_QUOTA = (
    "couldn't assign flavors to pod set ranks: insufficient quota for {} in flavor armillary, "
    "request > maximum capacity ({} > {})"
)
# What Kueue writes into the pods of a run that it admits, and takes out again when it stops it.
PLACED = {
    "metadata": {"annotations": {"kueue.x-k8s.io/workload": "its-workload"}, "labels": {"kueue.x-k8s.io/tas": "true"}},
    "spec": {"nodeSelector": {"armillary/pool": "train"},
             "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
             "schedulingGates": [{"name": "kueue.x-k8s.io/topology"}]},
}  # fmt: skip
TAKEN = {
    "metadata": {"annotations": {"kueue.x-k8s.io/workload": None}, "labels": {"kueue.x-k8s.io/tas": None}},
    "spec": {"nodeSelector": None, "tolerations": None, "schedulingGates": None},
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
            if "kueue.x-k8s.io/queue-name" in rayjob["metadata"].get("labels", {}):
                self._see_to(rayjob)

    def _see_to(self, rayjob: dict) -> None:
        meta = rayjob["metadata"]
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
            return
        wanted = _asked_for(rayjob, self.resource)
        if workload["spec"]["active"] is False:
            self._say(key, workload, "Evicted", "True", "The workload is deactivated")
            self._suspend(job, rayjob, True)
        elif wanted > self.quota:
            told = LITTLE_QUOTA.format(self.resource, wanted, self.quota)
            self._say(key, workload, "QuotaReserved", "False", told)
        else:
            self._say(key, workload, "Admitted", "True", "The workload is admitted")
            self._suspend(job, rayjob, False)

    def _say(self, key: Key, workload: dict, kind: str, status: str, message: str) -> None:
        conditions = [{"type": kind, "status": status, "reason": kind, "message": message}]
        if workload.get("status", {}).get("conditions") != conditions:
            self.store.update(key, {"status": {"conditions": conditions}})

    def _suspend(self, key: Key, rayjob: dict, suspended: bool) -> None:
        if rayjob["spec"].get("suspend", False) == suspended:
            return
        change, spec = (TAKEN if suspended else PLACED), rayjob["spec"]
        cluster = spec["rayClusterSpec"]
        groups = [group | {"template": merged(group["template"], change)} for group in cluster["workerGroupSpecs"]]
        self.store.update(key, {"spec": {
            "suspend": suspended, "submitterPodTemplate": change,
            "rayClusterSpec": {"headGroupSpec": {"template": change}, "workerGroupSpecs": groups},
        }})  # fmt: skip


def _asked_for(rayjob: dict, resource: str) -> int:
    groups = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = [(group, group["template"]["spec"]["containers"][0]["resources"]["limits"]) for group in groups]
    return sum(group["replicas"] * int(limit.get(resource, 0)) for group, limit in limits)
