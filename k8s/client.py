"""A thin client: what this project asks of a Kubernetes API server, and what its refusals mean."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.from_thread
import httpx
import kr8s
import kr8s.asyncio

from armillary.errors import ClusterError

TIMEOUT = 20.0  # seconds that a server may take to answer
LOGIN = 120.0  # that may go by until it has answered first: a program that logs in may ask a person
SILENCE = 15.0  # that a log may have, before it is asked for anew
LOG_IN = "log in again: your kubeconfig's token or certificate is not valid"
ASK_FOR_ROLE = "ask for the role armillary-submitter of that namespace: k8s/base/rbac.yaml"
NAME_OTHERWISE = "name the run otherwise with --run; `armillary resume` goes on with that one"


@dataclass(frozen=True)
class Kind:
    """A kind of objects: in which API, under which name, and who brings it into a cluster."""

    name: str
    api: str
    plural: str
    source: str = "Kubernetes"


RAYJOB = Kind("RayJob", "ray.io/v1", "rayjobs", "KubeRay 1.7 or newer")
WORKLOAD = Kind("Workload", "kueue.x-k8s.io/v1beta2", "workloads", "Kueue 0.19 or newer")
POD = Kind("Pod", "v1", "pods")


class NoCluster(ClusterError):
    """There is no kubeconfig, or it names no cluster."""


class Unreachable(ClusterError):
    """No answer, or one that the same question may not get again."""


class NotFound(ClusterError):
    """The object is not there."""


class NoSuchKind(ClusterError):
    """The cluster does not know objects of this kind."""


class LogGone(ClusterError):
    """A log could not be read on: its stream broke, or the pod is not there (yet, or any more)."""


class Client:
    """One namespace of one cluster, as somebody's kubeconfig or a pod's service account names it; see `connected`."""

    def __init__(self, portal, api):
        self._portal, self._api = portal, api
        self.namespace: str = api.namespace

    def get(self, kind: Kind, name: str) -> dict:
        """NotFound where it is not there."""
        return self._do("GET", kind, name)

    def list(self, kind: Kind, labels: dict[str, str]) -> list[dict]:
        """Those that have all of these labels; a label of "" needs only be there."""
        selector = ",".join(f"{key}={value}" if value else key for key, value in labels.items())
        return self._do("GET", kind, params={"labelSelector": selector})["items"]

    def create(self, kind: Kind, thing: dict, dry_run: bool = False) -> dict:
        """The object as the server has it. A field that the server does not know is refused."""
        params = {"fieldValidation": "Strict", "fieldManager": "armillary"} | ({"dryRun": "All"} if dry_run else {})
        return self._do("POST", kind, params=params, content=thing)

    def patch(self, kind: Kind, name: str, change: dict) -> dict:
        """Merge `change` into it."""
        return self._do("PATCH", kind, name, params={"fieldManager": "armillary"}, content=change,
                        headers={"Content-Type": "application/merge-patch+json"})  # fmt: skip

    def delete(self, kind: Kind, name: str) -> None:
        """With all that it owns, in the background."""
        self._do("DELETE", kind, name, params={"propagationPolicy": "Background"})

    def log(self, pod: str, container: str, follow: bool = False, tail: int | None = None,
            since: str = "") -> Iterator[str]:  # fmt: skip
        """Lines of a container, each with its time (RFC 3339) in front; from the time `since` on. LogGone where they
        end before the container does."""
        params = {"container": container, "timestamps": "true"} | ({"follow": "true"} if follow else {})
        params |= {} if tail is None else {"tailLines": str(tail)}
        params |= {"sinceTime": since} if since else {}
        call = self._call("GET", POD, f"{pod}/log", stream=True, params=params,
                          timeout=httpx.Timeout(TIMEOUT, read=SILENCE if follow else TIMEOUT))  # fmt: skip
        try:
            with self._portal.wrap_async_context_manager(call) as response:
                lines = response.aiter_lines()
                while (line := self._portal.call(_next, lines)) is not None:
                    yield line
        except (httpx.HTTPError, kr8s.APITimeoutError) as error:
            raise LogGone(f"the log broke off: {type(error).__name__}", f"pod {pod}", "read it again") from None
        except kr8s.ServerError as error:
            if _code(error) in (401, 403):
                raise self._refusal(error, "GET", POD, pod) from None
            raise LogGone(f"there is no log: {error}", f"pod {pod}", "wait for the pod to start") from None

    def _call(self, method: str, kind: Kind, name: str = "", **request) -> AbstractContextManager:
        url = f"{kind.plural}/{name}" if name else kind.plural
        return self._api.call_api(method, version=kind.api, namespace=self.namespace, url=url, **request)

    def _do(self, method: str, kind: Kind, name: str = "", content: dict | None = None, **request) -> Any:
        if content is not None:
            request["content"] = json.dumps(content)

        async def do():
            with anyio.fail_after(2 * TIMEOUT):  # the library tries again by itself
                async with self._call(method, kind, name, timeout=TIMEOUT, **request) as response:
                    return response.json()

        try:
            return self._portal.call(do)
        except kr8s.ServerError as error:
            name = name or (content or {}).get("metadata", {}).get("name", "")
            raise self._refusal(error, method, kind, name) from None
        except (httpx.HTTPError, kr8s.APITimeoutError, TimeoutError) as error:
            raise unreachable(self._api.auth.server, error) from None

    def _refusal(self, error: kr8s.ServerError, method: str, kind: Kind, name: str) -> ClusterError:
        """What a server's refusal means for whoever asked."""
        code = _code(error)
        said = str(error.status.get("message") if isinstance(error.status, dict) else error)
        server, space, install = self._api.auth.server, self.namespace, f"let its administrators install {kind.source}"
        where = f"{kind.name} {name}".strip() + f" in namespace {space}"
        if code == 429 or code >= 500:
            return Unreachable(f"the cluster cannot answer now: {said}", server, "try again")
        if code == 401:
            return ClusterError("the cluster does not know who you are", server, LOG_IN)
        if code == 403 and "PodSecurity" not in said and "exceeded quota" not in said:
            return ClusterError(f"you may not do this: {said}", where, ASK_FOR_ROLE)
        if code == 404 and f'namespaces "{space}" not found' in said:
            return ClusterError(f"there is no namespace {space}", server, "name another with --namespace, or make it")
        if code == 404 and name and f'"{name}" not found' in said:
            return NotFound(f"there is no {kind.name} {name}", f"namespace {space}", "`armillary list` has all")
        if code == 404:
            return NoSuchKind(f"the cluster knows no {kind.name} ({kind.api})", server, install)
        if code == 409 and method == "POST":
            return ClusterError(f"there is a {kind.name} {name} already", f"namespace {space}", NAME_OTHERWISE)
        if "strict decoding error" in said:
            return ClusterError(f"the cluster's {kind.name} lacks what a run needs: {said}", where, install)
        return ClusterError(f"the cluster refuses it: {said}", where, "see docs/kubernetes.md")


def _code(error: kr8s.ServerError) -> int:
    return error.response.status_code if error.response is not None else 0


async def _next(lines) -> str | None:
    return await anext(lines, None)


def unreachable(server: str, error: Exception) -> Unreachable:
    return Unreachable(f"the cluster does not answer: {str(error) or type(error).__name__}", server,
                        "check the network, and the context: `kubectl config get-contexts`")  # fmt: skip


@contextlib.contextmanager
def connected(context: str = "", namespace: str = "") -> Iterator[Client]:
    """Within, a client of the kubeconfig's (or this pod's) cluster, or of another context. ClusterError."""
    before = tempfile.tempdir
    # The library writes keys of the kubeconfig into temporary files, and leaves them there.
    with tempfile.TemporaryDirectory() as tempfile.tempdir, anyio.from_thread.start_blocking_portal() as portal:
        try:
            yield Client(portal, portal.call(_api, context or None, namespace or None))
        finally:
            tempfile.tempdir = before


async def _api(context: str | None, namespace: str | None):
    fix = "set KUBECONFIG, or name a context of it with --context"
    try:
        with anyio.fail_after(LOGIN):
            return await kr8s.asyncio.api(context=context, namespace=namespace)
    except (httpx.HTTPError, kr8s.APITimeoutError, TimeoutError) as error:
        raise unreachable(context or "the kubeconfig's current context", error) from None
    except kr8s.ServerError as error:
        raise ClusterError(f"the cluster refuses you: {error}", context or "", "log in again") from None
    except Exception as error:  # each kind of kubeconfig and of log-in program has its own
        raise NoCluster(f"no cluster can be asked: {error}", context or "the kubeconfig", fix) from None
