"""Megatron-core's gradient buffers, reduced while the last backward pass runs, and AdamW on each rank's shard of them.

ZeRO-1 (Rajbhandari et al. 2020, section 5.1) under every layout: gradients are added up in fp32 over micro-batches, and
experts' weights have buffers and ranks of their own. The shards are those of Megatron-core's DistributedOptimizer, but
it is not used itself: it knows parameters by the names of CUDA's types, and keeps to itself what is where.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import shard_buffer

from armillary.kernels.adamw import AdamW
from armillary.model.coordinates import Block, blocks, placements
from armillary.model.multimodal import MultimodalModel
from armillary.training.checkpoint.manifest import MOMENTS
from armillary.training.config import OptimizerConfig
from armillary.training.engines import canonical
from armillary.training.engines.canonical import CanonicalSums
from armillary.training.engines.shared import clip_scale, counted_here, decayed, sum_shared


class Piece(NamedTuple):
    """The part of a parameter that lies in this rank's shard of a bucket; flat tensors of one length."""

    parameter: torch.nn.Parameter
    master: torch.nn.Parameter  # fp32: the shard's own numbers, or a copy of lower ones
    gradient: torch.Tensor


class Bucket(NamedTuple):
    """Parameters that are reduced at once, and the parts of them that are this rank's."""

    weights: torch.Tensor  # flat, in the parameters' dtype
    gradients: torch.Tensor  # flat, fp32
    group: dist.ProcessGroup
    places: dict[torch.nn.Parameter, tuple[int, int]]  # where each parameter begins and ends
    master: torch.Tensor  # fp32, this rank's shard
    pieces: list[Piece]


class MegatronEngine:
    """See the module. Gradients are summed over ranks as they are."""

    replicas = 1  # the loss is multiplied by this
    live = True

    def __init__(
        self, stages: Sequence[MultimodalModel], config: OptimizerConfig, sums: CanonicalSums | None, data_ranks: int
    ):
        """sums: what adds the stages' gradients up, in deterministic mode."""
        self._config, self._stages, self._sums, self._data_ranks = config, stages, sums, data_ranks
        options = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=sums is None, use_distributed_optimizer=True
        )
        for parameter in (parameter for stage in stages for parameter in stage.parameters()):
            parameter.allreduce = not getattr(parameter, "of_experts", False)  # over all data-parallel ranks
        self._ddp = [DistributedDataParallel(stage.config, options, stage) for stage in stages]
        for stage, ddp in zip(stages, self._ddp, strict=True):
            stage.config.no_sync_func = [ddp.no_sync for ddp in self._ddp] if len(stages) > 1 else ddp.no_sync
        self._buckets = [
            _bucket(buffer, bucket)
            for ddp in self._ddp
            for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)
            for bucket in buffer.buckets
        ]
        pieces = [piece for bucket in self._buckets for piece in bucket.pieces]
        groups = [
            {"params": [p.master for p in pieces if decayed(p.parameter) is yes], "weight_decay": decay}
            for yes, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        betas = (config.beta1, config.beta2)
        self._optimizer = AdamW(groups, config.learning_rate, betas, config.eps, exact=sums is not None)

    @property
    def model(self) -> torch.nn.Module:
        """What a forward pass without a pipeline calls."""
        return self._stages[0]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Gradients of one micro-batch, which is the step's last or not."""
        with contextlib.nullcontext() if last else self._ddp[0].no_sync():
            loss.backward()

    def step(self, learning_rate: float, accept: Callable[[float], bool] = lambda norm: True) -> float:
        """See Engine."""
        self._reduce()
        sum_shared(self._stages, lambda parameter: parameter.main_grad, experts=False)
        norm = self._norm()
        if accept(norm):
            self._update(learning_rate, clip_scale(norm, self._config.clip_grad))
        for ddp in self._ddp:
            ddp.zero_grad_buffer()
        return norm

    def _update(self, learning_rate: float, scale: float) -> None:
        """Take an optimizer step with the gradients x scale."""
        pieces = [piece for bucket in self._buckets for piece in bucket.pieces]
        for piece in pieces:
            piece.master.grad = piece.gradient.mul_(scale) if scale < 1 else piece.gradient
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._publish()

    def _reduce(self) -> None:
        """Over data-parallel ranks, into each rank's shard."""
        if self._sums is None:
            for ddp in self._ddp:
                ddp.finish_grad_sync()
            return
        for bucket in self._buckets:
            for parameter in bucket.places:
                parameter.main_grad.copy_(self._sums.pop(parameter))
            _shard(bucket.gradients, bucket.group).copy_(
                canonical.reduce_scatter(bucket.gradients, self._data_ranks, bucket.group)
            )

    def state(self) -> Iterator[tuple[str, Block]]:
        """See Engine. What lies in this rank's shards, and of what tensor-parallel ranks have alike, some."""
        places = dict(placements(self._stages))
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        held = [(bucket, piece) for bucket in self._buckets for piece in bucket.pieces]
        for number, (bucket, piece) in enumerate(held):
            place = places[piece.parameter]
            if place.turn < 0 or (place.alike and number % ranks != rank):
                continue
            begin = max(dist.get_rank(bucket.group) * len(bucket.master) - bucket.places[piece.parameter][0], 0)
            moments = self._optimizer.state.get(piece.master, {})
            parts = {"weight": piece.master.detach()}
            parts |= {moment: moments.get(moment, torch.zeros_like(piece.gradient)) for moment in MOMENTS}
            for part, flat in parts.items():
                yield from ((part, block) for block in blocks(place, flat, begin))

    @torch.no_grad()
    def load_state(self, states: dict[str, dict[str, torch.Tensor]], updates: int) -> None:
        """See Engine."""
        places = dict(placements(self._stages))
        for bucket in self._buckets:
            begin = dist.get_rank(bucket.group) * len(bucket.master)
            for piece in bucket.pieces:
                start, end = bucket.places[piece.parameter]
                own = slice(max(begin - start, 0), min(begin + len(bucket.master), end) - start)
                saved = states[places[piece.parameter].name]
                piece.master.copy_(saved["weight"].reshape(-1)[own])
                self._optimizer.state[piece.master] = {
                    moment: saved[moment].reshape(-1)[own].clone() for moment in MOMENTS
                } | {"step": torch.tensor(float(updates))}
        self._publish()

    def _publish(self) -> None:
        """Each rank's shard of the new weights goes to all."""
        for bucket in self._buckets:
            own = _shard(bucket.weights, bucket.group)
            if own.data_ptr() != bucket.master.data_ptr():
                own.copy_(bucket.master)
        for ddp in self._ddp:
            ddp.start_param_sync(force_sync=True)

    def _norm(self) -> float:
        """Of all ranks' gradients, each parameter's counted once."""
        gradients = [
            piece.gradient for bucket in self._buckets for piece in bucket.pieces if counted_here(piece.parameter, True)
        ]
        device = self._buckets[0].gradients.device
        if self._sums is not None:
            return canonical.exact_norm(gradients, device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for gradient in gradients:
            total += gradient.square().sum()
        dist.all_reduce(total)
        norm = total.sqrt().item()
        return norm if math.isfinite(norm) else math.inf


def _bucket(buffer, bucket) -> Bucket:
    """Megatron-core's bucket of a buffer as ours."""
    group = buffer.data_parallel_group
    places = {
        parameter: (start - bucket.offset, end - bucket.offset)
        for parameter, (start, end, number) in buffer.param_index_map.items()
        if number == bucket.bucket_id
    }
    shard = _shard(bucket.param_data, group).detach()
    master = shard if shard.dtype == torch.float32 else shard.float()
    gradients = _shard(bucket.grad_data, group)
    begin = dist.get_rank(group) * len(master)
    pieces = []
    for parameter, (start, end) in places.items():
        low, high = max(start - begin, 0), min(end - begin, len(master))
        if low < high:
            pieces.append(Piece(parameter, torch.nn.Parameter(master[low:high]), gradients[low:high]))
    return Bucket(bucket.param_data, bucket.grad_data, group, places, master, pieces)


def _shard(flat: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return shard_buffer(flat, dist.get_world_size(group))[dist.get_rank(group)]
