"""Seconds of an optimizer step by part, on one GPU of the slowest pipeline stage."""

import math
from dataclasses import asdict, dataclass

from armillary.model.config import ModelConfig
from armillary.planner.collective import Group, exposed, gather, groups, send
from armillary.planner.hardware import Cluster
from armillary.planner.layer import Pass, layer_time, product, recomputed
from armillary.planner.software import ARMILLARY, Constants, Software, constants
from armillary.planner.stages import Batch, Stage, Step, batch, decoder_dims, stages, vision_dims
from armillary.training.layout import Layout

ADAM_BYTES = 30  # of a parameter: gradient, master weight and moments read, the latter three and the weight written
HOST_ADAM_BYTES_S = 20e9  # a rank's share of the host's memory bandwidth (assumed: 160 GB/s for eight)
STATE_BYTES = 12  # of a parameter in a checkpoint: weight and two moments, fp32
STORAGE_BYTES_S = 2e9  # a node writes of a checkpoint (assumed: its share of a parallel file system)
MOST_STORAGE_BYTES_S = 2e12  # all nodes together: Grattafiori et al. 2024, section 3.3.1
POSITION_BYTES = 8  # of a batch on its way to the GPU


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by part; the parts add up to `total`. Communication counts where it is not hidden."""

    compute: float  # products of matrices
    attention: float
    memory: float  # norms, activations, residuals, the loss, and starting kernels
    recompute: float  # what is computed again
    tensor: float
    context: float
    expert: float
    pipeline: float
    data: float
    bubble: float  # waiting for other stages
    jitter: float  # waiting for the slowest rank
    optimizer: float
    loading: float  # the batch, from the host
    checkpoint: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"total": self.total}


def bubble(stage_seconds: list[float], virtual: int) -> float:
    """Seconds that a pipeline's slowest stage waits in a step, from the seconds of each stage for one micro-batch.

    For even stages (stages - 1) / virtual micro-batches (Narayanan et al. 2021, sections 2.2.1 and 2.2.2).
    """
    return (math.fsum(stage_seconds) - max(stage_seconds)) / virtual


def step_time(
    model: ModelConfig, layout: Layout, step: Step, cluster: Cluster, checkpoint_every: int = 0,
    software: Software = ARMILLARY, c: Constants | None = None,
) -> StepTime:  # fmt: skip
    """Seconds of a step of `layout`, which must be allowed (training.support.problems).

    checkpoint_every: steps between checkpoints; 0: there are none.
    """
    c = c or constants()
    given = batch(step, layout, software.window)
    ways = groups(layout, cluster.node_gpus)
    found, size = stages(model, layout, software), 4 if step.precision == "fp32" else 2
    passes = [_stage(one, model, layout, step, given, ways, cluster, software, c) for one in found]
    split = layout.tensor if layout.sequence_parallel or software.scattered_sends else 1
    hop = size * given.positions * model.hidden_size / split
    hop = 2 * layout.virtual * send(hop, ways["pipeline"], cluster, c)
    shared = [
        _shared_weights(one, own, layout, size, ways, cluster, software, c)
        for one, own in zip(found, passes, strict=True)
    ]
    each = [sum(part.total for part in passes[i]) + hop + shared[i][0] for i in range(len(found))]
    slowest = max(range(len(found)), key=each.__getitem__)
    forward, backward, again = (part.times(given.count) for part in passes[slowest])
    waiting = bubble([each[i] for i, one in enumerate(found) for _ in range(one.alike)], layout.virtual)
    return StepTime(
        compute=forward.compute + backward.compute,
        attention=forward.attention + backward.attention,
        memory=forward.memory + backward.memory,
        recompute=again.compute + again.attention + again.memory,
        tensor=forward.tensor + backward.tensor + again.tensor,
        context=forward.context + backward.context + again.context,
        expert=forward.expert + backward.expert + again.expert,
        pipeline=given.count * hop,
        data=given.count * shared[slowest][0] + max(once for _, once in shared),
        bubble=waiting,
        jitter=c.jitter * math.sqrt(2 * math.log(cluster.gpus)) * (given.count * each[slowest] + waiting),
        optimizer=max(_optimizer(one, layout, cluster, software, c) for one in found),
        loading=_loading(model, given, cluster),
        checkpoint=checkpoint_time(model, layout, cluster, software) / checkpoint_every if checkpoint_every else 0.0,
    )


def _stage(
    stage: Stage, model: ModelConfig, layout: Layout, step: Step, given: Batch, ways: dict[str, Group],
    cluster: Cluster, software: Software, c: Constants,
) -> tuple[Pass, Pass, Pass]:  # fmt: skip
    """Seconds of a micro-batch on a stage: forward, backward, and what is computed again."""
    axes = (ways["tensor"], ways["context"], ways["expert"], layout.sequence_parallel)
    dims = decoder_dims(model, software)
    forward, backward = layer_time(dims, given, cluster, *axes, step.precision, software, c)
    again = recomputed(forward, layout.recompute, dims, software).times(stage.layers)
    forward, backward = forward.times(stage.layers), backward.times(stage.layers)
    if stage.first and software.images and given.images:
        seen = given.images * model.num_patches
        images = Batch(seen, seen * model.num_patches, model.num_patches, 0, given.count)
        alone = ways["context"]._replace(ranks=1, inside=1)
        axes = (ways["tensor"], alone, alone, False)
        there, back = layer_time(vision_dims(model), images, cluster, *axes, step.precision, software, c, causal=False)
        forward, backward = (
            forward.plus(there.times(model.vision_layers)),
            backward.plus(back.times(model.vision_layers)),
        )
        projector = _projector(model, given.images, layout.tensor, cluster, step.precision, c)
        forward, backward = forward.plus(Pass(projector)), backward.plus(Pass(2 * projector))
    if stage.last:
        there, back = _loss(model, given.positions, layout, ways["tensor"], cluster, step.precision, software, c)
        forward, backward = forward.plus(there), backward.plus(back)
    return forward, backward, again


def _projector(model: ModelConfig, images: float, tensor: int, cluster: Cluster, precision: str, c: Constants) -> float:
    rows, rate = images * model.image_positions, cluster.matmul(precision)
    merged, width = model.vision_hidden_size * model.patch_merge**2, model.hidden_size / tensor
    patches = product(
        images * model.num_patches, model.patch_dim, model.vision_hidden_size, rate, cluster, precision, c
    )
    inward = product(rows, merged, width, rate, cluster, precision, c)
    return patches + inward + product(rows, width, model.hidden_size, rate, cluster, precision, c)


def _loss(model, positions, layout, tensor, cluster, precision, software, c) -> tuple[Pass, Pass]:
    """Logits and cross entropy; the gradients of inputs and weight follow at once, but count as backward."""
    width = model.vocab_size / layout.tensor
    one = product(positions, model.hidden_size, width, cluster.matmul(precision), cluster, precision, c)
    memory = software.logit_bytes * positions * width / (cluster.memory_bytes_s * c.memory)
    size = 4 if precision == "fp32" else 2
    moved = gather(size * positions * model.hidden_size, tensor, cluster, c)
    return Pass(one, memory=memory / 2, tensor=moved), Pass(2 * one, memory=memory / 2, tensor=moved)


def _shared_weights(stage, passes, layout, size, ways, cluster, software, c) -> tuple[float, float]:
    """Seconds of data-parallel communication that is not hidden: (of each micro-batch, once a step).

    ZeRO (Rajbhandari et al. 2020, section 7): stage 3 gathers weights in both passes and scatters gradients of each
    micro-batch; stage 2 scatters those; stage 1 and replicas exchange gradients once.
    """
    forward, backward, again = (part.total for part in passes)
    grouped = ((stage.dense, ways["data"]), (stage.expert, ways["expert_data"]))
    weights = sum(gather((software.gather_bytes or size) * held, group, cluster, c) for held, group in grouped)
    gradients = sum(gather(software.gradient_bytes * held, group, cluster, c) for held, group in grouped)
    if layout.zero == 3:
        return exposed(weights, forward, c) + exposed(weights + gradients, backward + again, c), 0.0
    if layout.zero == 2:
        seen = exposed(gradients, backward + again, c) if software.data_overlap else gradients
        return seen, exposed(weights, forward, c) if software.data_overlap else weights
    after = weights if software.shared_optimizer else gradients  # an all-reduce gathers what it has scattered
    if software.data_overlap:
        return 0.0, exposed(gradients, backward + again, c) + exposed(after, forward, c)
    if software.gradient_overlap and layout.engine == "megatron":
        return 0.0, exposed(gradients, backward + again, c) + after
    return 0.0, gradients + after


def _optimizer(stage: Stage, layout: Layout, cluster: Cluster, software: Software, c: Constants) -> float:
    replicas = layout.data * layout.context
    parts = replicas if software.shared_optimizer else 1
    expert_parts = max(1, replicas * layout.tensor // layout.expert) if software.shared_optimizer else 1
    held = stage.dense / parts + stage.expert / expert_parts
    if layout.offload:  # gradients down, weights up, the rest on the host (Ren et al. 2021, ZeRO-Offload, section 4)
        return held * (6 / (cluster.host.bytes_s * c.link) + (ADAM_BYTES - 2) / HOST_ADAM_BYTES_S)
    return held * ADAM_BYTES / (cluster.memory_bytes_s * c.memory)


def _loading(model: ModelConfig, given: Batch, cluster: Cluster) -> float:
    """A batch is made ahead of its step: what remains is its way to the GPU."""
    size = given.positions * POSITION_BYTES + given.images * model.num_patches * model.patch_dim
    return given.count * size / cluster.host.bytes_s


def checkpoint_time(model: ModelConfig, layout: Layout, cluster: Cluster, software: Software = ARMILLARY) -> float:
    """Seconds of one checkpoint of the layout's replica, on all of `cluster`: each node writes its share of every
    parameter's state (norms once a tensor-parallel rank), as fast as all together may; training waits for it."""
    held = sum(
        one.alike * (one.dense * layout.tensor + one.expert * layout.expert) for one in stages(model, layout, software)
    )
    rate = min(cluster.gpus / cluster.node_gpus * STORAGE_BYTES_S, MOST_STORAGE_BYTES_S)
    return held * STATE_BYTES / rate
