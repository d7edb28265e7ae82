"""Normalisation of rows, with a residual added before it if there is one.

Root mean square: Zhang and Sennrich 2019, equation 4. Layer: Ba, Kiros and Hinton 2016, equations 3 and 4.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from armillary.kernels.arguments import require, require_like
from armillary.kernels.choose import processors, runs_triton

WIDEST = 8192  # columns that one program holds at once; wider rows are read in tiles, twice
TILE = 4096
AT_ONCE = 2048  # numbers that a program of narrow rows holds, several rows of them
PROGRAMS = 4  # of the backward, on each processor


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    zero_centred: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """s / sqrt(mean(s^2) + eps) * weight over the last axis, where s = x, or x + residual.

    x, residual [..., n]; weight [n], of which 1 is subtracted if `zero_centred`. Float64, float32, bfloat16 or float16;
    sums are of float32 at least. Returns y like x, or (y, s) with a residual.
    """
    return _norm(x, weight, None, eps, residual, zero_centred, layer=False)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    zero_centred: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """(s - mean(s)) / sqrt(var(s) + eps) * weight + bias, otherwise as `rms_norm`; bias [n]."""
    return _norm(x, weight, bias, eps, residual, zero_centred, layer=True)


def _norm(x, weight, bias, eps, residual, zero_centred, layer):
    name = "layer_norm" if layer else "rms_norm"
    require(x.dim() > 0 and x.numel() > 0, name, "x", "of one number at least")
    require(x.is_floating_point(), name, "x", f"of floating-point numbers, not of {x.dtype}")
    require_like(name, "weight", weight, x.shape[-1:], x)
    require_like(name, "bias", bias, x.shape[-1:], x)
    require_like(name, "residual", residual, x.shape, x)
    require(residual is None or residual.dtype == x.dtype, name, "residual", f"of {x.dtype}, as x")
    if runs_triton("norm", x):
        y, s, _, _ = norm_forward(x, weight, bias, residual, eps, layer, zero_centred)
        return y if residual is None else (y, s)
    s = x if residual is None else x + residual
    scale = weight + 1 if zero_centred else weight
    once = s.view_as(s)  # one gradient comes from here, so that what else s is used for changes no bit of their sum
    y = F.layer_norm(once, scale.shape, scale, bias, eps) if layer else F.rms_norm(once, scale.shape, scale, eps)
    return y if residual is None else (y, s)


@triton.jit
def _forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr, rows, eps,
    N: tl.constexpr, LAYER: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, ZERO_CENTRED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + column[None, :]
    s = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        s += tl.load(residual_ptr + at, inside, other=0.0).to(tl.float32)
        rounded = s.to(s_ptr.dtype.element_ty)  # the backward sees it rounded
        tl.store(s_ptr + at, rounded, inside)
        s = rounded.to(tl.float32)
    if LAYER:
        mean = tl.sum(s, 1) / N
        tl.store(mean_ptr + row, mean, row < rows)
        s = tl.where(inside, s - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(s * s, 1) / N + eps)
    tl.store(rstd_ptr + row, rstd, row < rows)
    weight = tl.load(weight_ptr + column, column < N, other=0.0).to(tl.float32)
    if ZERO_CENTRED:
        weight += 1.0
    y = s * rstd[:, None] * weight[None, :]
    if BIAS:
        y += tl.load(bias_ptr + column, column < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _forward_wide(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr, rows, eps,
    N: tl.constexpr, LAYER: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, ZERO_CENTRED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same, one row a program, in tiles: sums first, the variance about the tiles' own means (Chan, Golub and
    LeVeque 1979, equation 2.1)."""
    row = tl.program_id(0).to(tl.int64)
    source = x_ptr
    count = 0.0
    mean = 0.0
    squares = 0.0
    for begin in tl.range(0, N, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < N
        s = tl.load(x_ptr + row * N + column, inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            s += tl.load(residual_ptr + row * N + column, inside, other=0.0).to(tl.float32)
            rounded = s.to(s_ptr.dtype.element_ty)
            tl.store(s_ptr + row * N + column, rounded, inside)
            s = rounded.to(tl.float32)
        if LAYER:
            here = tl.minimum(N - begin, BLOCK).to(tl.float32)
            mean_here = tl.sum(s) / here
            away = tl.where(inside, s - mean_here, 0.0)
            difference = mean_here - mean
            squares += tl.sum(away * away) + difference * difference * count * here / (count + here)
            mean += difference * here / (count + here)
            count += here
        else:
            squares += tl.sum(s * s)
    rstd = 1 / tl.sqrt(squares / N + eps)
    if LAYER:
        tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    if RESIDUAL:
        source = s_ptr
        tl.debug_barrier()  # other threads may read what these have written
    for begin in tl.range(0, N, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < N
        s = tl.load(source + row * N + column, inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
        if ZERO_CENTRED:
            weight += 1.0
        y = (s - mean) * rstd * weight
        if BIAS:
            y += tl.load(bias_ptr + column, inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * N + column, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _backward(
    dy_ptr, ds_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, sums_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows,
    N: tl.constexpr, LAYER: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, ZERO_CENTRED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program takes every so many rows, and leaves its own sums of the weight's gradient: nothing is atomic.

    Of rows that are wider than a program holds it takes a tile, and what concerns whole rows is in `sums`."""
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, column < N, other=0.0).to(tl.float32)
    if ZERO_CENTRED:
        weight += 1.0
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        s = tl.load(s_ptr + at, inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, row < rows, other=0.0)
        if LAYER:
            s -= tl.load(mean_ptr + row, row < rows, other=0.0)[:, None]
        normal = s * rstd[:, None]
        dnormal = dy * weight[None, :]
        dweight += tl.sum(dy * normal, 0)
        dbias += tl.sum(dy, 0)
        along = tl.load(sums_ptr + row, row < rows, other=0.0) if BLOCK < N else tl.sum(dnormal * normal, 1) / N
        dx = dnormal - normal * along[:, None]
        if LAYER:
            total = tl.load(sums_ptr + rows + row, row < rows, other=0.0) if BLOCK < N else tl.sum(dnormal, 1) / N
            dx -= total[:, None]
        dx *= rstd[:, None]
        if RESIDUAL:
            dx += tl.load(ds_ptr + at, inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), inside)
    tl.store(dweight_ptr + program * N + column, dweight, column < N)
    if BIAS:
        tl.store(dbias_ptr + program * N + column, dbias, column < N)


@triton.jit
def _row_sums(
    dy_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, sums_ptr, rows,
    N: tl.constexpr, LAYER: tl.constexpr, ZERO_CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means over each wide row: of the normalised values times their gradient, and of the gradient; [2, rows]."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if LAYER:
        mean = tl.load(mean_ptr + row)
    along = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in tl.range(0, N, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < N
        s = tl.load(s_ptr + row * N + column, inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
        if ZERO_CENTRED:
            weight += 1.0
        dnormal = tl.load(dy_ptr + row * N + column, inside, other=0.0).to(tl.float32) * weight
        along += dnormal * (s - mean) * rstd
        total += dnormal
    tl.store(sums_ptr + row, tl.sum(along) / N)
    tl.store(sums_ptr + rows + row, tl.sum(total) / N)


@dataclass(frozen=True)
class Tiles:
    """How rows of n columns are divided: `block` columns of `rows` rows at once, by `warps` warps."""

    block: int
    rows: int
    warps: int

    @property
    def options(self) -> dict[str, int]:
        """For a launch."""
        return {"ROWS": self.rows, "BLOCK": self.block, "num_warps": self.warps}


def tiles(n: int) -> Tiles:
    """A whole row, or several of them, if a program can hold them; else a tile of one."""
    if n > WIDEST:
        return Tiles(TILE, 1, 8)
    block = triton.next_power_of_2(n)
    rows = max(1, min(AT_ONCE // block, 16))
    return Tiles(block, rows, max(1, min(rows * block // 512, 16)))


@torch.library.custom_op("armillary::norm_forward", mutates_args=())
def norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    layer: bool,
    zero_centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y; s (empty without a residual); mean (empty unless `layer`) and 1 / standard deviation of each row."""
    n, rows, wide = x.shape[-1], x.numel() // x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    if not runs_triton("norm", x):
        s = x.to(wide) if residual is None else (x + residual).to(wide)
        mean = s.mean(-1) if layer else s.new_zeros(())
        rstd = torch.rsqrt((s - mean[..., None]).square().mean(-1) + eps)
        y = (s - mean[..., None]) * rstd[..., None] * (weight.to(wide) + zero_centred)
        y = y if bias is None else y + bias.to(wide)
        saved = s.to(x.dtype).contiguous() if residual is not None else x.new_empty(0)
        return y.to(x.dtype).contiguous(), saved, mean.flatten() if layer else s.new_empty(0), rstd.flatten()
    x, weight = x.contiguous(), weight.contiguous()
    bias, residual = (None if one is None else one.contiguous() for one in (bias, residual))
    y, s = torch.empty_like(x), torch.empty_like(x) if residual is not None else x.new_empty(0)
    mean, rstd = x.new_empty(rows if layer else 0, dtype=wide), x.new_empty(rows, dtype=wide)
    plan = tiles(n)
    kernel = _forward_wide if n > WIDEST else _forward
    kernel[(triton.cdiv(rows, plan.rows),)](
        x, residual, weight, bias, y, s, mean, rstd, rows, eps,
        N=n, LAYER=layer, RESIDUAL=residual is not None, BIAS=bias is not None, ZERO_CENTRED=zero_centred,
        **plan.options,
    )  # fmt: skip
    return y, s, mean, rstd


@norm_forward.register_fake
def _(x, weight, bias, residual, eps, layer, zero_centred):
    rows, wide = x.numel() // x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    s = x.new_empty(x.shape if residual is not None else 0)
    return x.new_empty(x.shape), s, x.new_empty(rows if layer else 0, dtype=wide), x.new_empty(rows, dtype=wide)


@torch.library.custom_op("armillary::norm_backward", mutates_args=())
def norm_backward(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    with_bias: bool,
    layer: bool,
    zero_centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of s, the weight and the bias (empty without one)."""
    n, rows, wide = s.shape[-1], rstd.numel(), torch.promote_types(s.dtype, torch.float32)
    if not runs_triton("norm", s):
        flat, dflat = s.reshape(rows, n).to(wide), dy.reshape(rows, n).to(wide)
        normal = (flat - mean[:, None] if layer else flat) * rstd[:, None]
        dnormal = dflat * (weight.to(wide) + zero_centred)
        dx = dnormal - normal * (dnormal * normal).mean(-1, keepdim=True)
        dx = (dx - dnormal.mean(-1, keepdim=True) if layer else dx) * rstd[:, None]
        dx = dx if ds is None else dx + ds.reshape(rows, n).to(wide)
        dbias = dflat.sum(0).to(weight.dtype) if with_bias else weight.new_empty(0)
        return dx.view_as(s).to(s.dtype), (dflat * normal).sum(0).to(weight.dtype), dbias
    dy, ds, weight = dy.contiguous(), None if ds is None else ds.contiguous(), weight.contiguous()
    dx, plan = torch.empty_like(s), tiles(n)
    programs = min(triton.cdiv(rows, plan.rows), PROGRAMS * processors(s.device))
    dweight = s.new_empty(programs, n, dtype=wide)
    dbias = torch.empty_like(dweight) if with_bias else s.new_empty(0, dtype=wide)
    switches = {"N": n, "LAYER": layer, "ZERO_CENTRED": zero_centred}
    sums = s.new_empty(2, rows if n > WIDEST else 0, dtype=wide)
    if n > WIDEST:
        _row_sums[(rows,)](dy, s, weight, mean, rstd, sums, rows, **switches, BLOCK=plan.block, num_warps=plan.warps)
    _backward[programs, triton.cdiv(n, plan.block)](
        dy, ds, s, weight, mean, rstd, sums, dx, dweight, dbias, rows,
        **switches, RESIDUAL=ds is not None, BIAS=with_bias, **plan.options,
    )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype) if with_bias else weight.new_empty(0)


@norm_backward.register_fake
def _(dy, ds, s, weight, mean, rstd, with_bias, layer, zero_centred):
    return torch.empty_like(s), torch.empty_like(weight), torch.empty_like(weight) if with_bias else weight.new_empty(0)


def _setup(ctx, inputs, output):
    x, weight, bias, residual, _, *switches = inputs
    _, s, mean, rstd = output
    ctx.save_for_backward(x if residual is None else s, weight, mean, rstd)
    ctx.bias, ctx.residual, ctx.switches = bias is not None, residual is not None, switches
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, ds, dmean, drstd):
    s, weight, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(s) if dy is None else dy
    dx, dweight, dbias = norm_backward(
        dy, ds if ctx.residual else None, s.contiguous(), weight, mean, rstd, ctx.bias, *ctx.switches
    )
    return dx, dweight, dbias if ctx.bias else None, dx if ctx.residual else None, None, None, None


norm_forward.register_autograd(_gradients, setup_context=_setup)
