"""One optimizer step over micro-batches, under any layout."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from armillary.model.flops import Work
from armillary.model.multimodal import MultimodalModel, Targets
from armillary.training.delivery import DeviceStep
from armillary.training.engines.shared import Engine
from armillary.training.health import heartbeat


class Flags(NamedTuple):
    """What a rank has to say to all others; after a step, what any of them had: all decide alike by it.

    stop: end after this step. saving: a checkpoint is still being written. failed: one could not be. full: there is no
    room for another.
    """

    stop: bool = False
    saving: bool = False
    failed: bool = False
    full: bool = False


NO_FLAGS = Flags()


@dataclass(frozen=True)
class StepResult:
    """loss: mean cross entropy of the global batch's learned tokens (nats); grad_norm: global, before clipping.

    source_losses: the same over each source's tokens alone, None where the batch has none of it.
    accepted: whether the weights were updated. work: what went through the model, on all ranks.
    flags: raised by any rank. Seconds are this rank's own; from its last pass's end to the last rank's it waits.
    """

    loss: float
    source_losses: list[float | None]
    grad_norm: float
    accepted: bool
    work: Work
    flags: Flags
    compute_seconds: float
    collective_wait_seconds: float
    reduce_seconds: float


def train_step(
    stages: Sequence[MultimodalModel],
    engine: Engine,
    step: DeviceStep,
    sources: int,
    learning_rate: float,
    device: torch.device,
    flags: Flags = NO_FLAGS,
    before_update: Callable[[], None] = lambda: None,
    accept: Callable[[float, float], bool] = lambda loss, grad_norm: True,
) -> StepResult:
    """Forward and backward of this rank's micro-batches, then reduce, clip and update. Collective over all ranks.

    sources: how many sources the batch's tokens may be of. before_update: called when all is ready to change weights.
    accept: by the loss and the gradient norm, whether they are changed at all; the same on all ranks.
    """
    started = time.perf_counter()
    heartbeat.enter("compute")
    data_ranks = parallel_state.get_data_parallel_world_size()
    scale = engine.replicas / _global_weight(step, device)
    for stage in stages:
        stage.set_aux_scale(engine.replicas / (step.count * data_ranks))

    def forward(batches, model):
        heartbeat.beat()
        batch = next(batches)
        if not model.post_process:
            return model(batch.inputs), None
        mask_T = batch.loss_mask_T
        total, losses_T = model(batch.inputs, Targets(batch.labels_T, mask_T * scale))
        mask_T, ids_T = model.own(mask_T), model.own(batch.source_ids_T)
        of_source_TS = ids_T[:, None] == torch.arange(sources, device=device)
        sums_2S = torch.stack([losses_T * mask_T, mask_T]).double() @ of_source_TS.double()
        return total, lambda total: (total, sums_2S.new_zeros((), dtype=torch.int), sums_2S)

    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        sums = _pipeline(forward, stages, step)
    else:
        sums = []
        for number in range(step.count):
            total, report = forward(step.micro_batches, engine.model)
            engine.backward(total, last=number == step.count - 1)
            sums.append(report(total)[2])
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # which the figures below need anyway: now it is known who waits for whom
    computed = time.perf_counter()
    heartbeat.enter("reduce")
    agreed = torch.tensor([*_share(step, sums, sources), *flags], dtype=torch.float64, device=device)
    dist.all_reduce(agreed)
    figures = agreed.tolist()
    met = time.perf_counter()
    losses, weights, rest = figures[:sources], figures[sources : 2 * sources], figures[2 * sources :]
    loss = sum(losses) / (sum(weights) or 1.0)
    before_update()
    grad_norm = engine.step(learning_rate, lambda norm: accept(loss, norm))
    return StepResult(
        loss,
        [loss / weight if weight else None for loss, weight in zip(losses, weights, strict=True)],
        grad_norm,
        accept(loss, grad_norm),
        Work(*rest[:3]),
        Flags(*(raised > 0 for raised in rest[3:])),
        computed - started,
        met - computed,
        time.perf_counter() - met,
    )


def _share(step: DeviceStep, sums: list[torch.Tensor], sources: int) -> list[float]:
    """What this rank adds to the figures of all: losses and weights by source, and the work; 0 where another rank of
    those that share rows or layers does."""
    first_tensor = parallel_state.get_tensor_model_parallel_rank() == 0
    sums_2S = [0.0] * 2 * sources
    if first_tensor and parallel_state.is_pipeline_last_stage():
        sums_2S = sum(sums).flatten().tolist()
    work = [0.0] * 3
    if first_tensor and parallel_state.is_pipeline_first_stage() and parallel_state.get_context_parallel_rank() == 0:
        work = [step.count * step.positions, step.pairs, step.images]
    return [*sums_2S, *work]


def _pipeline(forward, stages: Sequence[MultimodalModel], step: DeviceStep) -> list[torch.Tensor]:
    """Megatron-core's schedule: 1F1B, interleaved where a rank has several stages (Narayanan et al. 2021, section 2.2).
    What `forward` reports of each micro-batch, on the last stage."""
    batches = list(itertools.tee(step.micro_batches, len(stages)))
    several = len(stages) > 1
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=batches if several else batches[0],
        model=list(stages) if several else stages[0],
        num_microbatches=step.count,
        seq_length=step.positions,
        micro_batch_size=1,
        forward_only=False,
    )


def _global_weight(step: DeviceStep, device: torch.device) -> float:
    """The learned tokens of the global batch, by their weight; at least a trifle, so that none at all is no error."""
    total = torch.tensor(step.weight, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.item() or 1.0
