"""What is timed on a GPU: each operation of ours and its peers, on the same random data."""

# ruff: noqa: B023 - what a case runs is run before the next one is made
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from armillary.kernels.adamw import AdamW
from armillary.kernels.attention import Packing, attention, even
from armillary.kernels.choose import target
from armillary.kernels.cross_entropy import linear_cross_entropy
from armillary.kernels.decode import decode_attention
from armillary.kernels.norm import layer_norm, rms_norm
from armillary.kernels.rope import rope, rope_table
from armillary.kernels.swiglu import swiglu
from benchmarks.gpu.checks import specialised

DEVICE, DTYPE = "cuda", torch.bfloat16
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """`runs`: by contender, ours is "armillary". `flops` or `bytes`: what one run has to do, at least."""

    name: str
    runs: dict[str, Run]
    flops: float = 0.0
    bytes: float = 0.0


def cases() -> Iterator[Case]:
    """All of them, one at a time, so that what one holds is free for the next."""
    yield from attentions()
    yield from packed()
    yield from norms()
    yield from elementwise()
    yield from losses()
    yield from optimizers()


def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE, dtype=torch.float32) * scale).to(DTYPE).requires_grad_()


def backward(output: Run, inputs: list[torch.Tensor]) -> Run:
    """The backward pass alone of what `output` makes when it is first called."""

    @functools.cache
    def graph() -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
        made = output()
        made = made if isinstance(made, tuple) else (made,)
        return made, [torch.randn_like(one) for one in made]

    return lambda: torch.autograd.grad(graph()[0], inputs, graph()[1], retain_graph=True)


def attentions() -> Iterator[Case]:
    for d, heads in ((64, 32), (128, 16)):
        for length in (2048, 8192, 16384):
            count = 32768 // length
            for causal in (False, True):
                q, k, v = (drawn(count * length, heads, d) for _ in range(3))
                packing = even(count, length, q.device)
                dense = [x.view(count, length, heads, d).transpose(1, 2) for x in (q, k, v)]
                forward = {"armillary": lambda: attention(q, k, v, packing, causal)}
                for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
                    forward[f"sdpa {name}"] = _sdpa(dense, causal, backend)
                title = f"attention d{d} {length} {'causal' if causal else 'full'}"
                flops = 4.0 * count * length * length * heads * d / (2 if causal else 1)
                runs = {name: backward(run, [q, k, v]) for name, run in forward.items()}
                if target(q.device) == "sm_90":
                    forward["armillary, warps specialised"] = specialised(forward["armillary"])
                yield Case(f"{title} forward", forward, flops=flops)
                yield Case(f"{title} backward", runs, flops=2.5 * flops)


def _sdpa(dense: list[torch.Tensor], causal: bool, backend: SDPBackend) -> Run:
    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*dense, is_causal=causal)

    return run


def packed() -> Iterator[Case]:
    """Documents of many lengths in one row, beside FlexAttention with a mask of documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    generator = torch.Generator().manual_seed(0)
    total, heads, d = 32768, 16, 128
    lengths = torch.empty(200).log_normal_(6.5, 1.0, generator=generator).long().clamp(16, 8192)
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    bounds = torch.cat([bounds[bounds < total], torch.tensor([total])])
    q, k, v = (drawn(total, heads, d) for _ in range(3))
    packing = Packing(bounds.int().to(DEVICE), total)
    document = torch.searchsorted(bounds.to(DEVICE), torch.arange(total, device=DEVICE), right=True)
    mask = create_block_mask(
        lambda b, h, i, j: (document[i] == document[j]) & (i >= j), None, None, total, total, device=DEVICE
    )
    flex, one = torch.compile(flex_attention), [x.transpose(0, 1)[None] for x in (q, k, v)]
    forward = {
        "armillary": lambda: attention(q, k, v, packing),
        "flex attention": lambda: flex(*one, block_mask=mask),
    }
    flops = 2.0 * float((bounds.diff().double() ** 2).sum()) * heads * d
    yield Case("attention d128 packed causal forward", forward, flops=flops)
    runs = {name: backward(run, [q, k, v]) for name, run in forward.items()}
    yield Case("attention d128 packed causal backward", runs, flops=2.5 * flops)

    n, capacity = 64, 8192
    q1, cache = drawn(n, 32, d), [drawn(n, capacity, 8, d).detach() for _ in range(2)]
    full = torch.full((n,), capacity, device=DEVICE)
    yield Case(
        "attention d128 decode", {"armillary": lambda: decode_attention(q1.detach(), *cache, full)},
        bytes=2 * cache[0].nbytes,
    )  # fmt: skip


def norms() -> Iterator[Case]:
    for n in (2048, 4096, 8192, 16384):
        rows = (1 << 28) // n
        x, residual, weight, bias = drawn(rows, n), drawn(rows, n), drawn(n), drawn(n)
        runs = {
            "rms_norm": (
                lambda: rms_norm(x, weight, 1e-5), lambda: F.rms_norm(x, (n,), weight, 1e-5), [x, weight], 2, 3,
            ),
            "layer_norm": (
                lambda: layer_norm(x, weight, bias, 1e-5), lambda: F.layer_norm(x, (n,), weight, bias, 1e-5),
                [x, weight, bias], 2, 3,
            ),
            "rms_norm + residual": (
                lambda: rms_norm(x, weight, 1e-5, residual), lambda: _added(x, residual, weight), [x, weight], 4, 4,
            ),
        }  # fmt: skip
        for name, (ours, eager, inputs, forward, back) in runs.items():
            torch._dynamo.reset()  # or the next size would be compiled for any size
            both = {"armillary": ours, "torch.compile": torch.compile(eager, dynamic=False)} | _liger(
                name, x, weight, bias
            )
            yield Case(f"{name} {n} forward", both, bytes=forward * x.nbytes)
            runs_back = {contender: backward(run, inputs) for contender, run in both.items()}
            yield Case(f"{name} {n} backward", runs_back, bytes=back * x.nbytes)


def _added(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = x + residual
    return F.rms_norm(s, weight.shape, weight, 1e-5), s


def _liger(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, Run]:
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return {}
    if name == "rms_norm":
        return {"liger": lambda: LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False)}
    return {"liger": lambda: LigerLayerNormFunction.apply(x, weight, bias, 1e-5)} if name == "layer_norm" else {}


def elementwise() -> Iterator[Case]:
    x = drawn(16384, 2 * 14336)
    table = rope_table(torch.arange(65536, device=DEVICE), 128, 10_000.0)
    q = drawn(65536, 32, 128)
    ours = {"swiglu": (lambda: swiglu(x), x, 1.5, 2.5), "rope": (lambda: rope(q, *table), q, 2, 2)}
    eager = {"swiglu": lambda: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], "rope": lambda: _rope(q, *table)}
    for name, (run, given, forward, back) in ours.items():
        runs = {"armillary": run, "torch.compile": torch.compile(eager[name], dynamic=False)}
        yield Case(f"{name} forward", runs, bytes=forward * given.nbytes)
        yield Case(
            f"{name} backward", {who: backward(one, [given]) for who, one in runs.items()}, bytes=back * given.nbytes
        )


def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def losses() -> Iterator[Case]:
    tokens, hidden, entries = 8192, 4096, 128256
    x, w = drawn(tokens, hidden), drawn(entries, hidden, scale=hidden**-0.5)
    logits = (x @ w.T).detach()
    labels, ones = torch.randint(0, entries, (tokens,), device=DEVICE), torch.ones(tokens, device=DEVICE)

    def both(loss: Callable[[], torch.Tensor]) -> Run:
        return lambda: torch.autograd.grad(loss(), [x, w])

    runs = {
        "armillary": both(lambda: linear_cross_entropy(x, w, labels, ones)[0]),
        "limit: its three products": lambda: (x.detach() @ w.detach().T, logits @ w.detach(), logits.T @ x.detach()),
    }
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        runs["liger"] = both(lambda: Liger.apply(x, w, labels)[0])
    except ImportError:
        runs["eager"] = both(lambda: F.cross_entropy((x @ w.T).float(), labels))
    yield Case("linear + cross entropy, forward and backward", runs, flops=6.0 * tokens * hidden * entries)


def optimizers() -> Iterator[Case]:
    """A step over 256 tensors like those of a transformer's layers, about 800 million float32 weights."""
    shapes = [(4096,), (4096, 1024), (1024, 4096), (2048, 2048)] * 64
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    runs: dict[str, Run] = {}
    weights = 0
    for name, kind in (
        ("armillary", AdamW),
        ("torch fused", lambda given, **more: torch.optim.AdamW(given, fused=True, **more)),
    ):
        given = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
        for one in given:
            one.grad = torch.randn_like(one)
        weights = sum(one.numel() for one in given)
        runs[name] = kind(given, **options).step
    yield Case("adamw", runs, bytes=28.0 * weights)
