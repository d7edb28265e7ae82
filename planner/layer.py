"""Seconds of one transformer layer on one GPU, forward and backward."""

from functools import cache
from typing import NamedTuple

from armillary.planner.collective import Group, all_to_all, exposed, gather
from armillary.planner.hardware import Cluster
from armillary.planner.software import Constants, Software
from armillary.planner.stages import Batch, Dims

TILE = 128  # positions of a block of attention: on the diagonal a whole block is computed
PARTS = 4  # into which a product is cut to communicate beside it: the first part's communication is seen
KERNELS = 12  # kernels of a layer's forward pass; twice as many of a backward pass
BACKWARD_ATTENTION = 2.5  # products of the backward kernel over the forward one's (Dao 2023, section 3.1)
BACKWARD_TRAFFIC = 1.5  # memory traffic of norms and activations, backward over forward
SCORE_BYTES = 10.0  # read and written for each score by an unfused softmax with dropout, forward
ACCUMULATE_BYTES = 10  # a new gradient is read, and the fp32 sum read and written, for each micro-batch


class Pass(NamedTuple):
    """Seconds of a pass through a layer or a stage, by part."""

    compute: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0

    def plus(self, other: "Pass") -> "Pass":
        return Pass(*map(sum, zip(self, other, strict=True)))

    def times(self, factor: float) -> "Pass":
        return Pass(*(factor * part for part in self))

    @property
    def total(self) -> float:
        return sum(self)


def product(rows: float, inner: float, columns: float, rate: float, cluster: Cluster, precision: str, c: Constants):
    """Seconds of [rows, inner] x [inner, columns]: its arithmetic, and the share of its memory traffic that is not
    hidden, so that thin matrices are slow (a roofline with both terms added: Williams et al. 2009)."""
    if not rows * inner * columns:
        return 0.0
    size = 4 if precision == "fp32" else 2
    moved = size * (rows * inner + inner * columns + rows * columns)
    return 2 * rows * inner * columns / (rate * c.gemm) + c.traffic * moved / cluster.memory_bytes_s


class Share(NamedTuple):
    """One GPU's share of a layer: positions of the rows, widths of queries, of keys and of the MLP, and how many rows
    each of its experts takes (all positions, of the one that a layer without experts has)."""

    positions: float
    queries: float
    keys: float
    ffn: float
    rows: float
    experts: float


def share_of(dims: Dims, positions: float, tensor: int, expert: int) -> Share:
    """Experts are whole, and get an even share of the tokens of all ranks that share them."""
    widths = dims.shard(tensor)
    if not dims.experts:
        return Share(positions, *widths, positions, 1.0)
    own = dims.experts / expert
    return Share(positions, *widths, positions / tensor * dims.experts_per_token / own, own)


@cache
def layer_time(
    dims: Dims, batch: Batch, cluster: Cluster, tensor: Group, context: Group, expert: Group, sequence_parallel: bool,
    precision: str, software: Software, c: Constants, causal: bool = True,
) -> tuple[Pass, Pass]:  # fmt: skip
    """Seconds of (forward, backward) of a layer; `batch` is what this GPU's context-parallel share of it is."""
    size = 4 if precision == "fp32" else 2
    share = share_of(dims, batch.positions, tensor.ranks, expert.ranks)
    compute = products_time(dims, share, tensor.ranks, cluster, precision, software, c)
    attend, attend_back = attention_time(dims, batch, tensor.ranks, cluster, precision, software, c, causal)
    split = tensor.ranks if sequence_parallel else 1
    memory, back_memory = memory_time(dims, share, split, size, cluster, software, c)
    there, back = tensor_time(dims, share, size, compute, tensor, sequence_parallel, cluster, software, c)
    exchange = gather(2 * size * share.positions * context.ranks * share.keys, context, cluster, c)
    sent = 0.0
    if dims.experts:
        each = size * share.positions / tensor.ranks * dims.experts_per_token * dims.hidden
        sent = 2 * all_to_all(each, expert, cluster, c)
    forward = Pass(compute, attend, memory, there, exposed(exchange, attend, c), sent)
    backward = Pass(2 * compute, attend_back, back_memory, back, exposed(2 * exchange, attend_back, c), sent)
    return forward, backward


def products_time(
    dims: Dims, share: Share, tensor: int, cluster: Cluster, precision: str, software: Software, c: Constants
) -> float:
    """Seconds of a forward pass's products of activations and weights."""
    rate = cluster.matmul("fp8" if software.fp8 else precision)

    def multiply(rows: float, inner: float, columns: float) -> float:
        return product(rows, inner, columns, rate, cluster, precision, c)

    attention = multiply(share.positions, dims.hidden, share.queries + 2 * share.keys)
    attention += multiply(share.positions, share.queries, dims.hidden)
    one = multiply(share.rows, dims.hidden, (dims.mlp_matrices - 1) * share.ffn)
    one += multiply(share.rows, share.ffn, dims.hidden)
    return attention + share.experts * one + multiply(share.positions / tensor, dims.hidden, dims.experts)


def memory_time(
    dims: Dims, share: Share, split: int, size: int, cluster: Cluster, software: Software, c: Constants
) -> tuple[float, float]:
    """Seconds of what is no product (forward, backward): bytes to and from memory, and starting kernels. split: ranks
    that share the positions of norms and residuals."""
    wide = share.rows * share.experts * share.ffn
    moved = software.norm_traffic * share.positions * dims.hidden / split
    moved += software.activation_traffic * wide
    moved += software.rope_traffic * share.positions * (share.queries + share.keys)
    if software.fp8:  # what goes into products is read, and written in half as many bytes, twice (Micikevicius 2022)
        moved += 3 * (share.positions * (2 * dims.hidden + share.queries) + wide)
    if dims.experts:
        moved += 4 * share.rows * share.experts * dims.hidden  # sorted by expert, and back
    weights = 2 * dims.hidden * (share.queries + share.keys)
    weights += share.experts * dims.mlp_matrices * dims.hidden * share.ffn
    bandwidth, starting = cluster.memory_bytes_s * c.memory, KERNELS * cluster.kernel_s
    forward = size * moved / bandwidth + starting
    return forward, (BACKWARD_TRAFFIC * size * moved + ACCUMULATE_BYTES * weights) / bandwidth + 2 * starting


def tensor_time(
    dims: Dims, share: Share, size: int, compute: float, tensor: Group, sequence_parallel: bool, cluster: Cluster,
    software: Software, c: Constants,
) -> tuple[float, float]:  # fmt: skip
    """Seconds of tensor-parallel communication that is seen (forward, backward), beside `compute` seconds of a forward
    pass's products. Experts take positions as they lie."""
    collectives = 1 if dims.experts else software.tensor_collectives
    half = collectives * gather(size * share.positions * dims.hidden, tensor, cluster, c)  # of all-reduces
    if software.tensor_overlap:
        return max(2 * half - compute, 2 * half / PARTS), max(2 * half - 2 * compute, 2 * half / PARTS)
    if software.backward_overlap and sequence_parallel:
        # Gathers of output gradients stay in view; inputs are gathered again, and their gradients scattered, beside
        # products (Korthikanti et al. 2022, section 4.2.2).
        return 2 * half, half + exposed(2 * half, compute, c)
    return 2 * half, exposed(2 * half, compute, c) if software.backward_overlap else 2 * half


def attention_time(
    dims: Dims, batch: Batch, tensor: int, cluster: Cluster, precision: str, software: Software, c: Constants,
    causal: bool,
) -> tuple[float, float]:  # fmt: skip
    """Seconds of attention between the projections (forward, backward)."""
    heads = dims.heads / tensor
    if software.attention == "unfused":  # every pair, the later ones too, and the scores to memory and back
        document = batch.document
        one = product(document, dims.head_dim, document, cluster.matmul(precision), cluster, precision, c)
        number = 2 * heads * batch.positions / document
        scores = SCORE_BYTES * heads * batch.positions * document / (cluster.memory_bytes_s * c.memory)
        return number * one + scores, 2 * number * one + scores
    pairs = batch.pairs + (batch.positions * TILE / 2 if causal else 0.0)
    done = 4 * pairs * heads * dims.head_dim
    share = getattr(c, software.attention) * (cluster.peak(precision) / cluster.peak("bf16"))
    if software.attention == "flash2":
        share *= min(1.0, dims.head_dim / 128) ** 0.2  # heads of 64 reach 0.87 of the rate of 128 (Shah et al. 2024)
    forward = done / (cluster.attention_forward * share)
    return forward, BACKWARD_ATTENTION * done / (cluster.attention_backward * share)


def recomputed(forward: Pass, recompute: str, dims: Dims, software: Software) -> Pass:
    """What of a layer's forward pass a backward pass repeats."""
    if recompute == "full":
        return forward
    if recompute == "selective":
        if software.selective == "attention":  # Korthikanti et al. 2022, section 5
            return Pass(attention=forward.attention)
        if software.selective == "products":  # torchtitan: every second product, and what is not one
            return Pass(compute=forward.compute / 2, memory=forward.memory)
        moved = software.activation_traffic * dims.ffn
        share = (4 * dims.hidden + moved) / (software.norm_traffic * dims.hidden + moved)
        return Pass(memory=min(1.0, share) * forward.memory)
    return Pass()
