"""Ray: starting it on this machine, or joining a cluster, with token authentication either way."""

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from armillary.errors import ClusterError
from armillary.launcher.placement import Node

ANSWER_SECONDS = 2.0


@contextlib.contextmanager
def connected(address: str, ranks: int) -> Iterator[bool]:
    """Within, Ray is connected: to `address`, or to a cluster of this machine alone that ends with the block.

    Yields whether the ranks shall have a GPU each. A cluster of our own listens on loopback only and has a
    token of its own, which is in no log and no argument. Joining needs the cluster's token in RAY_AUTH_TOKEN or
    RAY_AUTH_TOKEN_PATH. Raises ClusterError.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    folder = Path(tempfile.mkdtemp(prefix="armillary-"))
    saved = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        if not address:
            token = folder / "token"
            with open(os.open(token, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
            # Ray takes 127.0.0.1 for "my public address" and listens on every interface, unless told (before its
            # import) that this machine cannot be part of a larger cluster.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            os.environ.setdefault("RAY_worker_niceness", "0")  # not 15: ranks come before Ray's own processes
        import ray

        try:
            if address:
                _check_token()
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            else:
                ray.init(
                    "local",
                    num_cpus=max(ranks, os.cpu_count() or 1),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    object_store_memory=128 * 2**20,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(folder / "ray"),
                )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ClusterError(
                f"Ray could not be {'reached' if address else 'started'}: {str(error).strip().splitlines()[0]}",
                address or "this machine",
                "check the address, and the cluster's token in RAY_AUTH_TOKEN_PATH"
                if address
                else "see that TMPDIR is short and has room, and that memory is free",
            ) from None
        # On one machine too few GPUs are none: the ranks all run on its processors instead.
        yield ray.cluster_resources().get("GPU", 0) >= (1 if address else ranks)
    finally:
        with contextlib.suppress(ImportError):
            import ray

            ray.shutdown()
        if saved is None:
            os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
        else:
            os.environ["RAY_AUTH_TOKEN_PATH"] = saved
        shutil.rmtree(folder, ignore_errors=True)


def nodes(gpus: bool, cpus_per_rank: int) -> list[Node]:
    """The live nodes of the connected cluster and their room for ranks: one a GPU, or one a `cpus_per_rank`.

    Ray takes seconds to notice that a node is gone: a node whose agent does not answer is none.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    if not alive:
        return []
    with ThreadPoolExecutor(min(64, len(alive))) as pool:
        answers = list(pool.map(lambda node: reaches(node["NodeManagerAddress"], node["NodeManagerPort"]), alive))
    return [
        Node(node["NodeID"], int(node["Resources"].get("GPU" if gpus else "CPU", 0) // (1 if gpus else cpus_per_rank)))
        for node, answer in zip(alive, answers, strict=True)
        if answer
    ]


def reaches(host: str, port: int) -> bool:
    """Whether something answers there within ANSWER_SECONDS."""
    try:
        socket.create_connection((host, port), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def _check_token() -> None:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_TOKEN") or (path and Path(path).is_file()):
        return
    if not path and (Path.home() / ".ray" / "auth_token").is_file():
        return
    raise ClusterError(
        "there is no token to join the cluster with",
        path or "RAY_AUTH_TOKEN_PATH",
        "put the cluster's token into a file of yours alone and its path into RAY_AUTH_TOKEN_PATH",
    )
