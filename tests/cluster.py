"""A Ray cluster of several nodes on this machine, whose parts can be killed."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

RAY = Path(sys.executable).with_name("ray")
START_SECONDS = 60.0
STARTED = "Ray runtime started"  # says `ray start` once a node has joined; of nodes that join at once some never do
SETTINGS = {  # a node that is gone is to be seen within seconds
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # after which a node that hears nothing from the head ends itself
    "RAY_worker_niceness": "0",
}


class Node:
    """A node's processes, in a session of their own."""

    def __init__(self, process: subprocess.Popen, cpus: int):
        self.process, self.cpus = process, cpus

    def _all(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def kill(self) -> None:
        """All of it at once, as when the power fails."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in self._all():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()

    def kill_raylet(self) -> None:
        """Its agent alone: what the ranks there do about it is up to them."""
        next(process for process in self._all() if process.name() == "raylet").kill()

    def has(self, pid: int) -> bool:
        """Whether a process is of this node."""
        return any(process.pid == pid for process in self._all())

    def freeze(self) -> None:
        """Stop all its processes, as when the network to it is cut."""
        for process in self._all():
            process.suspend()


class Cluster:
    """A head without processors, and nodes with some; use as a context. `environment` is what joins it."""

    def __init__(self, host: str = "127.0.0.1"):
        self._host = host
        self._folder = tempfile.mkdtemp(prefix="r-")  # sockets live in it, whose paths may not be long
        token = Path(self._folder) / "token"
        token.write_text("5" * 64)
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        with socket.socket() as probe:
            probe.bind((host, 0))
            self._port = probe.getsockname()[1]
        self.address = f"{host}:{self._port}"
        self.nodes: list[Node] = []
        self._head = self._start("--head", f"--port={self._port}", "--include-dashboard=false",
                                 f"--temp-dir={self._folder}", "--num-gpus=0", cpus=0, host=host)  # fmt: skip

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_) -> None:
        for node in (*self.nodes, self._head):
            node.kill()
        for process in psutil.process_iter(["cmdline"]):  # what had left its parent
            if any(self._folder in word for word in process.info["cmdline"] or ()):
                process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, cpus: int, host: str = "", prefix: list[str] = (), gpus: int = 0) -> Node:
        """A new node, which has joined.

        prefix: what the command begins with, as `ip netns exec NAME` for a node in another namespace. gpus: as many as
        Ray is told that there are."""
        words = (f"--address={self.address}", f"--num-gpus={gpus}")
        self.nodes.append(self._start(*words, cpus=cpus, host=host or self._host, prefix=prefix))
        return self.nodes[-1]

    def remove(self, node: Node) -> None:
        """Kill what is left of it."""
        node.kill()
        self.nodes.remove(node)

    def _start(self, *words: str, cpus: int, host: str, prefix: list[str] = ()) -> Node:
        handle, said = tempfile.mkstemp(dir=self._folder, prefix="said-")
        process = subprocess.Popen(
            [*prefix, RAY, "start", "--block", f"--num-cpus={cpus}", f"--node-ip-address={host}",
             "--object-store-memory=100000000", "--disable-usage-stats", *words],
            env=os.environ | self.environment | SETTINGS, stdout=handle, stderr=handle, start_new_session=True,
        )  # fmt: skip
        os.close(handle)
        node, deadline = Node(process, cpus), time.monotonic() + START_SECONDS
        while STARTED not in (text := Path(said).read_text()):
            assert process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.05)
        return node


def kill_rank(place: dict) -> None:
    """By its line of a `placed` event."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(place["pid"], signal.SIGKILL)
