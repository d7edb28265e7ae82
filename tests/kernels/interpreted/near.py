"""How far a kernel is from the same computation in float64."""

from collections.abc import Callable

import torch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_near(
    operation: Callable,
    exact: Callable,
    tensors: list[torch.Tensor | None],
    dtype: torch.dtype,
    tolerance: float | None = None,
    scale: float = 0.0,
) -> None:
    """Outputs of `operation` in `dtype`, and the gradients of all `tensors` (float64), are those of `exact` in float64,
    as far as the dtype's rounding lets them. `scale`: of what gradients are differences of, where they may be 0."""
    low = [None if one is None else one.to(dtype).requires_grad_() for one in tensors]
    high = [None if one is None else one.detach().double().requires_grad_() for one in low]
    found, wanted = _several(operation(*low)), _several(exact(*high))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in wanted]
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        _compare(got, want, tolerance or TOLERANCE[dtype], 0.0)
    given = [[one for one in side if one is not None] for side in (low, high)]
    found_gradients = torch.autograd.grad([*found], given[0], [weight.to(dtype) for weight in weights])
    wanted_gradients = torch.autograd.grad([*wanted], given[1], [weight.to(dtype).double() for weight in weights])
    for got, want in zip(found_gradients, wanted_gradients, strict=True):
        _compare(got, want, tolerance or TOLERANCE[dtype], scale)


def _compare(got: torch.Tensor, want: torch.Tensor, tolerance: float, scale: float) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    room = tolerance * (want.norm() + scale * want.numel() ** 0.5) + 1e-12
    assert (got.double() - want).norm() <= room, "too far from float64"


def _several(found: torch.Tensor | tuple) -> tuple:
    return found if isinstance(found, tuple) else (found,)
