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


@cache
def layer_time(
    dims: Dims, batch: Batch, cluster: Cluster, tensor: Group, context: Group, expert: Group, sequence_parallel: bool,
    precision: str, software: Software, c: Constants, causal: bool = True,
) -> tuple[Pass, Pass]:  # fmt: skip
    """Seconds of (forward, backward) of a layer; `batch` is what this GPU's context-parallel share of it is."""
    size = 4 if precision == "fp32" else 2
    rate = cluster.matmul("fp8" if software.fp8 else precision)
    t, positions = tensor.ranks, batch.positions
    queries, keys, ffn = dims.shard(t)

    def multiply(rows: float, inner: float, columns: float) -> float:
        return product(rows, inner, columns, rate, cluster, precision, c)

    wide = (dims.mlp_matrices - 1) * ffn
    rows, experts = positions, 1.0
    if dims.experts:  # whole experts, each with its share of the tokens of all ranks that share them
        experts = dims.experts / expert.ranks
        rows = positions / t * dims.experts_per_token / experts
    compute = multiply(positions, dims.hidden, queries + 2 * keys) + multiply(positions, queries, dims.hidden)
    compute += experts * (multiply(rows, dims.hidden, wide) + multiply(rows, ffn, dims.hidden))
    compute += multiply(positions / t, dims.hidden, dims.experts)

    attend, attend_back = attention_time(dims, batch, t, cluster, precision, software, c, causal)
    bandwidth = cluster.memory_bytes_s * c.memory
    split = t if sequence_parallel else 1
    moved = software.norm_traffic * positions * dims.hidden / split
    moved += software.activation_traffic * rows * experts * ffn + software.rope_traffic * positions * (queries + keys)
    if software.fp8:  # what goes into products is read, and written in half as many bytes, twice (Micikevicius 2022)
        moved += 3 * (positions * (2 * dims.hidden + queries) + rows * experts * ffn)
    if dims.experts:
        moved += 4 * rows * experts * dims.hidden  # sorted by expert, and back
    memory = size * moved / bandwidth + KERNELS * cluster.kernel_s
    weights = 2 * dims.hidden * (queries + keys) + experts * dims.mlp_matrices * dims.hidden * ffn
    back_memory = (BACKWARD_TRAFFIC * size * moved + ACCUMULATE_BYTES * weights) / bandwidth
    back_memory += 2 * KERNELS * cluster.kernel_s

    one = gather(size * positions * dims.hidden, tensor, cluster, c)  # half an all-reduce
    collectives = software.tensor_collectives if not dims.experts else 1  # experts take positions as they lie
    tensor_forward, tensor_back = 2 * collectives * one, 2 * collectives * one
    if software.tensor_overlap:
        tensor_forward = max(tensor_forward - compute, tensor_forward / PARTS)
        tensor_back = max(tensor_back - 2 * compute, tensor_back / PARTS)
    elif software.backward_overlap and sequence_parallel:
        # Gathers of output gradients stay in view; inputs are gathered again, and their gradients scattered, beside
        # products (Korthikanti et al. 2022, section 4.2.2).
        tensor_back = collectives * one + exposed(2 * collectives * one, compute, c)
    elif software.backward_overlap:
        tensor_back = exposed(tensor_back, compute, c)

    exchange = gather(2 * size * positions * context.ranks * keys, context, cluster, c)
    sent = all_to_all(size * positions / t * dims.experts_per_token * dims.hidden, expert, cluster, c)
    sent *= 2 if dims.experts else 0
    forward = Pass(compute, attend, memory, tensor_forward, exposed(exchange, attend, c), sent)
    backward = Pass(2 * compute, attend_back, back_memory, tensor_back, exposed(2 * exchange, attend_back, c), sent)
    return forward, backward


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
