"""A Kubernetes API server of this machine alone, for tests: real clients and kubectl take it for one.

It has TLS and bearer tokens, discovery, OpenAPI, CRUD with server-side dry-run and strict field validation by the real
CRDs' schemas and CEL rules, merge patches, status, selectors, watches, logs, cascade, RBAC and Pod Security. It has no
field ownership, quota, scheduler or kubelet.
"""

import asyncio
import contextlib
import datetime
import ipaddress
import json
import re
import secrets
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.k8s import discovery, pod_security, schemas
from tests.k8s.store import Key, Store, matches, merged

BUILT_IN = """v1 Namespace namespaces -
v1 Pod pods +
v1 Service services +
v1 Secret secrets +
v1 ConfigMap configmaps +
v1 Event events +
v1 ServiceAccount serviceaccounts +
v1 ResourceQuota resourcequotas +
v1 PersistentVolumeClaim persistentvolumeclaims +
networking.k8s.io/v1 NetworkPolicy networkpolicies +
rbac.authorization.k8s.io/v1 Role roles +
rbac.authorization.k8s.io/v1 RoleBinding rolebindings +
rbac.authorization.k8s.io/v1 ClusterRole clusterroles -
rbac.authorization.k8s.io/v1 ClusterRoleBinding clusterrolebindings -
scheduling.k8s.io/v1 PriorityClass priorityclasses -
kueue.x-k8s.io/v1beta2 Workload workloads +"""  # the last one's CRD is not among those at hand
RBAC = "rbac.authorization.k8s.io/v1"
LOOK_SECONDS = 0.05
ADMIN = "system:masters"


class Refused(Exception):
    def __init__(self, code: int, reason: str, message: str):
        super().__init__(code, reason, message)
        self.code, self.reason, self.message = code, reason, message


class Api:
    """The server; use as a context. Without some of the kinds, if they are named in `without`."""

    def __init__(self, folder: Path, without: tuple[str, ...] = ()):
        self.store, self.logs, self.requests = Store(), {}, []
        self.busy = 0  # how many of the next requests are not answered but for that
        self.broken_logs = 0  # how many of the next log streams end after their first line
        self._folder, self._tokens = folder, {}
        self._kinds = {}
        for line in BUILT_IN.splitlines():
            api, kind, plural, namespaced = line.split()
            self._kinds[api, plural] = {"kind": kind, "namespaced": namespaced == "+", "columns": []}
        for (api, kind), (crd, version) in schemas.crds().items():
            self._kinds[api, crd["spec"]["names"]["plural"]] = {
                "kind": kind, "namespaced": crd["spec"]["scope"] == "Namespaced", "crd": version,
                "columns": version.get("additionalPrinterColumns", []),
            }  # fmt: skip
        self._kinds.setdefault(("ray.io/v1", "rayjobs"), {"kind": "RayJob", "namespaced": True, "columns": []})
        self._kinds = {key: kind for key, kind in self._kinds.items() if kind["kind"] not in without}
        self.namespace("team")

    def __enter__(self) -> "Api":
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,))
        self._thread.start()
        assert started.wait(20)
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # What tests arrange.

    def namespace(self, name: str, **labels: str) -> None:
        key = Key("v1", "namespaces", "", name)
        self.store.add(key, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})

    def user(self, name: str, *groups: str) -> str:
        """A new user's token."""
        token = secrets.token_hex(16)
        self._tokens[token] = name, set(groups)
        return token

    def kubeconfig(self, name: str = "admin", *groups: str, namespace: str = "team") -> Path:
        """A file for `KUBECONFIG`, of a new user; an administrator if no groups are named."""
        path = self._folder / f"kubeconfig-{name}"
        path.write_text(yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url, "certificate-authority": self._certificate}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name, "namespace": namespace}}],
            "users": [{"name": name, "user": {"token": self.user(name, *(groups or (ADMIN,)))}}],
        }))  # fmt: skip
        return path

    # The server.

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._certificate, key = certificate(self._folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate, key)
        app = web.Application(client_max_size=8 << 20)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        self._loop.run_until_complete(site.start())
        self.url = f"https://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        try:
            if self.busy:
                self.busy -= 1
                raise Refused(503, "ServiceUnavailable", "the server is currently unable to handle the request")
            return await self._route(request)
        except Refused as refused:
            status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": refused.code,
                      "message": refused.message, "reason": refused.reason}  # fmt: skip
            return web.json_response(status, status=refused.code)

    async def _route(self, request: web.Request) -> web.StreamResponse:
        path = request.path.rstrip("/")
        if path == "/version":
            return web.json_response({"major": "1", "minor": "37", "gitVersion": "v1.37.0", "platform": "linux/amd64"})
        if path in ("/healthz", "/readyz", "/livez"):
            return web.Response(text="ok")
        who = self._who(request)
        if (document := discovery.document(self._kinds, path)) is not None:
            return web.json_response(document)
        found = re.fullmatch(r"/(?:api/(v1)|apis/([^/]+/[^/]+))(?:/namespaces/([^/]+)(?=/.))?/(.+)", path)
        if not found:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        api, namespace = found[1] or found[2], found[3] or ""
        plural, name, sub = [*found[4].split("/"), "", ""][:3]
        if (api, plural) not in self._kinds:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        key, verb = Key(api, plural, namespace, name), _verb(request, name)
        self._authorize(who, verb, key, sub)
        return await self._do(request, verb, key, sub)

    async def _do(self, request: web.Request, verb: str, key: Key, sub: str) -> web.StreamResponse:
        group = key.api.partition("/")[0] if "/" in key.api else ""
        if verb == "watch":
            return await self._watch(request, key)
        if verb == "list":
            return self._out(request, key, self.store.select(key.api, key.plural, key.namespace, request.query))
        body = await _body(request) if verb in ("create", "update", "patch") else {}
        old = self.store.get(key)
        if verb == "create" or (verb == "patch" and old is None and "apply" in request.content_type):
            return self._create(request, key, body)
        if old is None:
            raise Refused(404, "NotFound", f'{key.plural}{group and "." + group} "{key.name}" not found')
        if sub == "log":
            return await self._log(request, key)
        if verb == "get":
            return self._out(request, key, old)
        if verb == "delete":
            if not _is_dry(request):
                self.store.remove(key)
            return web.json_response(old)
        new = body if verb == "update" else merged(old, body)
        sent = body.get("metadata", {}).get("resourceVersion")
        if sent not in (None, old["metadata"]["resourceVersion"]):
            raise Refused(
                409, "Conflict", f'Operation cannot be fulfilled on {key.plural} "{key.name}": it has changed'
            )
        new = old | {"status": new.get("status")} if sub == "status" else new | {"status": old.get("status")}
        new = {name: value for name, value in new.items() if value is not None}
        new = self._admit(request, key, new, old)
        if new.get("spec") != old.get("spec"):
            new["metadata"]["generation"] = old["metadata"]["generation"] + 1
        return self._out(request, key, new if _is_dry(request) or new == old else self.store.replace(key, new))

    def _create(self, request: web.Request, key: Key, body: dict) -> web.Response:
        kind = self._kinds[key.api, key.plural]
        meta = body.setdefault("metadata", {})
        body = {"apiVersion": key.api, "kind": kind["kind"]} | body
        if kind["namespaced"]:
            if meta.setdefault("namespace", key.namespace) != key.namespace:
                raise Refused(400, "BadRequest", "the namespace of the object does not match that of the request")
            if Key("v1", "namespaces", "", key.namespace) not in self.store.objects:
                raise Refused(404, "NotFound", f'namespaces "{key.namespace}" not found')
        meta.setdefault("name", key.name or meta.get("generateName", "") + secrets.token_hex(3))
        key = key._replace(name=meta["name"])
        if key in self.store.objects:
            raise Refused(409, "AlreadyExists", f'{key.plural} "{key.name}" already exists')
        new = self._admit(request, key, {name: value for name, value in body.items() if name != "status"}, None)
        return self._out(request, key, new if _is_dry(request) else self.store.add(key, new), status=201)

    def _admit(self, request: web.Request, key: Key, new: dict, old: dict | None) -> dict:
        """The object with its defaults, or a refusal by its schema or its namespace's Pod Security."""
        new, errors = schemas.check(new, old)
        unknown = [error for error in errors if "Additional properties" in error]
        if request.query.get("fieldValidation") != "Strict":
            errors = [error for error in errors if error not in unknown]
        if errors and errors == unknown:
            raise Refused(400, "BadRequest", f"strict decoding error: unknown field: {'; '.join(errors)}")
        if errors:
            raise Refused(422, "Invalid", f'{new["kind"]} "{key.name}" is invalid: {"; ".join(errors)}')
        if key.plural == "pods" and old is None:
            namespace = self.store.get(Key("v1", "namespaces", "", key.namespace))
            level = (namespace["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce", "privileged")
            if found := pod_security.violations(new["spec"], level):
                message = f'pods "{key.name}" is forbidden: violates PodSecurity "{level}:latest": {", ".join(found)}'
                raise Refused(403, "Forbidden", message)
        return new

    def _who(self, request: web.Request) -> tuple[str, set[str]]:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self._tokens:
            raise Refused(401, "Unauthorized", "Unauthorized")
        return self._tokens[token]

    def _authorize(self, who: tuple[str, set[str]], verb: str, key: Key, sub: str) -> None:
        (user, groups), group = who, key.api.partition("/")[0] if "/" in key.api else ""
        resource = key.plural + (f"/{sub}" if sub else "")
        if ADMIN in groups or any(_allows(rule, verb, group, resource) for rule in self._rules(user, groups, key)):
            return
        raise Refused(
            403, "Forbidden", f'{resource}.{group} is forbidden: User "{user}" cannot {verb} resource "{resource}" '
            f'in API group "{group}" in the namespace "{key.namespace}"',
        )  # fmt: skip

    def _rules(self, user: str, groups: set[str], wanted: Key) -> Iterator[dict]:
        """Of the roles that somebody has in a namespace."""
        for (api, plural, namespace, _), binding in list(self.store.objects.items()):
            here = plural == "clusterrolebindings" or (plural == "rolebindings" and namespace == wanted.namespace)
            if api != RBAC or not here or not any(_is_subject(one, user, groups) for one in binding["subjects"]):
                continue
            of_cluster = binding["roleRef"]["kind"] == "ClusterRole"
            role = self.store.get(Key(RBAC, "clusterroles" if of_cluster else "roles", "" if of_cluster else namespace,
                                      binding["roleRef"]["name"]))  # fmt: skip
            yield from (role or {}).get("rules") or ()

    async def _watch(self, request: web.Request, key: Key) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)

        async def send(type_: str, thing: dict) -> None:
            shown = self._table(key, [thing]) if _wants_table(request) else thing
            await response.write(json.dumps({"type": type_, "object": shown}).encode() + b"\n")

        def ours(thing: dict) -> bool:
            return matches(thing, request.query) and key.name in ("", thing["metadata"]["name"])

        version = int(request.query.get("resourceVersion") or 0)
        initial = request.query.get("sendInitialEvents") == "true"
        if initial or not version:
            version, things = self.store.version, self.store.select(key.api, key.plural, key.namespace)
            for thing in filter(ours, things):
                await send("ADDED", thing)
            if initial:
                meta = {"resourceVersion": str(version), "annotations": {"k8s.io/initial-events-end": "true"}}
                kind = self._kinds[key.api, key.plural]["kind"]
                bookmark = {"kind": kind, "apiVersion": key.api, "metadata": meta}
                await response.write(json.dumps({"type": "BOOKMARK", "object": bookmark}).encode() + b"\n")
        place, end = 0, time.monotonic() + float(request.query.get("timeoutSeconds", 300))
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end and request.transport is not None:
                changes = self.store.since(place)
                place += len(changes)
                for change in changes:
                    same = change.key[:2] == key[:2] and key.namespace in ("", change.key.namespace)
                    if same and change.version > version and ours(change.thing):
                        await send(change.type, change.thing)
                await asyncio.sleep(LOOK_SECONDS)
        return response

    async def _log(self, request: web.Request, key: Key) -> web.StreamResponse:
        response, sent = web.StreamResponse(headers={"Content-Type": "text/plain"}), 0
        since, stamped = request.query.get("sinceTime", ""), request.query.get("timestamps") == "true"
        breaks = self.broken_logs > 0
        self.broken_logs -= breaks
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                lines = [line for line in self.logs.get(key.name, []) if line[0] >= since]
                tail = int(request.query.get("tailLines", len(lines)))
                for at, line in lines[max(sent, len(lines) - tail if not sent else 0) :]:
                    await response.write(f"{at} {line}\n".encode() if stamped else f"{line}\n".encode())
                    if breaks:
                        request.transport.abort()
                        return response
                sent = len(lines)
                pod = self.store.get(key)
                ended = pod is None or pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
                if request.query.get("follow") != "true" or ended:
                    return response
                await asyncio.sleep(LOOK_SECONDS)

    def _table(self, key: Key, things: list[dict]) -> dict:
        return discovery.table(self._kinds[key.api, key.plural]["columns"], self.store.version, things)

    def _out(self, request: web.Request, key: Key, found, status: int = 200) -> web.Response:
        if _wants_table(request):
            return web.json_response(self._table(key, found if isinstance(found, list) else [found]), status=status)
        if isinstance(found, list):
            kind = self._kinds[key.api, key.plural]["kind"]
            found = {"kind": f"{kind}List", "apiVersion": key.api, "items": found,
                     "metadata": {"resourceVersion": str(self.store.version)}}  # fmt: skip
        return web.json_response(found, status=status)


def _verb(request: web.Request, name: str) -> str:
    if request.method == "GET":
        return "watch" if request.query.get("watch") in ("true", "1") else "get" if name else "list"
    return {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[request.method]


def _is_dry(request: web.Request) -> bool:
    return "All" in request.query.getall("dryRun", [])


def _wants_table(request: web.Request) -> bool:
    return "as=Table" in request.headers.get("Accept", "")


async def _body(request: web.Request) -> dict:
    text = await request.text()
    return yaml.safe_load(text) if "yaml" in request.content_type else json.loads(text or "{}")


def _allows(rule: dict, verb: str, group: str, resource: str) -> bool:
    return all({one, "*"} & set(rule.get(key) or ())
               for one, key in ((verb, "verbs"), (group, "apiGroups"), (resource, "resources")))  # fmt: skip


def _is_subject(subject: dict, user: str, groups: set[str]) -> bool:
    return subject["name"] == user if subject["kind"] == "User" else subject["name"] in groups


def certificate(folder: Path) -> tuple[str, str]:
    """Files of a certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    today = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "api.crt", folder / "api.key"
    files[0].write_bytes(built.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ))  # fmt: skip
    return str(files[0]), str(files[1])
