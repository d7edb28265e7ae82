"""Attention over packed documents, and over images of one size: FlashAttention-2 on a GPU, SDPA elsewhere."""

import functools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton

from armillary.kernels import attention_kernels as kernels
from armillary.kernels.arguments import require, require_like
from armillary.kernels.attention_tiles import Plan, plan
from armillary.kernels.choose import runs_triton, target

WIDEST = 256  # dimensions of a head
DELTA = 2048  # numbers that a program multiplies with their gradients


class Packing:
    """Documents that lie one behind another on T positions. Computed once a batch, used by every layer.

    `queries`: how many of the positions, the last ones, have a query, if not all. ValueError unless cu_seqlens (whole
    numbers [documents + 1]) rise from 0 to `positions`; where they are on a GPU, which is not waited for, that stops
    with an assertion.
    """

    def __init__(self, cu_seqlens: torch.Tensor, positions: int, queries: int | None = None):
        name = ("attention", "cu_seqlens")
        require(cu_seqlens.dtype in (torch.int32, torch.int64) and cu_seqlens.dim() == 1, *name, "of whole numbers [n]")
        if cu_seqlens.device.type == "cpu":
            bounds = cu_seqlens.tolist()
            require(bounds[:1] == [0] and bounds == sorted(bounds), *name, "rising from 0")
            require(bounds[-1] == positions, *name, f"up to {positions}, not {bounds[-1]}")
        else:  # without waiting for the GPU, which stops at the next thing it does
            torch._assert_async(
                (cu_seqlens[0] == 0) & (cu_seqlens.diff() >= 0).all() & (cu_seqlens[-1] == positions),
                f"attention: cu_seqlens must be rising from 0 up to {positions}",
            )
        self.cu_seqlens = cu_seqlens
        self.positions = positions
        self.queries = positions if queries is None else queries
        require(0 < self.queries <= positions, "attention", "queries", f"from 1 to {positions}, not {queries}")
        self.blocks, self.groups = functools.cache(self._blocks), functools.cache(self._groups)

    def _blocks(self, size: int, queries: bool = True) -> torch.Tensor:
        """Blocks of `size` positions (of those with `queries`), those that begin latest first, since causal ones have
        the most to do: int32 [blocks, 3], document's start, its length, block's first position in it. Unused ones have
        a length of 0."""
        bounds = self.cu_seqlens.long()
        starts, lengths = bounds[:-1], bounds.diff()
        shift = self.positions - self.queries if queries else 0
        skipped = torch.minimum((shift - starts).clamp(min=0), lengths)
        counts = (lengths - skipped + size - 1) // size
        ends = counts.cumsum(0)
        number = torch.arange((self.positions - shift) // size + len(lengths), device=bounds.device)
        document = torch.searchsorted(ends, number, right=True)
        used = document < len(lengths)
        document = document.clamp(max=len(lengths) - 1)
        first = skipped[document] + (number - (ends - counts)[document]) * size
        table = torch.stack([starts[document] * used, lengths[document] * used, first * used], 1)
        return table[torch.argsort(table[:, 2], descending=True, stable=True)].int()

    def _groups(self, causal: bool) -> tuple[tuple[tuple[torch.Tensor, int, int], ...], torch.Tensor]:
        """Documents of one length or, if `causal`, of lengths that round up to the same power of two, padded to the
        longest of them, so that short ones never pay for a long one: (positions int64 [n * longest], n, longest) of
        each group; and, int64 [T], where each position's output is among all groups' outputs."""
        bounds, device = self.cu_seqlens.cpu().long(), self.cu_seqlens.device
        bounds = bounds.unique()  # without empty documents
        starts, lengths = bounds[:-1], bounds.diff()
        rank = torch.ceil(torch.log2(lengths.double())) if causal else lengths
        groups, slots, base = [], torch.empty(self.positions, dtype=torch.long), 0
        for value in rank.unique():
            first, length = starts[rank == value], lengths[rank == value]
            n, longest = len(first), int(length.max())
            within = torch.arange(longest).expand(n, longest)
            positions = first[:, None] + torch.minimum(within, length[:, None] - 1)
            valid = within < length[:, None]
            slots[positions[valid]] = base + torch.arange(n * longest).view(n, longest)[valid]
            groups.append((positions.reshape(-1).to(device), n, longest))
            base += n * longest
        return tuple(groups), slots.to(device)


@functools.lru_cache(16)
def even(count: int, length: int, device: torch.device) -> Packing:
    """`count` documents of one length."""
    with torch.inference_mode(False):  # what is kept here may be needed for a gradient next time
        return Packing(torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=device), count * length)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, causal: bool = True, window: int = 0
) -> torch.Tensor:
    """softmax(q k' / sqrt(d)) v within each packed document.

    q [Q, heads, d], of the last Q of T positions (see Packing); k, v [T, groups, d] with groups dividing heads
    (grouped-query); result [Q, heads, d]. Float64 (the reference), float32, bfloat16 or float16. `causal`: a position
    sees itself and those before it, of these the `window` nearest if that is above 0.
    """
    if runs_triton("attention", q):
        return attention_and_lse(q, k, v, packing, causal, window)[0]
    _check(q, k, v, packing, causal, window)
    outputs, (groups, slots) = [], packing.groups(causal)
    before = packing.positions - packing.queries
    if before:
        q = torch.cat([q.new_zeros(before, *q.shape[1:]), q])
    for positions, n, longest in groups:
        # Padding repeats a document's last position behind it, where no causal query of the document looks.
        qg, kg, vg = (x.index_select(0, positions).view(n, longest, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        mask = _seen(torch.zeros(longest, dtype=torch.long, device=q.device), causal, window) if window else None
        grouped = qg.shape[1] != kg.shape[1]
        out = F.scaled_dot_product_attention(qg, kg, vg, mask, is_causal=causal and mask is None, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, slots[before:])


def attention_and_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, causal: bool = True, window: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `attention`; and the logarithm of each softmax's denominator, [heads, Q], float32 (float64 of float64),
    through which no gradient goes: what two parts of the keys need to be put together."""
    _check(q, k, v, packing, causal, window)
    window = window if window < packing.positions else 0  # nothing is further away
    chosen = _plan(q, window)
    forward, of_queries = (packing.blocks(size, True) for size in (chosen.forward.queries, chosen.queries.queries))
    of_keys = packing.blocks(chosen.keys.keys, False)
    return attention_forward(q, k, v, forward, of_queries, of_keys, packing.cu_seqlens, causal, window)


def _check(q, k, v, packing, causal, window):
    name = "attention"
    require(q.dim() == 3 and q.numel() > 0, name, "q", f"[Q, heads, d] with Q above 0, not {list(q.shape)}")
    require(q.is_floating_point(), name, "q", f"of floating-point numbers, not of {q.dtype}")
    require(q.shape[2] <= WIDEST, name, "q", f"of heads of {WIDEST} dimensions or fewer, not {q.shape[2]}")
    require(k.dim() == 3 and k.shape[1] > 0, name, "k", f"[T, groups, d], not {list(k.shape)}")
    require(q.shape[1] % k.shape[1] == 0, name, "k", f"of groups that divide the {q.shape[1]} heads, not {k.shape[1]}")
    positions = q.shape[0] + packing.positions - packing.queries
    require_like(name, "k", k, (positions, k.shape[1], q.shape[2]), q)
    require_like(name, "v", v, tuple(k.shape), q)
    require(k.dtype == v.dtype == q.dtype, name, "k and v", f"of {q.dtype}, as q")
    require(packing.positions == positions, name, "cu_seqlens", f"up to {positions}, not {packing.positions}")
    require(packing.cu_seqlens.device == q.device, name, "cu_seqlens", f"on {q.device}")
    require(window >= 0 and (causal or not window), name, "window", "0, or above 0 and causal")


def _seen(document: torch.Tensor, causal: bool, window: int) -> torch.Tensor:
    """Which position sees which, bool [T, T]; document int64 [T]."""
    place = torch.arange(len(document), device=document.device)
    seen, away = document[:, None] == document, place[:, None] - place
    seen = seen & (away >= 0) if causal else seen
    return seen & (away < window) if window else seen


def _plan(q: torch.Tensor, window: int) -> Plan:
    found = plan(q.shape[2], q.dtype, window, target(q.device))
    return found if q.shape[2] * q.element_size() % 16 == 0 else replace(found, tma=False)


def switches(q: torch.Tensor, k: torch.Tensor, causal: bool, window: int) -> dict[str, object]:
    """What a kernel is compiled for."""
    d, precision = q.shape[2], "ieee" if q.dtype == torch.float32 else "tf32"
    return {
        "GROUP": q.shape[1] // k.shape[1], "CAUSAL": causal, "WINDOW": window, "PRECISION": precision,
        "D": d, "DP": head_block(d),
    }  # fmt: skip


def _scores(q, k, cu_seqlens, causal, window):
    """In float64 if q is, else float32: scaled scores [heads, Q, T], -inf where nothing is seen."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k) / math.sqrt(q.shape[2])
    document = torch.searchsorted(cu_seqlens.long(), torch.arange(len(k), device=q.device), right=True)
    return scores.masked_fill(~_seen(document, causal, window)[len(k) - len(q) :], -math.inf)


@torch.library.custom_op("armillary::attention_forward", mutates_args=())
def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    query_blocks: torch.Tensor,
    key_blocks: torch.Tensor,
    cu_seqlens: torch.Tensor,
    causal: bool,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `attention_and_lse`. The blocks are Packing.blocks of the sizes in the plan: the forward's, and those of the
    backward of queries and of keys."""
    if not runs_triton("attention", q):
        scores = _scores(q, k, cu_seqlens, causal, window)
        wide_v = v.to(scores.dtype).repeat_interleave(q.shape[1] // v.shape[1], 1)
        o = torch.einsum("hqk,khd->qhd", scores.softmax(-1), wide_v)
        return o.to(q.dtype).contiguous(), scores.logsumexp(-1)
    chosen = _plan(q, window)
    q, k, v = (_loadable(x, chosen.tma) for x in (q, k, v))
    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    if chosen.tma:
        triton.set_allocator(_scratch)  # of this thread: the backward's is one of autograd's
    kernels.forward[len(blocks), q.shape[1]](
        q, k, v, o, lse, blocks, *_sizes(q, k), *_strides(q, k, v),
        **switches(q, k, causal, window), **chosen.of_forward,
    )  # fmt: skip
    return o, lse


@attention_forward.register_fake
def _(q, k, v, blocks, query_blocks, key_blocks, cu_seqlens, causal, window):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=wide)


@torch.library.custom_op("armillary::attention_backward", mutates_args=())
def attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    query_blocks: torch.Tensor,
    key_blocks: torch.Tensor,
    cu_seqlens: torch.Tensor,
    causal: bool,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    if not runs_triton("attention", q):
        return _reference_backward(do, q, k, v, o, lse, cu_seqlens, causal, window)
    chosen, same = _plan(q, window), switches(q, k, causal, window)
    q, k, v, do = (_loadable(x, chosen.tma) for x in (q, k, v, do.contiguous()))
    dq, dk, dv, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)
    rows = DELTA // same["DP"]
    kernels.delta[triton.cdiv(q.shape[0], rows), q.shape[1]](
        o, do, delta, q.shape[0], D=same["D"], DP=same["DP"], BM=rows
    )
    shared = (*_sizes(q, k), *_strides(q, k, v))
    if chosen.tma:
        triton.set_allocator(_scratch)
    kernels.backward_keys[len(key_blocks), k.shape[1]](
        q, k, v, do, lse, delta, dk, dv, key_blocks, *shared, **same, **chosen.of_keys
    )
    kernels.backward_queries[len(query_blocks), q.shape[1]](
        q, k, v, do, lse, delta, dq, query_blocks, *shared, **same, **chosen.of_queries
    )
    return dq, dk, dv


@attention_backward.register_fake
def _(do, q, k, v, o, lse, query_blocks, key_blocks, cu_seqlens, causal, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _reference_backward(do, q, k, v, o, lse, cu_seqlens, causal, window):
    scores = _scores(q, k, cu_seqlens, causal, window)
    group, wide = q.shape[1] // k.shape[1], scores.dtype
    p, do, o = (scores - lse[..., None]).exp(), do.to(wide), o.to(wide)
    wide_k, wide_v = (x.to(wide).repeat_interleave(group, 1) for x in (k, v))
    dp = torch.einsum("qhd,khd->hqk", do, wide_v)
    ds = p * (dp - (do * o).sum(-1).T[..., None]) / math.sqrt(q.shape[2])
    dk, dv = torch.einsum("hqk,qhd->khd", ds, q.to(wide)), torch.einsum("hqk,qhd->khd", p, do)
    dk, dv = (x.unflatten(1, (k.shape[1], group)).sum(2).to(k.dtype).contiguous() for x in (dk, dv))
    return torch.einsum("hqk,khd->qhd", ds, wide_k).to(q.dtype).contiguous(), dk, dv


def _setup(ctx, inputs, output):
    q, k, v, _, *tables, ctx.causal, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, *tables)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, do, _):
    return *attention_backward(do, *ctx.saved_tensors, ctx.causal, ctx.window), *[None] * 6


attention_forward.register_autograd(_gradients, setup_context=_setup)


def _loadable(x: torch.Tensor, tma: bool) -> torch.Tensor:
    """The same numbers, as kernels load them: each head's one behind another; by TMA, from multiples of 16 bytes."""
    if tma:
        places = (x.data_ptr(), *(x.element_size() * stride for stride in x.stride()[:2]))
        if any(place % 16 for place in places) or x.stride(0) == 0:
            return x.clone(memory_format=torch.contiguous_format)
    return x if x.stride(2) == 1 else x.contiguous()


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for what a kernel tells TMA; its alignment is less than that of all memory of torch's."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def head_block(d: int) -> int:
    """A head's dimensions as a kernel has them: a power of two, and no less than a multiplication of matrices takes."""
    return max(triton.next_power_of_2(d), 16)


def _sizes(q: torch.Tensor, k: torch.Tensor) -> tuple[float, int, int | None]:
    """Kernels' scale, queries' number, and the first one's position if that is not 0."""
    return 1 / math.sqrt(q.shape[2]) / math.log(2), len(q), len(k) - len(q) or None


def _strides(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[int, ...]:
    return tuple(stride for x in (q, k, v) for stride in x.stride()[:2])
