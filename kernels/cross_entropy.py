"""Cross entropy of a linear layer's outputs, whose logits are never held all at once.

The tokens go through in chunks: a chunk's logits are made, and their gradient is written over them and multiplied back
at once, so that the backward pass has nothing left but a factor (the order of Hsu et al. 2024, "Liger Kernel",
section 3.2.5). Under tensor parallelism each rank has a part of the vocabulary, and only three numbers a token are
exchanged (Shoeybi et al. 2019, section 3). The term z_loss * lse^2 is that of Chowdhery et al. 2022, section 5.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from armillary.kernels.arguments import require, require_like
from armillary.kernels.choose import runs_triton

IGNORED = -100  # a label that counts nothing
BLOCK, WARPS = 4096, 8
LEAST = 2048  # tokens of a chunk
NEAR = 1 << 18  # numbers that the reference goes over at once


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of weights * losses, losses), both float32 (float64 of float64), the losses [T] without a gradient.

    hidden [T, h]; weight [V, h]; labels int64 [T] in [0, V) or IGNORED; weights float [T], of each token in the sum. A
    loss is -log softmax(hidden weight')[label], of which `label_smoothing` is shared by all entries, + z_loss * lse^2.

    group: tensor-parallel ranks, which have V entries each, in their order; the gradient of `hidden` is then that of
    this rank's entries, to be summed over them by the caller. In float16 small weights lose their gradients: make them
    larger, and the sum smaller.
    """
    name = "linear_cross_entropy"
    require(hidden.dim() == 2 and len(hidden) > 0, name, "hidden", f"[T, h] with T above 0, not {list(hidden.shape)}")
    require(hidden.is_floating_point(), name, "hidden", f"of floating-point numbers, not of {hidden.dtype}")
    require(weight.dim() == 2 and weight.shape[1] == hidden.shape[1], name, "weight", f"[V, {hidden.shape[1]}]")
    require(weight.dtype == hidden.dtype, name, "weight", f"of {hidden.dtype}, as hidden")
    require_like(name, "weight", weight, tuple(weight.shape), hidden)
    require_like(name, "labels", labels, hidden.shape[:1], hidden)
    require(labels.dtype == torch.int64, name, "labels", f"of int64, not of {labels.dtype}")
    require_like(name, "weights", weights, hidden.shape[:1], hidden)
    require(0 <= label_smoothing < 1, name, "label_smoothing", "from 0 to below 1")
    return _LinearCrossEntropy.apply(hidden, weight, labels, weights, z_loss, label_smoothing, group)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, weights, z_loss, label_smoothing, group):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses, dhidden = hidden.new_empty(len(hidden), dtype=wide), torch.empty_like(hidden)
        dweight = None
        first = 0 if group is None else dist.get_rank(group) * len(weight)
        entries = len(weight) * (1 if group is None else dist.get_world_size(group))
        factor = torch.where(labels == IGNORED, 0, weights.to(wide))
        for begin in range(0, len(hidden), size := chunk(*hidden.shape, len(weight))):
            part = slice(begin, begin + size)
            logits, own = hidden[part] @ weight.T, labels[part] - first
            peak, total, target, sum_of_all = cross_entropy_statistics(logits, own)
            if group is not None:
                highest = peak.clone()
                dist.all_reduce(highest, dist.ReduceOp.MAX, group)
                exchanged = torch.stack([total * (peak - highest).exp(), target, sum_of_all])
                dist.all_reduce(exchanged, group=group)
                peak, (total, target, sum_of_all) = highest, exchanged
            lse = peak + total.log()
            loss = lse - (1 - label_smoothing) * target - label_smoothing / entries * sum_of_all + z_loss * lse.square()
            losses[part] = torch.where(labels[part] == IGNORED, 0, loss)
            cross_entropy_gradient(logits, own, lse, factor[part], z_loss, label_smoothing, label_smoothing / entries)
            dhidden[part] = logits @ weight
            product = _wide_product(logits.T, hidden[part], wide)
            dweight = product if dweight is None else dweight.add_(product)
        ctx.save_for_backward(dhidden, dweight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return (factor * losses).sum(), losses

    @staticmethod
    def backward(ctx, dtotal, _):
        dhidden, dweight = ctx.saved_tensors
        return dhidden * dtotal.to(dhidden.dtype), dweight * dtotal.to(dweight.dtype), None, None, None, None, None


def chunk(tokens: int, hidden: int, entries: int) -> int:
    """Tokens at once: so many that their logits take about as much memory as all tokens' hidden states, but enough that
    adding up the weight's gradient, of float32, costs little beside the products."""
    return max(LEAST, triton.next_power_of_2(triton.cdiv(tokens, triton.cdiv(entries, hidden))))


def _wide_product(a: torch.Tensor, b: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    if a.is_cuda and a.dtype != wide and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


@triton.jit
def _statistics(logits_ptr, labels_ptr, found_ptr, rows, V: tl.constexpr, BLOCK: tl.constexpr):
    """found [4, rows]: highest logit, sum of exp(logit - it), the label's logit (0 if not here), sum of logits."""
    row = tl.program_id(0).to(tl.int64)
    near = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    everything = tl.zeros([BLOCK], tl.float32)
    for begin in tl.range(0, V, BLOCK):
        inside = begin + near < V
        x = tl.load(logits_ptr + row * V + begin + near, inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, x)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - shift) + tl.exp(x - shift)
        everything += tl.where(inside, x, 0.0)
        peak = higher
    highest = tl.max(peak, 0)
    label = tl.load(labels_ptr + row)
    here = (label >= 0) & (label < V)
    target = tl.load(logits_ptr + row * V + tl.where(here, label, 0)).to(tl.float32)
    tl.store(found_ptr + row, highest)
    tl.store(found_ptr + rows + row, tl.sum(total * tl.exp(peak - highest), 0))
    tl.store(found_ptr + 2 * rows + row, tl.where(here, target, 0.0))
    tl.store(found_ptr + 3 * rows + row, tl.sum(everything, 0))


@triton.jit
def _gradient(
    logits_ptr, labels_ptr, lse_ptr, factor_ptr, z_loss, label_smoothing, share, V: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lse = tl.load(lse_ptr + row)
    x = tl.load(logits_ptr + row * V + column, column < V, other=0.0).to(tl.float32)
    dx = tl.exp(x - lse) * (1 + 2 * z_loss * lse) - share
    dx -= tl.where(column == tl.load(labels_ptr + row), 1 - label_smoothing, 0.0)
    dx *= tl.load(factor_ptr + row)
    tl.store(logits_ptr + row * V + column, dx.to(logits_ptr.dtype.element_ty), column < V)


@torch.library.custom_op("armillary::cross_entropy_statistics", mutates_args=())
def cross_entropy_statistics(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of logits [T, V], labels int64 [T], which may be outside [0, V): float32 (float64) [4, T], see `_statistics`."""
    rows, entries = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    if not runs_triton("cross_entropy", logits):
        own, here = _own_labels(labels, entries)
        target = logits.gather(1, own)[:, 0].to(wide).where(here, 0)
        found = []
        for part in logits.split(_near(logits)):
            x = part.to(wide)
            peak = x.amax(-1)
            found.append(torch.stack([peak, (x - peak[:, None]).exp_().sum(-1), x.sum(-1)]))
        peak, total, sum_of_all = torch.cat(found, 1)
        return torch.stack([peak, total, target, sum_of_all])
    found = logits.new_empty(4, rows, dtype=wide)
    _statistics[(rows,)](logits, labels, found, rows, V=entries, BLOCK=BLOCK, num_warps=WARPS)
    return found


@cross_entropy_statistics.register_fake
def _(logits, labels):
    return logits.new_empty(4, len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))


@torch.library.custom_op("armillary::cross_entropy_gradient", mutates_args=("logits",))
def cross_entropy_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    factor: torch.Tensor,
    z_loss: float,
    label_smoothing: float,
    share: float,
) -> None:
    """Write over logits [T, V] the gradient of factor * loss; lse, factor [T]; `share`: one entry's of smoothing."""
    rows, entries = logits.shape
    if runs_triton("cross_entropy", logits):
        _gradient[rows, triton.cdiv(entries, BLOCK)](
            logits, labels, lse, factor, z_loss, label_smoothing, share, V=entries, BLOCK=BLOCK, num_warps=WARPS
        )
        return
    own, here = _own_labels(labels, entries)
    steps = (here * (label_smoothing - 1)).to(lse.dtype)[:, None]
    columns = (lse[:, None], factor[:, None], own, steps)
    for part, *own_rows in zip(*(x.split(_near(logits)) for x in (logits, *columns)), strict=True):
        lse_T1, factor_T1, own_T1, step_T1 = own_rows
        dx = part.to(lse.dtype)  # itself, where it is wide enough
        dx.sub_(lse_T1).exp_()
        if z_loss:
            dx.mul_(1 + 2 * z_loss * lse_T1)
        if share:
            dx.sub_(share)
        part.copy_(dx.scatter_add_(1, own_T1, step_T1).mul_(factor_T1))


def _own_labels(labels: torch.Tensor, entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [T, 1], 0 for those that are not among the `entries` here; and which are, [T]."""
    here = (labels >= 0) & (labels < entries)
    return labels.where(here, 0)[:, None], here


def _near(logits: torch.Tensor) -> int:
    """Rows that stay in a processor's cache while several operations go over them; all of them on a GPU."""
    return max(1, NEAR // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
