"""Gradients added up in one order, whatever the number of data-parallel ranks, ZeRO's stage, the pipeline's depth and
the number of micro-batches a rank has (`training.deterministic`).

A step's n micro-batches, in the order of the global batch, are shared out to as many parts as the largest power of two
that divides n. A part is added up one after the other; parts are added pairwise, and their sums again, as a tree whose
shape follows from n alone: the lower part of it on each rank, the upper part after an all-to-all. The squares of the
norm are added as integers, whose order does not count.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist

LIMB = 22  # bits of an integer's share of a square: so many that 2^41 of them can be added


class CanonicalSums:
    """Takes every gradient that a backward pass gives `parameters`, leaving zeros, and adds them up in fp32.

    micro_batches: of a step, on all data-parallel ranks; ranks: how many share them out evenly. ValueError where the
    parts are not as many for each (see support.py).
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], micro_batches: int, ranks: int):
        parts = micro_batches & -micro_batches
        if parts % ranks:
            raise ValueError(f"{parts} parts cannot be shared out evenly to {ranks} ranks")
        self._length = micro_batches // parts  # of a part
        self._sums: dict[torch.nn.Parameter, list[torch.Tensor]] = {}
        self._counts: dict[torch.nn.Parameter, int] = {}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: torch.nn.Parameter) -> None:
        """One micro-batch's gradient. What is there so far are sums of parts, of twice as many each as the next one's,
        and behind them the part that is under way."""
        gradient = parameter.grad.float() if parameter.grad.dtype != torch.float32 else parameter.grad.clone()
        parameter.grad.zero_()
        sums, count = self._sums.setdefault(parameter, []), self._counts.get(parameter, 0)
        if count % self._length:
            gradient = sums.pop().add_(gradient)
        self._counts[parameter] = count = count + 1
        parts, rest = divmod(count, self._length)
        while not rest and not parts % 2:
            gradient = sums.pop().add_(gradient)
            parts //= 2
        sums.append(gradient)

    def pop(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The sum over this rank's micro-batches, which begins anew."""
        (total,) = self._sums.pop(parameter)
        del self._counts[parameter]
        return total


def reduce_scatter(flat: torch.Tensor, data_ranks: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's chunk of the sum of all ranks' `flat`, which the group's size divides: in the tree over data-parallel
    ranks, and then over the ranks that share a data-parallel rank's rows, which are neighbours."""
    if dist.get_world_size(group) == 1:
        return flat
    arrived = torch.empty_like(flat)
    dist.all_to_all_single(arrived, flat, group=group)
    chunks = list(arrived.view(dist.get_world_size(group), -1))
    width = len(chunks) // data_ranks
    trees = [_tree(chunks[first::width]) for first in range(width)]
    return sum(trees[1:], trees[0])


def _tree(numbers: list[torch.Tensor]) -> torch.Tensor:
    while len(numbers) > 1:
        numbers = [a + b for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
    return numbers[0]


def exact_norm(gradients: Iterable[torch.Tensor], device: torch.device) -> float:
    """The norm over all ranks' gradients, whichever parts of them are where; infinite where one is not a number.
    Collective over all ranks."""
    gradients = [one for one in gradients if one.numel()]
    largest = torch.stack([torch.zeros((), device=device), *(one.abs().max().float() for one in gradients)]).max()
    largest = largest.nan_to_num(nan=math.inf, posinf=math.inf)  # a reduction may lose what is not a number
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    peak = largest.item()
    if peak == 0 or not math.isfinite(peak):
        return peak
    limbs = torch.zeros(2, dtype=torch.int64, device=device)
    for one in gradients:
        high = (one.double() / peak).square() * 2**LIMB
        limbs += torch.stack([high.floor().long().sum(), (high.frac() * 2**LIMB).floor().long().sum()])
    dist.all_reduce(limbs)
    high, low = limbs.tolist()
    return peak * math.sqrt((high + low / 2**LIMB) / 2**LIMB)
