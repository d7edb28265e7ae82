"""Every kernel in every configuration that is shipped, as launches of a model of bfloat16 would have it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton

from armillary.kernels import (
    adamw,
    attention,
    attention_kernels,
    attention_tiles,
    cross_entropy,
    decode,
    norm,
    rope,
    swiglu,
)

ROWS, HEADS, GROUPS = 8192, 32, 8
MASKS = ((True, 0), (False, 0), (True, 4096))  # causal or not, and its window


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


def shipped(target: str) -> Iterator[Shipped]:
    """All of them, for one of `choose.target`'s GPUs."""
    yield from norms()
    yield from elementwise()
    yield from losses()
    yield from optimizers()
    yield from attentions(target)
    yield from decoders()


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


def losses() -> Iterator[Shipped]:
    for entries in (50304, 131072):
        logits, row, labels = tensor(ROWS, entries), wide(ROWS), tensor(ROWS, dtype=torch.int64)
        switches = {"V": entries, "BLOCK": cross_entropy.BLOCK, "num_warps": cross_entropy.WARPS}
        name = f"cross_entropy {entries}"
        yield Shipped(f"{name} statistics", cross_entropy._statistics, (logits, labels, wide(4, ROWS), ROWS), switches)
        yield Shipped(
            f"{name} gradient", cross_entropy._gradient, (logits, labels, row, row, 1e-4, 0.1, 0.1 / entries), switches
        )


def optimizers() -> Iterator[Shipped]:
    tables = [tensor(ROWS, dtype=torch.int64)] * 4
    switches = {"ALIGNED": 16, "BLOCK": adamw.BLOCK, "num_warps": adamw.WARPS}
    for name, weight, gradient, more in (
        ("float32", wide(ROWS), wide(ROWS), {"COPIES": False, "STOCHASTIC": False}),
        ("float32 with copies", wide(ROWS), tensor(ROWS), {"COPIES": True, "STOCHASTIC": False}),
        ("bfloat16 by chance", tensor(ROWS), tensor(ROWS), {"COPIES": False, "STOCHASTIC": True}),
    ):
        given = (*tables, weight, gradient, wide(ROWS), wide(ROWS), tensor(ROWS) if more["COPIES"] else weight)
        yield Shipped(f"adamw {name}", adamw._step, (*given, 1.0, 1e-3, 0.9, 0.95, 1.0, 1e-8, 7), switches | more)


def decoders() -> Iterator[Shipped]:
    for d, dtype in itertools.product((64, 128, 256), (torch.bfloat16, torch.float32)):
        q, k = tensor(64, HEADS, d, dtype=dtype), tensor(64, ROWS, GROUPS, d, dtype=dtype)
        group, name = HEADS // GROUPS, f"decode {d}{' of float32' if dtype == torch.float32 else ''}"
        o, lse = wide(64, GROUPS, 8, group, d), wide(64, GROUPS, 8, group)
        yield Shipped(
            name, decode._parts,
            (q, k, k, tensor(64, dtype=torch.int64), o, lse, 0.1275, *k.stride()[:3], *k.stride()[:3], ROWS, 1024),
            {"GROUP": group, "D": d, **decode.options(group, d, q.dtype)},
        )  # fmt: skip
        yield Shipped(
            f"{name}, joined", decode._join, (o, lse, q, decode.MOST),
            {"GROUP": group, "PARTS": decode.MOST, "D": d, "DP": d, "num_warps": decode.JOINING}, {"wide": False},
        )  # fmt: skip


def attentions(target: str) -> Iterator[Shipped]:
    for d, (causal, window), dtype, *tail in itertools.chain(
        itertools.product((64, 80, 96, 128, 256), MASKS, (torch.bfloat16, torch.float16)),
        itertools.product((64, 80, 128, 256), MASKS, (torch.float32,)),
        itertools.product((64, 128), [(True, 0)], (torch.bfloat16,), [ROWS]),
    ):
        before = sum(tail)  # positions without a query
        q, k = tensor(ROWS, HEADS, d, dtype=dtype), tensor(ROWS + before, GROUPS, d, dtype=dtype)
        lse, blocks = wide(HEADS, ROWS), tensor(ROWS // 64, 3, dtype=torch.int32)
        switches, plan = attention.switches(q, k, causal, window), attention_tiles.plan(d, dtype, window, target)
        name = f"attention {d} {'causal' if causal else 'full'}{f' window {window}' if window else ''}"
        name += "" if dtype == torch.bfloat16 else f" of {str(dtype).removeprefix('torch.')}"
        name += " of a tail" if before else ""
        sizes = (0.1275, ROWS, before or None, HEADS * d, d, GROUPS * d, d, GROUPS * d, d)
        asks = {"dot": dtype != torch.float32, "tma": plan.tma}
        yield Shipped(
            f"{name} forward", attention_kernels.forward, (q, k, k, q, lse, blocks, *sizes),
            switches | plan.of_forward, asks,
        )  # fmt: skip
        if target == "sm_90" and causal and d in (64, 128) and dtype == torch.bfloat16 and not before:
            yield Shipped(
                f"{name} forward, specialised", attention_kernels.forward, (q, k, k, q, lse, blocks, *sizes),
                switches | attention_tiles.SPECIALISED[d].of_forward, asks | {"specialised": True},
            )  # fmt: skip
        yield Shipped(
            f"{name} backward, keys", attention_kernels.backward_keys,
            (q, k, k, q, lse, lse, k, k, blocks, *sizes), switches | plan.of_keys, asks,
        )  # fmt: skip
        if (causal, window, before) == (True, 0, 0):
            same = {name: switches[name] for name in ("D", "DP")} | {"BM": attention.DELTA // switches["DP"]}
            yield Shipped(f"{name} backward, delta", attention_kernels.delta, (q, q, lse, ROWS), same)
        yield Shipped(
            f"{name} backward, queries", attention_kernels.backward_queries,
            (q, k, k, q, lse, lse, q, blocks, *sizes), switches | plan.of_queries, asks,
        )  # fmt: skip
