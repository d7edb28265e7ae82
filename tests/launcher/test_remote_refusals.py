"""What a cluster does not let a user do, what it does not have, and what it is not told."""

import json
import socket
from pathlib import Path

import pytest
import tomli_w
import yaml

from armillary.k8s import client
from tests.conftest import ROOT, refused
from tests.k8s import schemas
from tests.k8s.api import Api
from tests.k8s.controllers import Kueue
from tests.k8s.test_rayjob import with_crds
from tests.launcher.shell import JOB, Shell, begin, rayjob, submitted, wait_for


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


def test_a_server_that_takes_calls_and_never_answers(shell, tmp_path, monkeypatch):
    for limit in ("TIMEOUT", "LOGIN"):
        monkeypatch.setattr(client, limit, 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = yaml.safe_load(Path(shell.environment["KUBECONFIG"]).read_text())
        config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{silent.getsockname()[1]}"
        (tmp_path / "silent").write_text(yaml.safe_dump(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "silent"))
        with pytest.raises(client.Unreachable, match="does not answer"), client.connected() as connected:
            connected.list(client.RAYJOB, {})


@with_crds
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


def test_nothing_secret_of_the_users_own_leaves_their_machine(api, space, shell):
    """Of their environment, and the kubeconfig's token."""
    config = yaml.safe_load(Path(shell.environment["KUBECONFIG"]).read_text())
    secrets = ["planted-5c1e9b", config["users"][0]["user"]["token"]]
    for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "HF_TOKEN", "ARMILLARY_ANY"):
        shell.environment[name] = secrets[0]
    submitted(shell)
    begin(api, space, "hello")
    said = ""
    other = "submit job.toml checkpoint.path=s3://x/y --run other --detach --json"
    for words in ("render job.toml", "render job.toml --json", "status mine", "status mine --json", "logs mine",
                  "list --cluster --json", "submit job.toml --run mine --detach", other, "status nobody",
                  "suspend mine", "cancel mine"):  # fmt: skip
        done = shell(*words.split())
        said += done.stdout + done.stderr
    assert "submitted as other" in said
    there = json.dumps([change.thing for change in api.store.changes]) + str(api.requests)
    assert not [secret for secret in secrets if secret in said + there]
