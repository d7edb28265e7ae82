"""Seconds of collectives among GPUs that lie in nodes (Thakur, Rabenseifner and Gropp 2005: ring and pairwise)."""

import math
from typing import NamedTuple

from armillary.planner.hardware import Cluster
from armillary.planner.software import Constants
from armillary.training.layout import Layout


class Group(NamedTuple):
    """Ranks that communicate: how many, and how many of them lie in one node."""

    ranks: int
    inside: int

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.inside)


def groups(layout: Layout, node_gpus: int) -> dict[str, Group]:
    """The groups of each axis: ranks are numbered tensor first, then context, data, pipeline (training.layout)."""

    def group(ranks: int, stride: int) -> Group:
        return Group(ranks, max(1, min(ranks, node_gpus // stride)))

    tensor, context, data = layout.tensor, layout.context, layout.data
    replicas = data * context * tensor
    return {
        "tensor": group(tensor, 1),
        "context": group(context, tensor),
        "data": group(data * context, tensor),
        "expert": group(layout.expert, 1),
        "expert_data": group(replicas // layout.expert, layout.expert),
        "pipeline": group(layout.pipeline, replicas),
    }


def gather(size: float, group: Group, cluster: Cluster, c: Constants) -> float:
    """All-gather to `size` bytes on each rank, or reduce-scatter from it. An all-reduce is twice that.

    A ring moves (n - 1) / n of the bytes over each rank's link. Over nodes, the ranks of a node use their network cards
    together, and the part inside the node goes on at the same time.
    """
    if group.ranks == 1:
        return 0.0
    within = size * (group.inside - 1) / group.inside / (cluster.link.bytes_s * c.link)
    if group.nodes == 1:
        return within + (group.ranks - 1) * cluster.link.latency_s
    across = size * (group.nodes - 1) / group.nodes / (group.inside * cluster.network.bytes_s * c.network)
    return max(within, across) + 2 * math.log2(group.nodes) * cluster.network.latency_s


def all_to_all(size: float, group: Group, cluster: Cluster, c: Constants) -> float:
    """Each rank sends `size` bytes, evenly to all of them."""
    if group.ranks == 1:
        return 0.0
    within = size * (group.inside - 1) / group.ranks / (cluster.link.bytes_s * c.link)
    across = size * (group.ranks - group.inside) / group.ranks / (cluster.network.bytes_s * c.network)
    return max(within, across) + (cluster.network if group.nodes > 1 else cluster.link).latency_s


def send(size: float, group: Group, cluster: Cluster, c: Constants) -> float:
    """To the next rank of a group, which lies in another node as soon as one of them does."""
    if group.ranks == 1:
        return 0.0
    far = group.nodes > 1
    link, share = (cluster.network, c.network) if far else (cluster.link, c.link)
    return size / (link.bytes_s * share) + link.latency_s


def exposed(communication: float, computation: float, c: Constants) -> float:
    """What is seen of communication beside computation: what is longer, and a share of it in any case."""
    return max(communication - computation, c.overlapped * communication)
