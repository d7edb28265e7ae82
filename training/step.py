"""One optimizer step over micro-batches, under any layout."""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from armillary.data_pipeline.batch import PackedBatch
from armillary.data_pipeline.loader import Step
from armillary.model.multimodal import Inputs, MultimodalModel, token_losses
from armillary.training.engine import Engine


@dataclass(frozen=True)
class StepResult:
    """loss: mean cross entropy of the global batch's learned tokens (nats); grad_norm: global, before clipping.

    stop: some rank asked to end after this step. Seconds are this rank's own.
    """

    loss: float
    grad_norm: float
    stop: bool
    compute_seconds: float
    reduce_seconds: float


def to_inputs(batch: PackedBatch, device: torch.device, dtype: torch.dtype) -> Inputs:
    """A batch's part that the model reads, on `device`; patches in the weights' dtype."""
    as_tensor = torch.from_numpy
    return Inputs(
        as_tensor(batch.tokens_T).to(device),
        as_tensor(batch.positions_T).to(device),
        as_tensor(batch.cu_seqlens).to(device),
        as_tensor(batch.patches_IND).to(device, dtype),
        as_tensor(batch.image_starts_I).to(device),
    )


def train_step(
    model: MultimodalModel, engine: Engine, step: Step, learning_rate: float, device: torch.device, stop: bool
) -> StepResult:
    """Forward and backward of this rank's micro-batches, then reduce, clip and update. Collective over all ranks."""
    started = time.perf_counter()
    # ZeRO averages over data-parallel ranks; the mean we want is over the global batch's learned tokens.
    scale = parallel_state.get_data_parallel_world_size() / step.learned_tokens
    dtype = model.config.params_dtype

    def forward(batches, model):
        batch = next(batches)
        labels_T = torch.from_numpy(batch.labels_T).to(device)
        mask_T = torch.from_numpy(batch.loss_mask_T).to(device)

        def loss(logits):
            total = (token_losses(logits, labels_T) * mask_T).sum()
            # The schedule may change the loss in place: what is logged is a copy.
            return total * scale, mask_T.sum().int(), total.detach().clone()

        return model(to_inputs(batch, device, dtype)), loss

    losses = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(step.micro_batches),
        model=model,
        num_microbatches=len(step.micro_batches),
        seq_length=len(step.micro_batches[0].tokens_T),
        micro_batch_size=1,
        forward_only=False,
    )
    computed = time.perf_counter()
    grad_norm = engine.step(learning_rate)
    counts = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
    agreed = torch.tensor([float(sum(losses)) if counts else 0.0, float(stop)], dtype=torch.float64, device=device)
    dist.all_reduce(agreed)
    loss, stops = agreed.tolist()
    return StepResult(
        loss / step.learned_tokens, grad_norm, stops > 0, computed - started, time.perf_counter() - computed
    )
