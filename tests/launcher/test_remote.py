"""Runs in a cluster as a user sees them, by the command line, against an API server with the real CRDs' schemas."""

import json
import subprocess
import threading
import time

import pytest

from armillary.k8s import client
from armillary.k8s.phase import Phase
from armillary.launcher import remote
from tests.conftest import refused
from tests.k8s.controllers import PLACED, Kueue
from tests.k8s.store import Key
from tests.launcher.shell import PROGRESS, begin, end, rayjob, submitted, wait_for


def test_a_run_is_submitted_seen_and_cancelled_and_nothing_is_left(api, space, shell):
    first = len(api.requests)
    submitted(shell)
    posts = [path for method, path in api.requests[first:] if method == "POST"]
    assert len(posts) == 2
    assert "dryRun=All" in posts[0]
    assert "dryRun" not in posts[1]
    assert all("fieldValidation=Strict" in path for path in posts)
    assert api.store.get(rayjob(space))["spec"]["backoffLimit"] == 3

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

    labels = api.store.get(rayjob(space))["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    head = Key("v1", "pods", space, "head")
    api.store.add(head, {"apiVersion": "v1", "kind": "Pod", "spec": {}, "status": {"phase": "Running"},
                         "metadata": {"name": "head", "namespace": space, "labels": labels}})  # fmt: skip
    assert "its pods save" in shell("cancel", "mine").stderr
    refused(shell("status", "mine"), "the run mine is cancelled, and its pods save")
    refused(shell("submit", "job.toml", "--run", "mine", "--detach"), "pods of the run mine are still there", "wait")
    api.store.remove(head)
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
        process = shell.start("submit", "job.toml", "--run", "mine", "--json")
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
    assert json.loads(out)["phase"] == ("done" if succeeded else "failed")
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
    with Kueue(api):
        submitted(shell)
        wait_for(lambda: api.store.get(rayjob(space))["spec"]["suspend"] is False)
    placed = api.store.get(rayjob(space))["spec"]["submitterPodTemplate"]["spec"]
    assert set(PLACED["spec"]) <= set(placed)
    begin(api, space)
    refused(shell("resume", "mine"), "the run mine is running")
    end(api, space, succeeded=False)
    for number in (2, 3):
        assert shell("resume", "mine", "--detach").returncode == 0
        again = api.store.get(rayjob(space, f"mine-r{number}"))
        assert again["metadata"]["labels"]["app.kubernetes.io/instance"] == "mine"
        assert again["spec"]["suspend"] is True
        assert not set(PLACED["spec"]) & set(again["spec"]["submitterPodTemplate"]["spec"]), "what Kueue put there"
        begin(api, space, name=f"mine-r{number}")
        end(api, space, succeeded=number == 3, name=f"mine-r{number}")
    other = shell("submit", "job.toml", "--run", "mine-r4", "--detach")  # a run of its own, whose name is like theirs
    assert "submitted as mine-r4" in other.stderr
    refused(shell("resume", "mine"), "the run mine is done", "training.steps")
    more = shell("submit", "job.toml", "training.steps=2000", "--run", "mine", "--detach")
    assert "submitted as mine-r5" in more.stderr
    assert "steps = 2000" in remote.job_of(api.store.get(rayjob(space, "mine-r5"))).to_toml()
    refused(shell("resume", "mine", "parallel.data=2"), "goes on as it was submitted", "armillary submit")
    for run in ("mine", "mine-r4"):
        assert shell("cancel", run).returncode == 0
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


def test_the_end_of_a_log_is_read_again_where_it_breaks(api, space, shell, monkeypatch):
    monkeypatch.setattr(remote, "LOOK_SECONDS", 0.1)
    monkeypatch.setenv("KUBECONFIG", shell.environment["KUBECONFIG"])
    submitted(shell)
    begin(api, space, "one", "two", "why it failed")
    end(api, space, succeeded=False)
    with client.connected() as connected:
        api.broken_logs = 2
        assert list(remote.log(connected, "mine", follow=True)) == ["one", "two", "why it failed"]


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
        gone = remote.status(connected, "mine", patient=True)
        assert (gone["phase"], gone["rayjob"], gone["progress"]) == ("cancelled", None, None)


def test_who_interrupts_a_submit_leaves_the_run_there(api, space, shell):
    process = shell.start("submit", "job.toml", "--run", "mine")
    wait_for(lambda: api.store.get(rayjob(space)))
    threading.Timer(1.5, process.send_signal, [2]).start()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "the run goes on without you" in err
    assert "Traceback" not in err
    assert api.store.get(rayjob(space))
