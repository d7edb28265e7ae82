"""Context parallelism: the ranks of a group share the positions of each packed row.

A row is cut into 2n parts of one length for n ranks; rank r has the r-th from the front and the r-th from the back
(zig-zag), so that each has as much causal attention to do where documents are long. Keys and values of all parts are
gathered, queries stay (Llama 3, Grattafiori et al. 2024, section 3.3.2).
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from armillary.kernels.attention import Packing, attention


def own_positions(x_T: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    """Of what all positions have, what those of rank `rank` of `ranks` have: [T, ...] -> [T / ranks, ...]."""
    if ranks == 1:
        return x_T
    parts = x_T.unflatten(0, (2 * ranks, -1))
    return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]])


def own_places(places: torch.Tensor, positions: int, ranks: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions, int64 of any shape, are those of rank `rank`, and where among its own."""
    if ranks == 1:
        return torch.ones_like(places, dtype=torch.bool), places
    length = positions // (2 * ranks)
    part = places // length
    front, back = part == rank, part == 2 * ranks - 1 - rank
    return front | back, places % length + back * length


class SharedAttention:
    """Causal attention of this rank's positions of a packed row; made once a batch, used by every layer.

    cu_seqlens: of the whole row, of `positions`; `group`: the ranks that share it.
    """

    def __init__(self, cu_seqlens: torch.Tensor, positions: int, group: dist.ProcessGroup):
        self.group = group
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.length = positions // (2 * ranks)
        # Gathered parts come by rank, each rank's front one before its back one.
        front = torch.arange(ranks, device=cu_seqlens.device)
        self.order = torch.argsort(torch.stack([front, 2 * ranks - 1 - front], 1).flatten())
        ends = [(part + 1) * self.length for part in (rank, 2 * ranks - 1 - rank)]
        self.packings = [Packing(cu_seqlens.clamp(max=end), end, self.length) for end in ends]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T / ranks, heads, d], k and v [T / ranks, groups, d], of this rank's positions -> as q."""
        both = gather_from_sequence_parallel_region(torch.cat([k, v], 1), group=self.group)
        both = both.unflatten(0, (-1, self.length)).index_select(0, self.order).flatten(0, 1)
        k, v = both.chunk(2, 1)
        parts = zip(q.split(self.length), self.packings, strict=True)
        return torch.cat([attention(part, k[: p.positions], v[: p.positions], p) for part, p in parts])
