"""What a RayJob, its Kueue Workload and its pods say together: one phase, and why. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from armillary.k8s.rayjob import PART, QUEUE

ENDED = ("done", "failed", "cancelled")
LONGEST_REASON = 300
UNREADY = ("Unschedulable", "ImagePullBackOff", "ErrImagePull", "InvalidImageName", "CreateContainerConfigError",
           "CreateContainerError", "CrashLoopBackOff")  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """name: "queued", "suspended", "starting", "running", "retrying", "stopping", "done", "failed" or "cancelled".

    reason: in the words of whoever decided it; "" where there is nothing to say.
    """

    name: str
    reason: str = ""

    @property
    def ended(self) -> bool:
        return self.name in ENDED


def phase_of(rayjob: dict | None, workload: dict | None = None, pods: Iterable[dict] = ()) -> Phase:
    """rayjob: None where it is gone. workload: Kueue's of it, if there is one. pods: the run's."""
    if rayjob is None:
        return Phase("cancelled", "its RayJob is not there any more")
    status = rayjob.get("status") or {}
    # Ray's message has the end of the log in it.
    message = (status.get("message") or "").partition("\n")[0][:LONGEST_REASON]
    said = ": ".join(filter(None, (status.get("reason"), message)))
    if rayjob["metadata"].get("deletionTimestamp"):
        return Phase("stopping", "it was cancelled, and its pods save")
    match status.get("jobDeploymentStatus"):
        case "Complete":
            # The command's own exit: that a log's stream ended says nothing.
            return Phase("done") if status.get("jobStatus") == "SUCCEEDED" else Phase("failed", said)
        case "Failed" | "ValidationFailed":
            return Phase("failed", said)
    if rayjob["spec"].get("suspend"):
        # The operator says that it is suspended when it has told the pods to go, which then take their time.
        if status.get("jobDeploymentStatus") in ("Running", "Suspending") or any(map(saves, pods)):
            return Phase("stopping", "it was suspended, and its pods save")
        return _waiting(rayjob, workload)
    match status.get("jobDeploymentStatus"):
        case "Running":
            return Phase("running")
        case "Retrying":
            return Phase("retrying", said)
    return Phase("starting", unready(pods))


def _waiting(rayjob: dict, workload: dict | None) -> Phase:
    """Of what is not to run now."""
    if QUEUE not in rayjob["metadata"].get("labels", {}):
        return Phase("suspended", "`armillary resume` goes on")
    queue = rayjob["metadata"]["labels"][QUEUE]
    if workload is None:
        return Phase("queued", f"Kueue has not seen it yet: is it installed, and the queue {queue} there?")
    conditions = {one["type"]: one for one in (workload.get("status") or {}).get("conditions", ())}
    if workload["spec"].get("active", True) is False:  # by whoever suspended it, or by Kueue, who says why
        said = conditions.get("Evicted", {}).get("message", "")
        return Phase("suspended", "; ".join(filter(None, (said, "`armillary resume` goes on"))))
    if conditions.get("Admitted", {}).get("status") == "True":
        return Phase("starting", "Kueue has admitted it")
    for kind in ("QuotaReserved", "Evicted"):
        if said := conditions.get(kind, {}).get("message"):
            return Phase("queued", said)
    return Phase("queued", f"in the queue {queue}")


def saves(pod: dict) -> bool:
    """Whether a driver or ranks may be at work in a pod."""
    of_ray = pod["metadata"]["labels"].get(PART) != "submitter"
    return of_ray and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")


def unready(pods: Iterable[dict]) -> str:
    """Why pods do not run, with the first of them that says so."""
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status") or {}
        for condition in status.get("conditions", ()):
            if condition.get("reason") in UNREADY:
                return f"pod {name}: {condition['reason']}: {condition.get('message', '')}"
        for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in UNREADY:
                return f"pod {name}: {waiting['reason']}: {waiting.get('message', '')}"
    return ""
