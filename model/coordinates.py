"""Where this rank's weights lie in the whole model: global names, shapes and offsets, which no layout owns."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from armillary.model.config import ModelConfig
from armillary.model.multimodal import MultimodalModel


@dataclass(frozen=True)
class Piece:
    """Rows of one axis that a rank holds: global [start, start + size) is local [at, at + size)."""

    start: int
    at: int
    size: int


@dataclass(frozen=True)
class Placement:
    """A local tensor's place in the global tensor `name` of `shape`: the whole of every axis but `axis`.

    `replicated`: every tensor-parallel rank holds the same values.
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    pieces: tuple[Piece, ...]
    replicated: bool


def split_axis(size: int, parts: int, rank: int, stride: int) -> tuple[Piece, ...]:
    """The pieces of an axis of `size` rows that rank `rank` of `parts` holds.

    With stride s the axis is s blocks one behind another (SwiGLU: gate and up), each split over the ranks.
    """
    step = size // (parts * stride)
    return tuple(Piece((j * parts + rank) * step, j * step, step) for j in range(stride))


def placements(model: MultimodalModel) -> Iterator[tuple[torch.nn.Parameter, Placement]]:
    """Every parameter of this rank with its place, in a fixed order."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    numbers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    for name, parameter in model.named_parameters():
        for local, number in numbers.items():
            if name.startswith(local):
                name = f"decoder.layers.{number}." + name.removeprefix(local)
                break
        shape, axis = list(parameter.shape), 0
        if getattr(parameter, "tensor_model_parallel", False):
            axis = parameter.partition_dim
            shape[axis] *= tensor
            pieces = split_axis(shape[axis], tensor, rank, parameter.partition_stride)
        else:
            pieces = (Piece(0, 0, shape[0]),)
        replicated = not getattr(parameter, "tensor_model_parallel", False)
        yield parameter, Placement(name, tuple(shape), axis, pieces, replicated)


@torch.no_grad()
def initialize(model: MultimodalModel, seed: int) -> None:
    """Initial weights from (seed, global name) alone: the same model under every layout.

    Norms are one; matrices normal with `init_std`, those that write into the residual stream with
    init_std / sqrt(2 layers) (Radford et al. 2019, section 2.3).
    """
    for parameter, place in placements(model):
        parameter.copy_(_local(_initial(place, model.model, seed), place))


def _initial(place: Placement, config: ModelConfig, seed: int) -> torch.Tensor:
    if place.name.endswith("layernorm.weight"):
        return torch.ones(place.shape)
    std = config.init_std
    if place.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        layers = config.vision_layers if place.name.startswith("vision.") else config.depth
        std /= math.sqrt(2 * layers)
    digest = hashlib.sha256(f"{seed}/{place.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(place.shape, generator=generator) * std


def _local(full: torch.Tensor, place: Placement) -> torch.Tensor:
    """This rank's part of a global tensor."""
    return torch.cat([full.narrow(place.axis, piece.start, piece.size) for piece in place.pieces], place.axis)
