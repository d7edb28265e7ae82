"""Which rank runs on which node: pure decisions."""

from collections.abc import Sequence
from dataclasses import dataclass

from armillary.errors import ERRORS, ClusterError, FaultError


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: how many ranks it has room for."""

    id: str
    room: int


@dataclass(frozen=True)
class Bundle:
    """The ranks [first, first + count) that one node takes."""

    node: str
    first: int
    count: int


def place(nodes: Sequence[Node], world_size: int, tensor: int) -> list[Bundle]:
    """Ranks in order over the roomiest nodes, whole tensor-parallel groups only; [] where there is too little room."""
    bundles, first = [], 0
    for node in sorted(nodes, key=lambda node: (-node.room, node.id)):
        count = min(node.room // tensor * tensor, world_size - first)
        if count > 0:
            bundles.append(Bundle(node.id, first, count))
            first += count
    return bundles if first == world_size else []


def no_room(nodes: Sequence[Node], world_size: int, tensor: int) -> ClusterError:
    """What to say then."""
    room = ", ".join(f"{node.id[:8]}: {node.room}" for node in nodes) or "none"
    found = sum(node.room // tensor * tensor for node in nodes)
    return ClusterError(
        f"the layout needs {world_size} ranks in groups of {tensor} on one node; there is room for {found}",
        f"room for ranks by node: {room}",
        "use a smaller layout, a larger cluster, or a smaller cluster.cpus_per_rank",
    )


@dataclass(frozen=True)
class Failure:
    """How a rank ended badly: `kind` is an error class of armillary.errors, "died", or another exception's name. phase
    and step: where in training it was, if it lived to tell."""

    rank: int
    kind: str
    message: str
    phase: str | None = None
    step: int | None = None


def is_fault(failure: Failure) -> bool:
    """Whether it is a machine's or a process's, and not of what ran there."""
    if failure.kind in ERRORS:
        return failure.kind == FaultError.__name__
    return failure.kind == "died" or _lost_contact(failure) or "cuda error" in failure.message.lower()


def _lost_contact(failure: Failure) -> bool:
    words = ("connection", "peer", "gloo", "nccl", "timed out", "could not meet")
    return any(word in failure.message.lower() for word in words)


def blame(failures: list[Failure], user_errors: set[str]) -> Failure:
    """The failure that explains the others: a user's error first, then a death, then an exception of its own.

    When one rank ends, its peers' collectives fail too; those that only lost contact come last.
    """

    def order(failure: Failure) -> tuple[int, int]:
        if failure.kind in user_errors:
            return 0, failure.rank
        if failure.kind == "died":
            return 1, failure.rank
        return 3 if _lost_contact(failure) else 2, failure.rank

    return min(failures, key=order)
