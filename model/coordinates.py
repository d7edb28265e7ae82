"""Where this rank's weights lie in the whole model: global names, shapes and offsets, which no layout owns."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
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

    `turns` ranks hold the same values, of which this one is number `turn`; -1: a copy that a pipeline's last stage has
    of the first one's embedding. alike: tensor-parallel ranks are among them.
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    pieces: tuple[Piece, ...]
    turn: int
    turns: int
    alike: bool


def split_axis(size: int, parts: int, rank: int, stride: int) -> tuple[Piece, ...]:
    """The pieces of an axis of `size` rows that rank `rank` of `parts` holds.

    With stride s the axis is s blocks one behind another (SwiGLU: gate and up), each split over the ranks.
    """
    step = size // (parts * stride)
    return tuple(Piece((j * parts + rank) * step, j * step, step) for j in range(stride))


class Block(NamedTuple):
    """Rows [start, start + tensor.shape) of the global tensor `name` of `shape`."""

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    tensor: torch.Tensor


def blocks(place: Placement, flat: torch.Tensor, begin: int = 0) -> Iterator[Block]:
    """The blocks that a part of a local tensor consists of: views of `flat`, its numbers from `begin` on, in order."""
    shape = list(place.shape)
    shape[place.axis] = sum(piece.size for piece in place.pieces)
    done = 0
    for start, size in boxes(begin, begin + len(flat), tuple(shape)):
        box = flat[done : done + math.prod(size)].view(size)
        done += math.prod(size)
        low, high = start[place.axis], start[place.axis] + size[place.axis]
        for piece in place.pieces:
            first, last = max(low, piece.at), min(high, piece.at + piece.size)
            if first < last:
                there = list(start)
                there[place.axis] = piece.start + first - piece.at
                yield Block(place.name, place.shape, tuple(there), box.narrow(place.axis, first - low, last - first))


def boxes(low: int, high: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, size) of the boxes that the numbers [low, high) of a row-major array of `shape` are, in order."""
    if low >= high:
        return
    row = math.prod(shape[1:])
    first, rows = low // row, high // row - low // row
    if low % row or not rows:  # a part of a row
        end = min(high, (first + 1) * row)
        for start, size in boxes(low - first * row, end - first * row, shape[1:]):
            yield (first, *start), (1, *size)
    else:
        end = (first + rows) * row
        yield (first,) + (0,) * (len(shape) - 1), (rows, *shape[1:])
    yield from boxes(end, high, shape)


def placements(stages: Sequence[MultimodalModel]) -> Iterator[tuple[torch.nn.Parameter, Placement]]:
    """Every parameter of this rank's part, or virtual stages, of the model with its place, in a fixed order."""
    for stage in stages:
        numbers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(stage.decoder.layers)}
        for name, parameter in stage.named_parameters():
            local = next((local for local in numbers if name.startswith(local)), None)
            if local is not None:
                name = f"decoder.layers.{numbers[local]}." + name.removeprefix(local)
            yield parameter, _placement(name, parameter, stage)


def local_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Of a rank's part of a weight, which ZeRO-3 holds in flat parts of its own most of the time."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _placement(name: str, parameter: torch.nn.Parameter, stage: MultimodalModel) -> Placement:
    shape, axis, ranks, rank, stride, alike = list(local_shape(parameter)), 0, 1, 0, 1, False
    if getattr(parameter, "of_experts", False):
        ranks = parallel_state.get_expert_model_parallel_world_size()
        rank, group = parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_data_parallel_group()
    elif getattr(parameter, "tensor_model_parallel", False):
        axis, stride = parameter.partition_dim, parameter.partition_stride
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    else:
        group, alike = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True), True
    shape[axis] *= ranks
    turn, turns = dist.get_rank(group), dist.get_world_size(group)
    if stage.model.tied_embeddings and name == "output.weight":
        name, turn = "embedding.weight", -1
    return Placement(name, tuple(shape), axis, split_axis(shape[axis], ranks, rank, stride), turn, turns, alike)


@torch.no_grad()
def initialize(stages: Sequence[MultimodalModel], seed: int) -> None:
    """Initial weights from (seed, global name) alone: the same model under every layout.

    Norms are one; matrices normal with `init_std`, those that write into the residual stream with
    init_std / sqrt(2 layers) (Radford et al. 2019, section 2.3).
    """
    for parameter, place in placements(stages):
        parameter.copy_(_local(_initial(place, stages[0].model, seed), place))


def _initial(place: Placement, config: ModelConfig, seed: int) -> torch.Tensor:
    if place.name.endswith("layernorm.weight"):
        return torch.ones(place.shape)
    std = config.init_std
    if place.name.endswith(("linear_proj.weight", "linear_fc2.weight", "mlp.linear_fc2")):
        layers = config.vision_layers if place.name.startswith("vision.") else config.depth
        std /= math.sqrt(2 * layers)
    digest = hashlib.sha256(f"{seed}/{place.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(place.shape, generator=generator) * std


def _local(full: torch.Tensor, place: Placement) -> torch.Tensor:
    """This rank's part of a global tensor."""
    return torch.cat([full.narrow(place.axis, piece.start, piece.size) for piece in place.pieces], place.axis)
