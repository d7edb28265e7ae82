"""Every operation on this GPU against float64, values and gradients, and twice the same bits."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch

from armillary.kernels import attention as attention_module
from armillary.kernels.adamw import adamw
from armillary.kernels.attention import Packing, attention
from armillary.kernels.attention_tiles import SPECIALISED
from armillary.kernels.choose import target
from armillary.kernels.cross_entropy import linear_cross_entropy
from armillary.kernels.decode import decode_attention
from armillary.kernels.norm import layer_norm, rms_norm
from armillary.kernels.rope import rope, rope_table
from armillary.kernels.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # in Triton's interpreter
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LENGTHS = [700, 1, 130, 217]
Operation = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Check:
    """An operation on tensors of these shapes, which is differentiable in all of them if `backward`."""

    name: str
    operation: Operation
    shapes: list[tuple[int, ...]]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    backward: bool = True


def checks() -> Iterator[Check]:
    """All of them; what may hang a GPU, if anything does, last."""
    for n in (256, 1000, 4096, 8192, 16384):
        yield Check(f"rms_norm {n}", lambda x, w: rms_norm(x, w, 1e-5), [(133, n), (n,)])
        yield Check(
            f"rms_norm {n} + residual", lambda x, w, r: rms_norm(x, w, 1e-5, r, True), [(133, n), (n,), (133, n)]
        )
        yield Check(f"layer_norm {n}", lambda x, w, b: layer_norm(x, w, b, 1e-5), [(133, n), (n,), (n,)])
    for d in (64, 80, 128):
        table = rope_table(torch.arange(133, device=DEVICE) * 37, d, 10_000.0)
        yield Check(f"rope {d}", lambda x, table=table: rope(x, *table), [(133, 8, d)])
    yield Check("swiglu", swiglu, [(133, 2 * 3000)])
    labels = torch.arange(133, device=DEVICE) * 71 % 9000
    labels[::7] = -100
    weights = torch.linspace(0.1, 1, 133, device=DEVICE)
    yield Check(
        "linear_cross_entropy", lambda x, w: linear_cross_entropy(x, w * 0.1, labels, weights, 1e-3, 0.1)[0],
        [(133, 256), (9000, 256)],
    )  # fmt: skip
    held = torch.tensor([0, 1, 700, 1000], device=DEVICE)
    for d in (64, 80, 128, 256):
        yield Check(
            f"decode {d}", lambda q, k, v: decode_attention(q, k, v, held),
            [(4, 8, d), (4, 1000, 2, d), (4, 1000, 2, d)], backward=False,
        )  # fmt: skip
    yield Check("adamw", _stepped, [(5000,), (5000,), (5000,), (5000,)], (torch.float32,), backward=False)
    yield from attentions()


def attentions() -> Iterator[Check]:
    bounds = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).int()
    packing = Packing(bounds, sum(LENGTHS))

    def attended(causal: bool, window: int) -> Operation:
        return lambda q, k, v: attention(q, k, v, packing, causal, window)

    for d in (64, 80, 96, 128, 256):
        shapes = [(sum(LENGTHS), heads, d) for heads in (8, 2, 2)]
        for title, causal, window in (("causal", True, 0), ("full", False, 0), ("causal window 100", True, 100)):
            dtypes = (torch.bfloat16, torch.float16, torch.float32) if d == 64 else (torch.bfloat16, torch.float32)
            yield Check(f"attention {d} {title}", attended(causal, window), shapes, dtypes)
    joint = [(sum(LENGTHS), 12, 64)]  # queries, keys and values of one projection, which lie among each other
    yield Check("attention 64 of views", lambda x: attention(x[:, :8], x[:, 8:10], x[:, 10:], packing), joint)
    for d in (64, 128) if target(torch.device(DEVICE)) == "sm_90" else ():
        shapes = [(sum(LENGTHS), heads, d) for heads in (8, 2, 2)]
        yield Check(
            f"attention {d} causal, warps specialised", specialised(attended(True, 0)), shapes, (torch.bfloat16,)
        )


def specialised(operation: Operation) -> Operation:
    """Attention whose forward has warps that only load."""

    def run(*tensors: torch.Tensor):
        with mock.patch.object(attention_module, "plan", lambda d, *_: SPECIALISED[d]):
            return operation(*tensors)

    return run


def _stepped(weight, gradient, first, second):
    given = [one.clone() for one in (weight, gradient, first, second.square())]
    adamw(*([one] for one in given), [], 3, learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    return given[0], given[2], given[3]


def checked(check: Check) -> Iterator[dict]:
    """A row for each dtype: the largest relative error of its results, and whether and why it is `wrong`."""
    for dtype in check.dtypes:
        row = {"name": check.name, "dtype": str(dtype)}
        try:
            error, same = _compared(check, dtype)
        except Exception as problem:  # what compilers and drivers raise is of any kind, and the next check may pass
            yield row | {"error": None, "wrong": f"{type(problem).__name__}: {problem}"[:300]}
            continue
        wrong = "" if error <= TOLERANCE[dtype] else "too far from float64"
        yield row | {"error": error, "wrong": wrong or ("" if same else "not the same bits twice")}


def _compared(check: Check, dtype: torch.dtype) -> tuple[float, bool]:
    """The largest relative error of results and gradients; whether a second run gave the same bits."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in check.shapes]
    ours, again, exact = (_results(check, [one.to(wide) for one in made]) for wide in (dtype, dtype, torch.float64))
    if not all(got.isfinite().all() for got in ours):
        return math.inf, True
    errors = [max(_error(got, want), _error(got, want, -1) / 10) for got, want in zip(ours, exact, strict=True)]
    return max(errors), all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))


def _error(got: torch.Tensor, want: torch.Tensor, dim: int | None = None) -> float:
    """Relative, of all numbers or of the worst row; gradients that cancel out are differences of numbers of about 1."""
    count = want.numel() if dim is None else want.shape[dim]
    error = torch.linalg.vector_norm(got.double() - want, dim=dim)
    return float((error / (torch.linalg.vector_norm(want, dim=dim) + 0.1 * count**0.5)).max())


def _results(check: Check, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    tensors = [one.requires_grad_(check.backward) for one in tensors]
    found = check.operation(*tensors)
    found = list(found) if isinstance(found, tuple) else [found]
    if not check.backward:
        return found
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(one.shape, generator=generator).bfloat16().to(one.device, one.dtype) for one in found]
    return [one.detach() for one in found] + list(torch.autograd.grad(found, tensors, weights))
