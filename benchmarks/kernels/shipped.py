"""Every kernel in every configuration that is shipped, as launches of a model of bfloat16 would have it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton

from armillary.kernels import attention, attention_kernels, norm, rope, swiglu

ROWS, HEADS, GROUPS = 8192, 32, 8


@dataclass(frozen=True)
class Shipped:
    """A kernel with the arguments of a launch, and what `Facts.problems` is to ask of it."""

    name: str
    kernel: triton.JITFunction
    arguments: tuple
    switches: dict
    asks: dict = field(default_factory=dict)


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def wide(*shape: int) -> torch.Tensor:
    return tensor(*shape, dtype=torch.float32)


def shipped() -> Iterator[Shipped]:
    """All of them."""
    yield from norms()
    yield from elementwise()
    yield from attentions()


def norms() -> Iterator[Shipped]:
    for n in (256, 1024, 4096, 5120, 8192, 16384):
        plan, x, w = norm.tiles(n), tensor(ROWS, n), tensor(n)
        for layer in (False, True):
            name = f"{'layer' if layer else 'rms'}_norm {n}"
            switches = {"N": n, "LAYER": layer, "ZERO_CENTRED": False}
            more = switches | {"RESIDUAL": True, "BIAS": layer} | plan.options
            mean, bias = (wide(ROWS), w) if layer else (wide(0), None)
            forward = norm._forward if n <= norm.WIDEST else norm._forward_wide
            yield Shipped(f"{name} forward", forward, (x, x, w, bias, x, x, mean, wide(ROWS), ROWS, 1e-5), more)
            given, results = (x, x, x, w, mean, wide(ROWS)), (x, wide(528, n), wide(528, n) if layer else wide(0), ROWS)
            yield Shipped(f"{name} backward", norm._backward, (*given, wide(2, ROWS), *results), more)
            if n > norm.WIDEST:
                sums, of_row = (x, x, w, mean, wide(ROWS), wide(2, ROWS), ROWS), {"BLOCK": plan.block}
                yield Shipped(f"{name} row sums", norm._row_sums, sums, switches | of_row | {"num_warps": plan.warps})


def elementwise() -> Iterator[Shipped]:
    n = 14336
    x, y = tensor(ROWS, 2 * n), tensor(ROWS, n)
    switches = {"N": n, "BLOCK": swiglu.BLOCK, "num_warps": swiglu.WARPS}
    yield Shipped("swiglu forward", swiglu._forward, (x, y), switches)
    yield Shipped("swiglu backward", swiglu._backward, (x, y, x), switches)
    for d in (64, 80, 128):
        q, table = tensor(ROWS, HEADS, d), wide(ROWS, 1, d // 2)
        yield Shipped(
            f"rope {d}", rope._turn, (q, table, table, q, HEADS, HEADS * d, d),
            rope.launch(HEADS, d) | {"BACK": False, "num_warps": rope.WARPS}, {"wide": d != 80},
        )  # fmt: skip


def attentions() -> Iterator[Shipped]:
    for d in (64, 80, 96, 128, 256):
        q, k, lse = tensor(ROWS, HEADS, d), tensor(ROWS, GROUPS, d), wide(HEADS, ROWS)
        blocks = tensor(ROWS // 64, 3, dtype=torch.int32)
        strides = (HEADS * d, d, GROUPS * d, d, GROUPS * d, d)
        for causal, window in ((True, 0), (False, 0), (True, 4096)):
            switches, plan = attention.switches(q, k, causal, window), attention.tiles(d, torch.bfloat16, window)
            name = f"attention {d} {'causal' if causal else 'full'}{f' window {window}' if window else ''}"
            tail, asks = (0.1275, ROWS, *strides), {"dot": True}
            yield Shipped(
                f"{name} forward", attention_kernels.forward, (q, k, k, q, lse, blocks, *tail),
                switches | plan["forward"].options, asks,
            )  # fmt: skip
            yield Shipped(
                f"{name} backward, keys", attention_kernels.backward_keys,
                (q, k, k, q, lse, lse, k, k, blocks, *tail), switches | plan["keys"].options, {"dot": d < 256},
            )  # fmt: skip
            yield Shipped(
                f"{name} backward, queries", attention_kernels.backward_queries,
                (q, k, k, q, lse, lse, q, blocks, *tail), switches | plan["queries"].options, asks,
            )  # fmt: skip
