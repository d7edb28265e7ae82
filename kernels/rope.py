"""Rotary position embedding over the two halves of a head (Su et al. 2021, section 3.4.2)."""

import torch
import triton
import triton.language as tl

from armillary.kernels.arguments import require, require_like
from armillary.kernels.choose import runs_triton

AT_ONCE, WARPS = 2048, 4  # pairs that a program turns


def rope_table(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for positions [t]: float32 [t, 1, head_dim / 2] each, angles computed in float64."""
    half = head_dim // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angle = (positions[:, None].double() * frequency)[:, None]
    return angle.cos().float(), angle.sin().float()


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [t, heads, head_dim] by a `rope_table`; same shape and dtype, computed in float32."""
    require(x.dim() == 3 and x.shape[-1] % 2 == 0, "rope", "x", f"[t, heads, even], not {list(x.shape)}")
    require(x.is_floating_point(), "rope", "x", f"of floating-point numbers, not of {x.dtype}")
    table = (x.shape[0], 1, x.shape[2] // 2)
    require_like("rope", "cos", cos, table, x)
    require_like("rope", "sin", sin, table, x)
    if runs_triton("rope", x) and x.numel():
        return rope_turn(x, cos, sin, False)
    return _turned(x, cos, sin)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@triton.jit
def _turn(
    x_ptr, cos_ptr, sin_ptr, y_ptr, heads, stride_t, stride_h,
    HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, BLOCK)
    inside = (head < heads)[:, None] & (i < HALF)[None, :]
    cos = tl.load(cos_ptr + t * HALF + i, i < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + t * HALF + i, i < HALF, other=0.0)[None, :]
    if BACK:
        sin = -sin
    at = t * stride_t + head.to(tl.int64)[:, None] * stride_h + i[None, :]
    a = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + HALF, inside, other=0.0).to(tl.float32)
    to = (t * heads + head[:, None]) * 2 * HALF + i[None, :]
    tl.store(y_ptr + to, (a * cos - b * sin).to(y_ptr.dtype.element_ty), inside)
    tl.store(y_ptr + to + HALF, (b * cos + a * sin).to(y_ptr.dtype.element_ty), inside)


def launch(heads: int, dim: int) -> dict[str, int]:
    """What a program turns: `HEADS` heads of one position."""
    block = triton.next_power_of_2(dim // 2)
    at_once = max(1, min(AT_ONCE // block, triton.next_power_of_2(heads)))
    return {"HALF": dim // 2, "HEADS": at_once, "BLOCK": block}


@torch.library.custom_op("armillary::rope_turn", mutates_args=())
def rope_turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    """See `rope`; `back`: by the opposite angles, which is the gradient of the other."""
    if not runs_triton("rope", x):
        return _turned(x, cos, -sin if back else sin)
    x = x if x.stride(2) == 1 else x.contiguous()
    t, heads, dim = x.shape
    y, plan = x.new_empty(x.shape), launch(heads, dim)
    _turn[t, triton.cdiv(heads, plan["HEADS"])](
        x, cos.contiguous(), sin.contiguous(), y, heads, x.stride(0), x.stride(1), BACK=back, num_warps=WARPS, **plan
    )
    return y


@rope_turn.register_fake
def _(x, cos, sin, back):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    _, *table, ctx.back = inputs
    ctx.save_for_backward(*table)


rope_turn.register_autograd(
    lambda ctx, dy: (rope_turn(dy, *ctx.saved_tensors, not ctx.back), None, None, None), setup_context=_setup
)
