"""Attention of one new token a sequence to a cache of keys and values, of which each program takes a part: the softmax
is put together from the parts' own (Dao et al. 2023, "Flash-Decoding for long-context inference")."""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from armillary.kernels.arguments import require, require_like
from armillary.kernels.attention import head_block
from armillary.kernels.attention_kernels import _attend, _load
from armillary.kernels.choose import processors, runs_triton

KEYS, WARPS, STAGES = 64, 4, 2
JOINING = 8  # warps that join the parts
LEAST = 256  # keys of a part
MOST = 128  # parts, which one program joins


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """One query a sequence against its cache: q [n, heads, d]; k, v [n, capacity, groups, d]; lengths int [n].

    Sequence i sees its first lengths[i] cached keys; without any the result is 0. Result [n, heads, d]. Not
    differentiable by the kernel.
    """
    name = "decode_attention"
    require(q.dim() == 3 and q.numel() > 0, name, "q", f"[n, heads, d] with n above 0, not {list(q.shape)}")
    require(k.dim() == 4 and k.shape[1] > 0, name, "k", f"[n, capacity, groups, d], not {list(k.shape)}")
    require(q.shape[1] % k.shape[2] == 0, name, "k", f"of groups that divide the {q.shape[1]} heads, not {k.shape[2]}")
    require_like(name, "k", k, (q.shape[0], k.shape[1], k.shape[2], q.shape[2]), q)
    require_like(name, "v", v, tuple(k.shape), q)
    require_like(name, "lengths", lengths, (q.shape[0],), q)
    require(lengths.dtype in (torch.int32, torch.int64), name, "lengths", f"of whole numbers, not of {lengths.dtype}")
    require(k.dtype == v.dtype == q.dtype, name, "k and v", f"of {q.dtype}, as q")
    return decode_forward(q, k, v, lengths) if runs_triton("attention", q) else _reference(q, k, v, lengths)


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    seen = torch.arange(k.shape[1], device=k.device) < lengths[:, None]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, seen[:, None, None], enable_gqa=grouped).squeeze(2)
    return out.where(lengths[:, None, None] > 0, 0)  # softmax of nothing is no number


@triton.jit
def _parts(
    q_ptr, k_ptr, v_ptr, lengths_ptr, o_ptr, lse_ptr, scale,
    stride_kn, stride_kt, stride_kh, stride_vn, stride_vt, stride_vh, capacity, SPAN,
    GROUP: tl.constexpr, GP: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """o [n, groups, parts, GROUP, D] and lse [n, groups, parts, GROUP], both float32; lse is of base 2."""
    sequence = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    part = tl.program_id(2)
    length = tl.minimum(tl.load(lengths_ptr + sequence).to(tl.int32), capacity)
    low = part * SPAN
    high = tl.minimum(low + SPAN, length)
    mine = tl.arange(0, GP)
    at = (sequence * tl.num_programs(1) + group) * GROUP
    q = _load(q_ptr + at * D, mine, D, mine < GROUP, True, D, DP)
    k_head = k_ptr + sequence * stride_kn + tl.cast(group, tl.int64) * stride_kh
    v_head = v_ptr + sequence * stride_vn + tl.cast(group, tl.int64) * stride_vh
    peak = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    o = tl.zeros([GP, DP], tl.float32)
    o, total, peak = _attend(
        o, total, peak, q, k_head, v_head, stride_kt, stride_vt, low, high, mine * 0, high, scale,
        True, False, 0, PRECISION, D, DP, BN, False, False,
    )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)
    d = tl.arange(0, DP)
    to = ((sequence * tl.num_programs(1) + group) * tl.num_programs(2) + part) * GROUP + mine
    tl.store(o_ptr + to[:, None] * D + d[None, :], o / total[:, None],
             (mine < GROUP)[:, None] & (d < D)[None, :])  # fmt: skip
    tl.store(lse_ptr + to, peak + tl.log2(total), mine < GROUP)


@triton.jit
def _join(o_ptr, lse_ptr, out_ptr, parts, GROUP: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """out [n, groups, GROUP, D]: one head of one sequence a program."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    d = tl.arange(0, DP)
    at = (head // GROUP * parts + part) * GROUP + head % GROUP
    lse = tl.load(lse_ptr + at, part < parts, other=float("-inf"))
    peak = tl.max(lse, 0)
    share = tl.exp2(lse - tl.where(peak == float("-inf"), 0.0, peak))
    inside = (part < parts)[:, None] & (d < D)[None, :]
    o = tl.load(o_ptr + at[:, None] * D + d[None, :], inside, other=0.0)
    total = tl.sum(share, 0)
    out = tl.sum(o * share[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + head * D + d, out.to(out_ptr.dtype.element_ty), d < D)


def split(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int]:
    """How many parts, so that all processors have work, and how many keys each has."""
    wanted = -(-2 * processors(q.device) // (k.shape[0] * k.shape[2]))
    parts = max(1, min(wanted, k.shape[1] // LEAST, MOST))
    span = triton.cdiv(triton.cdiv(k.shape[1], parts), KEYS) * KEYS
    return triton.cdiv(k.shape[1], span), span


def options(group: int, d: int, dtype: torch.dtype) -> dict[str, object]:
    """Of a launch of `_parts`."""
    precision = "ieee" if dtype == torch.float32 else "tf32"
    keys = KEYS if dtype != torch.float32 else KEYS // 4
    return {"GP": max(triton.next_power_of_2(group), 16), "PRECISION": precision, "DP": head_block(d), "BN": keys,
            "num_warps": WARPS, "num_stages": STAGES}  # fmt: skip


@torch.library.custom_op("armillary::decode_forward", mutates_args=())
def decode_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """See `decode_attention`."""
    if not runs_triton("attention", q):
        return _reference(q, k, v, lengths)
    q, lengths = q.contiguous(), lengths.contiguous()
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    (n, heads, d), groups, (parts, span) = q.shape, k.shape[2], split(q, k)
    group = heads // groups
    o = q.new_empty(n, groups, parts, group, d, dtype=torch.float32)
    lse, out = q.new_empty(n, groups, parts, group, dtype=torch.float32), torch.empty_like(q)
    _parts[n, groups, parts](
        q, k, v, lengths, o, lse, 1 / math.sqrt(d) / math.log(2), *k.stride()[:3], *v.stride()[:3], k.shape[1], span,
        GROUP=group, D=d, **options(group, d, q.dtype),
    )  # fmt: skip
    _join[(n * heads,)](
        o, lse, out, parts, GROUP=group, PARTS=triton.next_power_of_2(parts), D=d, DP=head_block(d), num_warps=JOINING
    )
    return out


@decode_forward.register_fake
def _(q, k, v, lengths):
    return torch.empty_like(q, memory_format=torch.contiguous_format)
