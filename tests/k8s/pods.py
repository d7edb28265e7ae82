"""A kubelet and a network, as far as a run's pods need them: pods are processes of this machine.

Where a container mounts a volume at a path, the path is put for a folder of the test's; ports are put for free ones.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.k8s import pod_security
from tests.k8s.api import Api
from tests.k8s.store import Key


@dataclass(frozen=True)
class Machine:
    """What all pods share. volume: every PersistentVolumeClaim; secrets: the keys and values of each."""

    api: Api
    volume: Path
    secrets: dict[str, dict[str, str]]


class Pod:
    """One pod: its first container and, beside it, the others."""

    def __init__(self, machine: Machine, namespace: str, name: str, template: dict, environment: dict, folder: Path):
        """template: with labels of its own and of who makes it; environment: what that adds to the first container's;
        folder: for all that is the pod's, which is there before."""
        self.name, self._machine, self._spec = name, machine, template["spec"]
        self._folder, self._environment = folder / name.rpartition("-")[2], environment
        self._said = self._folder / "said"
        self._folder.mkdir()
        self._paths: dict[str, Path] = {}
        for one in self._spec.get("volumes", ()):
            own = self._folder / one["name"]
            self._paths[one["name"]] = machine.volume if "persistentVolumeClaim" in one else own
            self._paths[one["name"]].mkdir(parents=True, exist_ok=True)
        ports = [port["containerPort"] for one in self._spec["containers"] for port in one.get("ports", ())]
        self.ports = {port: free_port() for port in ports}  # all pods have this machine's
        self.process: subprocess.Popen | None = None
        self._beside: list[subprocess.Popen] = []
        store = machine.api.store
        labels = store.get(Key("v1", "namespaces", "", namespace))["metadata"]["labels"]
        found = pod_security.violations(self._spec, labels.get("pod-security.kubernetes.io/enforce", "privileged"))
        assert not found, found
        self._key = Key("v1", "pods", namespace, name)
        meta = {"name": name, "namespace": namespace, "labels": template["metadata"]["labels"]}
        store.add(self._key, {"apiVersion": "v1", "kind": "Pod", "spec": self._spec, "status": {"phase": "Pending"},
                              "metadata": meta})  # fmt: skip

    def start(self, command: list[str], logged: bool = False) -> None:
        first, *others = self._spec["containers"]
        with open(self._said, "w") as said:
            self.process = self._run(first, command, subprocess.PIPE if logged else said)
        if logged:
            threading.Thread(target=self._log, daemon=True).start()
        with open(self._folder / "beside", "w") as said:
            self._beside = [self._run(one, one["command"], said) for one in others]
        self._machine.api.store.update(self._key, {"status": {"phase": "Running"}})

    def wait_for_ray(self) -> None:
        deadline = time.monotonic() + 180
        while "Ray runtime started" not in (text := self._said.read_text()):
            assert self.process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.05)

    def code(self) -> int | None:
        """Of the first container, once it has ended."""
        code = self.process.poll()
        if code is not None:
            phase = "Succeeded" if code == 0 else "Failed"
            self._machine.api.store.update(self._key, {"status": {"phase": phase}})
        return code

    def end(self) -> None:
        """As a kubelet does it: the hook, SIGTERM, and SIGKILL when its time is over; then the pod is gone."""
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
        self._machine.api.store.remove(self._key)

    def _run(self, container: dict, command: list[str], output) -> subprocess.Popen:
        own = {one["name"]: self._mapped(container, one["value"]) for one in container.get("env", ())}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self._folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        for source in container.get("envFrom", ()):
            environment |= self._machine.secrets[source["secretRef"]["name"]]
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
        lines = self._machine.api.logs.setdefault(self.name, [])
        for line in self.process.stdout:
            at = time.time()
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1e9):09d}Z"
            lines.append((stamp, line.rstrip("\n")))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Service(threading.Thread):
    """An address that leads to a port of this machine."""

    def __init__(self, port: int):
        super().__init__(daemon=True)
        self._to, self._open = port, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                one, _ = self._listener.accept()
                try:
                    other = socket.create_connection(("127.0.0.1", self._to))
                except OSError:
                    one.close()
                    continue
                self._open += [one, other]
                for ends in ((one, other), (other, one)):
                    threading.Thread(target=_pass_on, args=ends, daemon=True).start()

    def cut(self) -> None:
        """Break all that goes through it now."""
        broken, self._open = self._open, []
        for one in broken:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while found := one.recv(65536):
            other.sendall(found)
    for end in (one, other):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
