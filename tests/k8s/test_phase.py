"""What a RayJob, its Workload and its pods say together."""

import pytest

from armillary.k8s.phase import phase_of, saves

ADMITTED = {"spec": {}, "status": {"conditions": [{"type": "Admitted", "status": "True"}]}}
NO_ROOM = {"spec": {}, "status": {"conditions": [{"type": "QuotaReserved", "status": "False", "message": "no room"}]}}
IDLE = {"spec": {"active": False}}
TOO_LONG = IDLE | {"status": {"conditions": [{"type": "Evicted", "status": "True", "message": "too long"}]}}


def rayjob(state: str = "", suspend: bool = False, queue: str = "train", **status) -> dict:
    labels = {"kueue.x-k8s.io/queue-name": queue} if queue else {}
    return {"metadata": {"name": "mine", "labels": labels}, "spec": {"suspend": suspend},
            "status": {"jobDeploymentStatus": state} | status}  # fmt: skip


def pod(part: str = "head", phase: str = "Running", **status) -> dict:
    return {"metadata": {"name": f"a-{part}", "labels": {"app.kubernetes.io/component": part}},
            "status": {"phase": phase} | status}  # fmt: skip


@pytest.mark.parametrize(("args", "name", "reason"), [
    ((None,), "cancelled", "not there"),
    ((rayjob(suspend=True),), "queued", "Kueue has not seen it"),
    ((rayjob(suspend=True), NO_ROOM), "queued", "no room"),
    ((rayjob(suspend=True), ADMITTED), "starting", "admitted"),
    ((rayjob(suspend=True, queue=""),), "suspended", "armillary resume"),
    ((rayjob("Initializing"),), "starting", ""),
    ((rayjob("Running"), ADMITTED, [pod()]), "running", ""),
    ((rayjob("Running", suspend=True), IDLE, [pod()]), "stopping", "suspended"),
    ((rayjob("Suspending", suspend=True), IDLE), "stopping", "suspended"),
    ((rayjob("Suspended", suspend=True), IDLE, [pod()]), "stopping", "its pods save"),
    ((rayjob("Suspended", suspend=True), NO_ROOM, [pod("ranks")]), "stopping", "its pods save"),
    ((rayjob("Suspended", suspend=True), IDLE, [pod("submitter")]), "suspended", "armillary resume"),
    ((rayjob("Suspended", suspend=True), IDLE, [pod(phase="Failed")]), "suspended", "armillary resume"),
    ((rayjob("Suspended", suspend=True), NO_ROOM), "queued", "no room"),
    ((rayjob("Suspended", suspend=True), TOO_LONG), "suspended", "too long; `armillary resume`"),
    ((rayjob("Retrying", reason="AppFailed", message="exit code 1"),), "retrying", "AppFailed: exit code 1"),
    ((rayjob("Complete", jobStatus="SUCCEEDED"),), "done", ""),
    ((rayjob("Complete", jobStatus="STOPPED"),), "failed", ""),
    ((rayjob("Failed", reason="DeadlineExceeded"),), "failed", "DeadlineExceeded"),
    ((rayjob("ValidationFailed", message="no entrypoint"),), "failed", "no entrypoint"),
])  # fmt: skip
def test_one_phase_and_why(args, name, reason):
    found = phase_of(*args)
    assert found.name == name
    assert reason in found.reason


def test_one_that_is_deleted_is_stopping_until_it_is_gone():
    job = rayjob("Running")
    job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert phase_of(job).name == "stopping"


def test_a_reason_is_a_line_and_no_log():
    found = phase_of(rayjob("Failed", reason="AppFailed", message=f"exit code 1, last logs:\n{'x' * 9999}"))
    assert found.reason == "AppFailed: exit code 1, last logs:"
    assert len(phase_of(rayjob("Failed", message="x" * 9999)).reason) == 300


def test_the_first_pod_that_says_why_it_does_not_run_is_named():
    why = {"reason": "Unschedulable", "message": "0/4 nodes are available"}
    stuck = pod("ranks", "Pending", conditions=[why])
    image = pod("head", "Pending", initContainerStatuses=[{"state": {"waiting": {"reason": "ErrImagePull"}}}])
    assert phase_of(rayjob("Initializing"), None, [pod(), stuck]).reason == (
        "pod a-ranks: Unschedulable: 0/4 nodes are available"
    )
    assert phase_of(rayjob("Initializing"), None, [image, stuck]).reason == "pod a-head: ErrImagePull: "


def test_a_driver_or_ranks_save_and_the_submitter_has_nothing_to_save():
    assert saves(pod("head"))
    assert saves(pod("ranks", "Pending"))
    assert not saves(pod("submitter"))
    assert not saves(pod("head", "Succeeded"))
