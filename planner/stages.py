"""What each GPU of a pipeline stage holds of the model, and what goes through it: counts only, no machine in it."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from armillary.model.config import ModelConfig
from armillary.planner.software import Software
from armillary.training.layout import Layout
from armillary.training.support import Setting


class Dims(NamedTuple):
    """Sizes of one transformer layer."""

    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    experts: int
    experts_per_token: int
    mlp_matrices: int

    def shard(self, tensor: int) -> tuple[float, float, float]:
        """Widths of queries, of keys (or values) and of the MLP on one of `tensor` ranks."""
        return (
            self.heads * self.head_dim / tensor,
            self.groups * self.head_dim / tensor,
            self.ffn / (1 if self.experts else tensor),
        )


class Step(NamedTuple):
    """What one optimizer step computes. document: see model.flops.work; images: of a row, on average."""

    seq_length: int
    global_batch: int
    document: float
    images: float
    precision: str
    deterministic: bool = False
    compile: bool = False


def setting(layout: Layout, model: ModelConfig, step: Step) -> Setting:
    """What the rules for layouts look at."""
    bf16 = step.precision == "bf16"
    return Setting(layout, model, step.seq_length, step.global_batch, bf16, step.deterministic, step.compile)


@dataclass(frozen=True)
class Stage:
    """One pipeline stage as one GPU sees it. Parameters are counted before ZeRO divides them."""

    index: int  # of the first such stage
    alike: int  # stages of this kind: those between the first and the last are
    layers: int
    first: bool
    last: bool
    dense: float  # parameters whose gradients all data-parallel ranks share
    expert: float  # of the experts that this GPU holds


@cache
def decoder_dims(model: ModelConfig, software: Software) -> Dims:
    return Dims(
        model.hidden_size, model.num_heads, model.num_query_groups, model.head_dim, model.ffn_hidden_size,
        model.num_experts, model.experts_per_token, software.mlp_matrices,
    )  # fmt: skip


@cache
def vision_dims(model: ModelConfig) -> Dims:
    heads = model.vision_num_heads
    return Dims(
        model.vision_hidden_size, heads, heads, model.vision_hidden_size // heads, model.vision_ffn_hidden_size, 0, 1, 3
    )


def layer_weights(dims: Dims, tensor: int, expert: int) -> tuple[float, float]:
    """Parameters of a layer on one GPU: (dense, of experts). Norms and the router are on every tensor-parallel rank."""
    queries, keys, ffn = dims.shard(tensor)
    dense = 2 * dims.hidden * (queries + keys) + 2 * dims.hidden
    mlp = dims.mlp_matrices * dims.hidden * ffn
    if dims.experts:
        return dense + dims.hidden * dims.experts, mlp * dims.experts / expert
    return dense + mlp, 0.0


def stages(model: ModelConfig, layout: Layout, software: Software) -> tuple[Stage, ...]:
    """The kinds of stages, in order: the first, those between, the last; ValueError where the layers cannot be shared
    out."""
    return _stages(model, tuple(layout.stage_layers(model.depth)), layout.tensor, layout.expert, software)


@cache
def _stages(model: ModelConfig, layers: tuple[int, ...], tensor: int, expert: int, software: Software):
    dims, vision = decoder_dims(model, software), vision_dims(model)
    of_layer, of_experts = layer_weights(dims, tensor, expert)
    table = model.vocab_size * model.hidden_size / tensor
    encoder = 0.0
    if software.images:
        encoder = (model.patch_dim + model.num_patches + 1) * vision.hidden
        encoder += model.vision_layers * layer_weights(vision, tensor, 1)[0]
        merged = vision.hidden * model.patch_merge**2
        encoder += (merged + model.hidden_size) * model.hidden_size / tensor
    found = []
    end = len(layers) - 1
    for index in sorted({0, min(1, end), end}):
        first, last, count = index == 0, index == end, layers[index]
        ends = (table + encoder) * first + model.hidden_size * last
        if last and not (first and model.tied_embeddings):
            ends += table  # with tied embeddings and a pipeline, the last stage has a copy
        alike = 1 if first or last else end - 1
        found.append(Stage(index, alike, count, first, last, count * of_layer + ends, count * of_experts))
    return tuple(found)


class Batch(NamedTuple):
    """What one micro-batch gives one GPU, and how many of them a step has."""

    positions: float
    pairs: float  # of positions that see each other; causal ones count half
    document: float
    images: float
    count: int


def batch(step: Step, layout: Layout, window: int = 0) -> Batch:
    """Micro-batches of a step. A window bounds what each position sees."""
    positions = layout.micro_batch * step.seq_length / layout.context
    seen = step.document / 2
    if window and window < step.document:
        seen = window * (1 - window / (2 * step.document))
    count = step.global_batch // (layout.data * layout.micro_batch)
    return Batch(positions, positions * seen, step.document, layout.micro_batch * step.images, count)


def in_flight(layout: Layout, stage: int, count: int) -> float:
    """Micro-batches whose activations a stage holds at once, in units of all its layers.

    1F1B: min(count, stages - stage) (Narayanan et al. 2021, section 2.2). Interleaved: Megatron-core's warm-up of
    2 (stages - stage - 1) + (virtual - 1) stages parts, and the one in work, each 1 / virtual of the layers.
    """
    if layout.pipeline == 1:
        return 1.0
    if layout.virtual == 1:
        return float(min(count, layout.pipeline - stage))
    warm_up = 2 * (layout.pipeline - stage - 1) + (layout.virtual - 1) * layout.pipeline
    return min(count * layout.virtual, warm_up + 1) / layout.virtual
