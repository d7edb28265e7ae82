"""What every engine does alike."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from armillary.model.coordinates import Block
from armillary.model.multimodal import MultimodalModel


class Engine(Protocol):
    """The optimizer's side of a step: gradients in, weights out; fp32 state is shared by data-parallel ranks."""

    replicas: int
    """What the loss is to be multiplied by: an engine that averages over ranks takes the mean of as many."""

    model: torch.nn.Module
    """What a forward pass without a pipeline calls."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Gradients of one micro-batch, which is the step's last or not. Where there is a pipeline, its schedule does
        the backward passes instead."""

    def step(self, learning_rate: float, accept: Callable[[float], bool] = lambda norm: True) -> float:
        """Reduce, clip and apply the step's gradients; the global norm before clipping. Collective over all ranks.

        accept: whether gradients of this norm, which is infinite where one of them is no number, are applied; else they
        are forgotten, and the state is as it was."""

    live: bool
    """Whether `state` gives the tensors themselves, which the next step changes, and not copies."""

    def state(self) -> Iterator[tuple[str, Block]]:
        """This rank's share of the fp32 weights ("weight") and Adam moments (MOMENTS), as (part, block): what all ranks
        give tiles every weight. Collective over data-parallel ranks: all must go through it together.
        """

    def load_state(self, states: dict[str, dict[str, torch.Tensor]], updates: int) -> None:
        """Put in place a state: {name: {part: tensor}}, in this layout's local shapes, after so many updates."""


def decayed(parameter: torch.nn.Parameter) -> bool:
    """Whether weight decay is for it: matrices, not norms."""
    return parameter.ndim > 1


def counted_here(parameter: torch.nn.Parameter, experts_apart: bool) -> bool:
    """Whether this rank's part of a gradient belongs to the global norm, and is not another tensor-parallel rank's or
    the first stage's too. experts_apart: tensor-parallel ranks have different parts of experts' gradients."""
    if getattr(parameter, "copy_of_embedding", False):
        return False
    apart = getattr(parameter, "tensor_model_parallel", False)
    apart = apart or (experts_apart and getattr(parameter, "of_experts", False))
    return apart or parallel_state.get_tensor_model_parallel_rank() == 0


def clip_scale(norm: float, largest: float) -> float:
    """What gradients of this norm are multiplied by: 1 up to `largest`."""
    return min(1.0, largest / (norm + 1e-6))


def sum_shared(
    stages: Sequence[MultimodalModel], gradient: Callable[[torch.nn.Parameter], torch.Tensor], experts: bool
) -> None:
    """Add up, in place, gradients of which ranks of one data-parallel rank have parts each: of weights that see a part
    of the positions under sequence parallelism (of `experts` too, or not), and of an embedding that is the last stage's
    output layer too."""
    tensor = parallel_state.get_tensor_model_parallel_group()
    for stage in stages:
        for parameter in stage.parameters():
            if getattr(parameter, "sequence_parallel", False) and (
                experts or not getattr(parameter, "of_experts", False)
            ):
                dist.all_reduce(gradient(parameter), group=tensor)
            if getattr(parameter, "shared_embedding", False):
                dist.all_reduce(gradient(parameter), group=parallel_state.get_embedding_group())
