"""One optimizer step over micro-batches, under any layout."""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from armillary.model.multimodal import MultimodalModel
from armillary.training.delivery import DeviceStep
from armillary.training.engine import Engine


@dataclass(frozen=True)
class StepResult:
    """loss: mean cross entropy of the global batch's learned tokens (nats); grad_norm: global, before clipping.

    source_losses: the same over each source's tokens alone, None where the batch has none of it.
    stop: some rank asked to end after this step. Seconds are this rank's own.
    """

    loss: float
    source_losses: list[float | None]
    grad_norm: float
    stop: bool
    compute_seconds: float
    reduce_seconds: float


def train_step(
    model: MultimodalModel,
    engine: Engine,
    step: DeviceStep,
    sources: int,
    learning_rate: float,
    device: torch.device,
    stop: bool,
) -> StepResult:
    """Forward and backward of this rank's micro-batches, then reduce, clip and update. Collective over all ranks.

    sources: how many sources the batch's tokens may be of.
    """
    started = time.perf_counter()
    last_stage = parallel_state.is_pipeline_last_stage()
    # ZeRO averages over data-parallel ranks; the mean we want is over the global batch's learned tokens.
    scale = parallel_state.get_data_parallel_world_size() / _global_weight(step, device) if last_stage else 1.0

    def forward(batches, model):
        batch = next(batches)

        def loss(hidden):
            mask_T = batch.loss_mask_T
            total, losses_T = model.losses(hidden, batch.labels_T, mask_T * scale)
            of_source_TS = batch.source_ids_T[:, None] == torch.arange(sources, device=device)
            sums_2S = torch.stack([losses_T * mask_T, mask_T]).double() @ of_source_TS.double()
            return total, mask_T.sum().int(), sums_2S

        return model(batch.inputs, logits=False), loss

    sums = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=step.micro_batches,
        model=model,
        num_microbatches=step.count,
        seq_length=step.positions,
        micro_batch_size=1,
        forward_only=False,
    )
    computed = time.perf_counter()
    grad_norm = engine.step(learning_rate)
    counts = last_stage and parallel_state.get_tensor_model_parallel_rank() == 0
    agreed = torch.zeros(2 * sources + 1, dtype=torch.float64, device=device)
    if counts:
        agreed[:-1] = sum(sums).flatten()
    agreed[-1] = stop
    dist.all_reduce(agreed)
    *figures, stops = agreed.tolist()
    losses, weights = figures[:sources], figures[sources:]
    return StepResult(
        sum(losses) / (sum(weights) or 1.0),
        [loss / weight if weight else None for loss, weight in zip(losses, weights, strict=True)],
        grad_norm,
        stops > 0,
        computed - started,
        time.perf_counter() - computed,
    )


def _global_weight(step: DeviceStep, device: torch.device) -> float:
    """The learned tokens of the global batch, by their weight; at least a trifle, so that none at all is no error."""
    total = torch.tensor(step.weight, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.item() or 1.0
