"""Attention: dense, over packed documents of any lengths, and one new token against a cache."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Packing:
    """Documents that lie one behind another on T positions, grouped by length for batched attention.

    Documents whose lengths round up to the same power of two share a group, padded to the longest of them,
    so short documents never pay for a long one. Computed once a batch, used by every layer.
    """

    groups: tuple[tuple[torch.Tensor, int, int], ...]  # (flat positions int64 [n * longest], n, longest)
    slots: torch.Tensor  # int64 [T]: where each position's output is among all groups' outputs

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor) -> "Packing":
        """cu_seqlens: int [documents + 1], from 0 to T. The groups live on its device."""
        bounds = cu_seqlens.cpu().long()
        starts, lengths = bounds[:-1], bounds.diff()
        rank = torch.ceil(torch.log2(lengths.clamp(min=1).double()))
        groups, slots, base = [], torch.empty(int(bounds[-1]), dtype=torch.long), 0
        for value in rank.unique():
            first, length = starts[rank == value], lengths[rank == value]
            n, longest = len(first), int(length.max())
            within = torch.arange(longest).expand(n, longest)
            positions = first[:, None] + torch.minimum(within, length[:, None] - 1)
            valid = within < length[:, None]
            slots[positions[valid]] = base + torch.arange(n * longest).view(n, longest)[valid]
            groups.append((positions.reshape(-1).to(cu_seqlens.device), n, longest))
            base += n * longest
        return cls(tuple(groups), slots.to(cu_seqlens.device))


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing) -> torch.Tensor:
    """softmax(q k' / sqrt(d)) v, causal within each packed document.

    q [T, heads, d]; k, v [T, groups, d] with groups dividing heads (grouped-query); result [T, heads, d].
    """
    outputs = []
    for positions, n, longest in packing.groups:
        # Padding repeats a document's last position behind it, where no causal query of the document looks.
        qg, kg, vg = (x.index_select(0, positions).view(n, longest, *x.shape[1:]) for x in (q, k, v))
        outputs.append(attention(qg, kg, vg, causal=True).flatten(0, 1))
    return torch.cat(outputs).index_select(0, packing.slots)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Dense attention: q [n, s, heads, d]; k, v [n, s, groups, d]; result [n, s, heads, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=_grouped(q, k)).transpose(1, 2)


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """One query a sequence against its cache: q [n, heads, d]; k, v [n, capacity, groups, d]; lengths int [n].

    Sequence i sees its first lengths[i] cached keys; result [n, heads, d].
    """
    seen = torch.arange(k.shape[1], device=k.device) < lengths[:, None]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, seen[:, None, None], enable_gqa=_grouped(q, k))
    return out.squeeze(2)


def _grouped(q: torch.Tensor, k: torch.Tensor) -> bool:
    return q.shape[1] != k.shape[1]
