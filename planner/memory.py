"""Bytes on one GPU of each pipeline stage, by part."""

from dataclasses import asdict, dataclass

from armillary.model.config import ModelConfig
from armillary.planner.software import ARMILLARY, Constants, Software, constants
from armillary.planner.stages import (
    Batch,
    Dims,
    Stage,
    Step,
    batch,
    decoder_dims,
    in_flight,
    layer_weights,
    stages,
    vision_dims,
)
from armillary.training.layout import Layout

CHUNK = 2048  # positions of a chunk of the loss, at least (kernels/cross_entropy.py)
RUNTIME_BYTES = 1.5e9  # the CUDA context, NCCL's channels and the libraries' workspaces (assumed)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU of a stage, by part; the parts add up to `total`."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # kept for backward passes, of all micro-batches in flight
    working: float  # of the layer in work: what is computed again, and gradients of activations
    logits: float  # with their gradients
    buffers: float  # of communication and the engine; weights that ZeRO-3 has gathered
    runtime: float  # before the first tensor
    fragmentation: float  # memory that the allocator cannot use

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"total": self.total}


def memory(
    model: ModelConfig, layout: Layout, step: Step, software: Software = ARMILLARY, c: Constants | None = None
) -> list[StageMemory]:
    """Bytes of every stage of `layout`, which must be allowed (training.support.problems)."""
    c = c or constants()
    given = batch(step, layout)
    return [_stage(one, model, layout, step, given, software, c) for one in stages(model, layout, software)]


def _stage(
    stage: Stage, model: ModelConfig, layout: Layout, step: Step, given: Batch, software: Software, c: Constants
) -> StageMemory:
    size = 4 if step.precision == "fp32" else software.weight_bytes
    kept_gradient = 4 if step.precision == "fp32" else software.kept_gradient_bytes
    weights, gradients, optimizer = states(stage, layout, size, kept_gradient, software)
    if step.deterministic:  # sums of a tree of micro-batches (training/engines/canonical.py), not divided by anything
        gradients += 4 * (stage.dense + stage.expert) * tree_sums(step.global_batch // layout.micro_batch, layout.data)
    dims, element = decoder_dims(model, software), 4 if step.precision == "fp32" else 2
    kept, whole = activations(dims, given.positions, layout, element, software)
    flying = in_flight(layout, stage.index, given.count)
    held = flying * stage.layers * kept
    working = (whole - kept if layout.recompute != "none" else 0.0) + whole / 2
    if stage.first:
        held += flying * _images(model, given, layout, element, software)
    logits = _logits(model, given.positions, layout, element, software) if stage.last else 0.0
    held += element * given.positions * dims.hidden / (layout.tensor if layout.sequence_parallel else 1)  # on its way
    buffers = _buffers(stage, dims, layout, element, kept_gradient, software)
    loose = held + max(working, logits) + buffers
    return StageMemory(
        weights, gradients, optimizer, held, max(0.0, working - logits), logits, buffers, RUNTIME_BYTES,
        c.fragmentation * (loose + gradients),
    )  # fmt: skip


def states(
    stage: Stage, layout: Layout, weight_bytes: float, gradient_bytes: float, software: Software
) -> tuple[float, float, float]:
    """Bytes of (weights, gradients, optimizer state). ZeRO divides them over data-parallel ranks: state always,
    gradients from stage 2 on, weights at stage 3 (Rajbhandari et al. 2020, section 5)."""
    replicas = layout.data * layout.context
    expert_replicas = max(1, replicas * layout.tensor // layout.expert)

    def divided(size: float, by_zero: bool) -> float:
        return size * (stage.dense / (replicas if by_zero else 1) + stage.expert / (expert_replicas if by_zero else 1))

    shared = software.shared_optimizer
    optimizer = 0.0 if layout.offload else divided(software.state_bytes, shared)
    return divided(weight_bytes, layout.zero == 3), divided(gradient_bytes, layout.zero >= 2), optimizer


def tree_sums(micro_batches: int, ranks: int) -> int:
    """Gradients of the whole part that a rank holds at once: a sum for each level of its share of the tree, and one."""
    return ((micro_batches & -micro_batches) // ranks).bit_length()


def activations(dims: Dims, positions: float, layout: Layout, element: int, software: Software) -> tuple[float, float]:
    """Bytes of one layer and micro-batch on one GPU: (kept until its backward pass, all that the pass needs).

    What each operation of model/layers.py keeps, after Korthikanti et al. 2022, section 4.1 (equations 1 to 4): the
    layer's input and the sum behind attention, both norms' outputs (h each); rotated queries and keys, values (a view
    of the product that made all three), attention's output; SwiGLU's input (two widths) and output; in fp32 a number a
    row and norm, and one a row and head. The terms in h are divided over t under sequence parallelism only. Scores are
    never kept (flash attention). Under context parallelism keys and values are gathered, and kept of the whole row.
    """
    queries, keys, ffn = dims.shard(layout.tensor)
    split = layout.tensor if layout.sequence_parallel else 1
    rows = positions * dims.experts_per_token / layout.tensor if dims.experts else positions
    inputs = positions * dims.hidden / split
    residuals, norms = 2 * inputs, 2 * (positions * dims.hidden if software.kept_gathered else inputs)
    attention = positions * (3 * queries + 3 * keys if software.joint_qkv else 2 * queries + 2 * keys)
    if layout.context > 1 and software.gathered_keys:  # of the row; each stretch's own attention writes its output
        attention = positions * (3 * queries + 2 * keys * layout.context)
    sums = 4 * positions * (2 / split + dims.heads / layout.tensor)
    wide, output = rows * (dims.mlp_matrices - 1) * ffn, rows * ffn
    dispatched = 2 * rows * dims.hidden if dims.experts else 0.0  # each token for each of its experts, in and out
    more = software.kept_activations * output
    whole = element * (residuals + norms + attention + wide + output + dispatched + more) + sums
    if layout.recompute == "full":
        return element * inputs, whole
    if layout.recompute == "selective":
        return whole - element * _repeated(software, norms, output, wide, queries * positions, inputs), whole
    return whole, whole


def _repeated(software: Software, norms: float, output: float, wide: float, queries: float, inputs: float) -> float:
    """Numbers that selective recomputation does not keep."""
    if software.selective == "products":  # norms, activation, and every second product's output
        return norms + output + (wide + queries + inputs) / 2
    if software.selective == "attention":  # scores, which flash attention does not keep anyway
        return 0.0
    return norms + output


def _images(model: ModelConfig, given: Batch, layout: Layout, element: int, software: Software) -> float:
    """Bytes that the image encoder and the projector keep of a micro-batch: nothing there is computed again."""
    if not software.images or not given.images:
        return 0.0
    alone = layout.model_copy(update={"recompute": "none", "sequence_parallel": False})
    kept, _ = activations(vision_dims(model), given.images * model.num_patches, alone, element, software)
    merged = given.images * model.num_patches * model.vision_hidden_size
    projected = 2 * given.images * model.image_positions * model.hidden_size / layout.tensor
    return model.vision_layers * kept + element * (merged + projected)


def _logits(model: ModelConfig, positions: float, layout: Layout, element: int, software: Software) -> float:
    """Bytes of the loss: a chunk's logits, the gradients of the hidden states, and the output matrix's in fp32 with its
    rounded copy (kernels/cross_entropy.py); or all logits, where a codebase holds them."""
    width = model.vocab_size / layout.tensor
    if software.whole_logits:
        return software.whole_logits * positions * width
    chunk = min(positions, max(CHUNK, positions * model.hidden_size / model.vocab_size))
    hidden = 2 * element * positions * model.hidden_size  # gathered over tensor-parallel ranks, and its gradient
    return element * chunk * width + hidden + (4 + element) * width * model.hidden_size


def _buffers(
    stage: Stage, dims: Dims, layout: Layout, element: int, gradient_bytes: float, software: Software
) -> float:
    """Bytes on their way: a bucket of gradients and one of weights, or the layers that ZeRO-3 has gathered."""
    held = stage.dense + stage.expert
    if layout.data * layout.context == 1:
        return 0.0
    if layout.zero == 3:
        layer = sum(layer_weights(dims, layout.tensor, layout.expert))
        ends = max(0.0, held - stage.layers * layer)  # the embedding and the output matrix are gathered whole
        return 2 * element * layer + (element + gradient_bytes) * max(layer, ends / 2)
    return min(software.bucket_bytes, (gradient_bytes + element) * held)
