"""AdamW (Loshchilov and Hutter 2019, algorithm 2): one launch for many tensors, float32 weights beside the parameters'
bfloat16, and stochastic rounding (Gupta et al. 2015, section 3.1) where nothing but bfloat16 is kept."""

import functools
import math

import torch
import triton
import triton.language as tl

from armillary.kernels.arguments import require, require_like
from armillary.kernels.choose import runs_triton

BLOCK, WARPS = 1024, 4


def adamw(
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    first: list[torch.Tensor],
    second: list[torch.Tensor],
    copies: list[torch.Tensor],
    step: int,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None = None,
) -> None:
    """Take step number `step`, from 1 on: writes over weights and moments, and rounds the weights into `copies`.

    Lists of contiguous tensors, each list of one dtype. Weights float32 (float64 for the reference) or bfloat16;
    moments float32 (float64); gradients of any; `copies` bfloat16, as many as weights or none. With a `seed`, another
    one each step, what becomes bfloat16 is rounded up or down by chance, without a bias.
    """
    name = "adamw"
    require(len(weights) > 0, name, "weights", "a list with a tensor or more")
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    for argument, tensors, dtypes in (
        ("weights", weights, {torch.bfloat16, wide}),
        ("gradients", gradients, {torch.bfloat16, torch.float16, torch.float32, wide}),
        ("first", first, {wide}),
        ("second", second, {wide}),
        ("copies", copies or weights, {torch.bfloat16} if copies else {weights[0].dtype}),
    ):
        found = {one.dtype for one in tensors}
        require(len(tensors) == len(weights), name, argument, f"{len(weights)} tensors, not {len(tensors)}")
        require(found <= dtypes, name, argument, f"of one of {sorted(map(str, dtypes))}")
        require(len(found) == 1, name, argument, "all of one dtype")
        for one, weight in zip(tensors, weights, strict=True):
            require_like(name, argument, one, tuple(weight.shape), weight)
            require(one.is_contiguous(), name, argument, "contiguous")
    require(len({one.device for one in weights}) == 1, name, "weights", "on one device")
    require(step > 0, name, "step", f"1 or more, not {step}")
    if any(one.numel() for one in weights):
        lists = (weights, gradients, first, second, copies)
        adamw_step(*lists, step, learning_rate, beta1, beta2, eps, weight_decay, seed)


@triton.jit
def _rounded(x, seed, at, dtype: tl.constexpr, STOCHASTIC: tl.constexpr):
    """x, float32, as `dtype`: to the nearest or, if that is bfloat16, up or down by the chance of what is cut off."""
    if STOCHASTIC and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True) + (tl.randint(seed, at).to(tl.int32, bitcast=True) & 0xFFFF)
        x = tl.where(x == x, (bits & -0x10000).to(tl.float32, bitcast=True), x)  # of no number the sum may be one
    return x.to(dtype)


@triton.jit
def _update(
    w_ptr, g_ptr, m_ptr, v_ptr, c_ptr, at, inside, decay, rate, beta1, beta2, root, eps, seed, chance,
    COPIES: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    g = tl.load(g_ptr + at, inside).to(tl.float32)
    m = beta1 * tl.load(m_ptr + at, inside) + (1 - beta1) * g
    v = beta2 * tl.load(v_ptr + at, inside) + (1 - beta2) * g * g
    w = tl.load(w_ptr + at, inside).to(tl.float32) * decay - rate * m / (tl.sqrt(v) * root + eps)
    tl.store(m_ptr + at, m, inside)
    tl.store(v_ptr + at, v, inside)
    tl.store(w_ptr + at, _rounded(w, seed, chance, w_ptr.dtype.element_ty, STOCHASTIC), inside)
    if COPIES:
        tl.store(c_ptr + at, _rounded(w, seed, chance, c_ptr.dtype.element_ty, STOCHASTIC), inside)


@triton.jit
def _step(
    addresses_ptr, sizes_ptr, owners_ptr, offsets_ptr, weight_ptr, gradient_ptr, first_ptr, second_ptr, copy_ptr,
    decay, rate, beta1, beta2, root, eps, seed,
    COPIES: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of the tensor owners[program], from offsets[program] on. Of the pointers behind it only types count:
    tensors are at addresses [tensors, 5]."""
    program = tl.program_id(0)
    owner = tl.load(owners_ptr + program)
    offset = tl.multiple_of(tl.load(offsets_ptr + program), BLOCK)
    size = tl.load(sizes_ptr + owner)
    table = addresses_ptr + owner * 5
    w_ptr = tl.multiple_of(tl.load(table).to(weight_ptr.dtype), ALIGNED)
    g_ptr = tl.multiple_of(tl.load(table + 1).to(gradient_ptr.dtype), ALIGNED)
    m_ptr = tl.multiple_of(tl.load(table + 2).to(first_ptr.dtype), ALIGNED)
    v_ptr = tl.multiple_of(tl.load(table + 3).to(second_ptr.dtype), ALIGNED)
    c_ptr = tl.multiple_of(tl.load(table + 4).to(copy_ptr.dtype), ALIGNED)
    near = tl.arange(0, BLOCK)
    at = offset + near
    chance = program * BLOCK + near
    if offset + BLOCK <= size:  # without a mask loads are of 16 bytes
        _update(
            w_ptr, g_ptr, m_ptr, v_ptr, c_ptr, at, None, decay, rate, beta1, beta2, root, eps, seed, chance,
            COPIES, STOCHASTIC,
        )  # fmt: skip
    else:
        _update(
            w_ptr, g_ptr, m_ptr, v_ptr, c_ptr, at, at < size, decay, rate, beta1, beta2, root, eps, seed, chance,
            COPIES, STOCHASTIC,
        )  # fmt: skip


@torch.library.custom_op("armillary::adamw_step", mutates_args=("weights", "first", "second", "copies"))
def adamw_step(
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    first: list[torch.Tensor],
    second: list[torch.Tensor],
    copies: list[torch.Tensor],
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None,
) -> None:
    """See `adamw`."""
    decay, rate = 1 - learning_rate * weight_decay, learning_rate / (1 - beta1**step)
    root = 1 / math.sqrt(1 - beta2**step)
    lists = (weights, gradients, first, second, copies or weights)
    if not runs_triton("adamw", weights[0]):
        chance = None if seed is None else torch.Generator(weights[0].device).manual_seed(seed)
        for w, g, m, v, copy in zip(*lists, strict=True):
            wide = g.to(m.dtype)
            m.mul_(beta1).add_(wide, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
            exactly = w.to(m.dtype) * decay - rate * m / (v.sqrt() * root + eps)
            w.copy_(_by_chance(exactly, w.dtype, chance))
            if copies:
                copy.copy_(_by_chance(exactly, copy.dtype, chance))
        return
    sizes, owners, offsets = _blocks(tuple(w.numel() for w in weights), weights[0].device)
    addresses = [[one.data_ptr() for one in tensors] for tensors in zip(*lists, strict=True)]
    at = torch.tensor(addresses, device=weights[0].device)
    aligned = 16 if not any(address % 16 for of in addresses for address in of) else 1
    _step[(len(owners),)](
        at, sizes, owners, offsets, *(tensors[0] for tensors in lists), decay, rate, beta1, beta2, root, eps, seed or 0,
        COPIES=bool(copies), STOCHASTIC=seed is not None, ALIGNED=aligned, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


@functools.lru_cache(8)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tensors' sizes; and of each block its tensor, and where it begins there: int64, the same for every step."""
    each = torch.tensor(sizes, device=device)
    counts = (each + BLOCK - 1) // BLOCK
    owners = torch.arange(len(sizes), device=device).repeat_interleave(counts)
    before = (counts.cumsum(0) - counts)[owners]
    return each, owners, (torch.arange(len(owners), device=device) - before) * BLOCK


def _by_chance(x: torch.Tensor, dtype: torch.dtype, chance: torch.Generator | None) -> torch.Tensor:
    """As the kernel's `_rounded`, with numbers of another generator."""
    if chance is None or dtype != torch.bfloat16:
        return x.to(dtype)
    noise = torch.randint(0, 1 << 16, x.shape, generator=chance, device=x.device, dtype=torch.int32)
    rounded = ((x.float().view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return rounded.where(x == x, x.float()).to(dtype)


class AdamW(torch.optim.AdamW):
    """PyTorch's, with its state and its options of these names, whose step is the kernel's for contiguous float32
    parameters on a GPU."""

    def __init__(
        self, params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0, exact: bool = False
    ):
        """exact: no bit depends on how numbers are shared out to tensors, at the price of speed on CPU."""
        super().__init__(params, lr, betas, eps, weight_decay)
        fused = not exact and all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        for group in self.param_groups:
            group["fused"] = fused or None

    @torch.no_grad()
    def step(self, closure=None):
        """Take a step with the gradients that parameters have; the result of `closure`, which makes them, if given."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        if not all(_fits(p) for group in self.param_groups for p in group["params"]):
            super().step()
            return loss
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None and p.numel()]
            for p in given:
                if not self.state[p]:
                    self.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p),
                                     "exp_avg_sq": torch.zeros_like(p)}  # fmt: skip
                self.state[p]["step"] += 1
            for step in {int(self.state[p]["step"]) for p in given}:
                those = [p for p in given if int(self.state[p]["step"]) == step]
                first, second = ([self.state[p][name] for p in those] for name in ("exp_avg", "exp_avg_sq"))
                adamw(
                    those, [p.grad for p in those], first, second, [], step,
                    learning_rate=float(group["lr"]), beta1=group["betas"][0], beta2=group["betas"][1],
                    eps=group["eps"], weight_decay=group["weight_decay"],
                )  # fmt: skip
        return loss


def _fits(p: torch.Tensor) -> bool:
    both = (p,) if p.grad is None else (p, p.grad)
    return runs_triton("adamw", p) and all(one.dtype == torch.float32 and one.is_contiguous() for one in both)
