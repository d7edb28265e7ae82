"""SwiGLU (Shazeer 2020, equation 6)."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from armillary.kernels.arguments import require
from armillary.kernels.choose import runs_triton

BLOCK, WARPS = 2048, 4


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x [..., 2n] = [gate, up]; result [..., n]. Kernels compute in float32."""
    require(x.dim() > 0 and x.shape[-1] % 2 == 0, "swiglu", "x", f"of an even last axis, not {list(x.shape)}")
    require(x.is_floating_point(), "swiglu", "x", f"of floating-point numbers, not of {x.dtype}")
    if runs_triton("swiglu", x) and x.numel():
        return swiglu_forward(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _forward(x_ptr, y_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    gate = tl.load(x_ptr + row * 2 * N + column, inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * N + N + column, inside, other=0.0).to(tl.float32)
    y = gate / (1 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * N + column, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _backward(x_ptr, dy_ptr, dx_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    gate = tl.load(x_ptr + row * 2 * N + column, inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * N + N + column, inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * N + column, inside, other=0.0).to(tl.float32)
    open_by = 1 / (1 + tl.exp(-gate))
    dgate = dy * up * open_by * (1 + gate * (1 - open_by))
    dup = dy * gate * open_by
    tl.store(dx_ptr + row * 2 * N + column, dgate.to(dx_ptr.dtype.element_ty), inside)
    tl.store(dx_ptr + row * 2 * N + N + column, dup.to(dx_ptr.dtype.element_ty), inside)


def _grid(rows: int, n: int) -> tuple[int, int]:
    return rows, triton.cdiv(n, BLOCK)


@torch.library.custom_op("armillary::swiglu_forward", mutates_args=())
def swiglu_forward(x: torch.Tensor) -> torch.Tensor:
    """See `swiglu`."""
    if not runs_triton("swiglu", x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    x, n = x.contiguous(), x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], n)
    _forward[_grid(x.numel() // (2 * n), n)](x, y, N=n, BLOCK=BLOCK, num_warps=WARPS)
    return y


@swiglu_forward.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("armillary::swiglu_backward", mutates_args=())
def swiglu_backward(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """The gradient of x."""
    if not runs_triton("swiglu", x):
        gate, up = x.chunk(2, dim=-1)
        open_by = torch.sigmoid(gate)
        return torch.cat([dy * up * open_by * (1 + gate * (1 - open_by)), dy * gate * open_by], dim=-1)
    x, dy, n = x.contiguous(), dy.contiguous(), x.shape[-1] // 2
    dx = torch.empty_like(x)
    _backward[_grid(x.numel() // (2 * n), n)](x, dy, dx, N=n, BLOCK=BLOCK, num_warps=WARPS)
    return dx


@swiglu_backward.register_fake
def _(x, dy):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


swiglu_forward.register_autograd(lambda ctx, dy: swiglu_backward(*ctx.saved_tensors, dy), setup_context=_setup)
