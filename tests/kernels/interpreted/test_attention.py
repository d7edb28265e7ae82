import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.kernels import attention as attention_module
from armillary.kernels import attention_kernels as kernels
from armillary.kernels.attention import (
    Packing,
    attention,
    attention_and_lse,
    attention_backward,
    attention_forward,
    even,
    switches,
)
from tests.kernels.interpreted.near import assert_near

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def exact(lengths, causal, window):
    def one(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        away = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = (away < 0) & causal | (away >= window) & (window > 0)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)

    bounds = list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))
    return lambda q, k, v: torch.cat([one(q[a:b], k[a:b], v[a:b]) for a, b in bounds])


def qkv(total, heads, groups, d):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(total, n, d, generator=generator, dtype=torch.float64) for n in (heads, groups, groups)]


def ours(lengths, causal, window):
    packing = Packing(torch.tensor([0, *lengths]).cumsum(0).int(), sum(lengths))
    return lambda q, k, v: attention(q, k, v, packing, causal, window)


@given(
    lengths=st.lists(st.integers(0, 60) | st.sampled_from([1, 64, 128, 200]), min_size=1, max_size=3).filter(any),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    d=st.sampled_from([16, 32, 64]),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 33, 70]),
    dtype=dtypes,
)
@settings(deadline=None, max_examples=20)
def test_packed_documents_are_near_float64(lengths, heads, d, causal, window, dtype):
    window = window if causal else 0
    made = qkv(sum(lengths), *heads, d)
    assert_near(ours(lengths, causal, window), exact(lengths, causal, window), made, dtype, scale=1.0)


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=3).filter(any),
    part=st.floats(0, 1),
    causal=st.booleans(),
    window=st.sampled_from([0, 33]),
    target=st.sampled_from(["sm_80", "sm_90"]),
)
@settings(deadline=None, max_examples=15)
def test_queries_of_the_last_positions_alone(lengths, part, causal, window, target):
    """As under context parallelism: they see keys of all positions before them, and every key gets its gradient."""
    total, window = sum(lengths), window if causal else 0
    queries = max(1, round(total * part))
    q, k, v = qkv(total, 4, 2, 64)
    before = torch.zeros_like(q[: total - queries])
    packing = Packing(torch.tensor([0, *lengths]).cumsum(0).int(), total, queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "target", lambda device: target)
        assert_near(
            lambda q, k, v: attention(q, k, v, packing, causal, window),
            lambda q, k, v: exact(lengths, causal, window)(torch.cat([before, q]), k, v)[-queries:],
            [q[-queries:], k, v], torch.bfloat16, scale=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims(d, dtype):
    lengths = [70, 1, 130]
    assert_near(ours(lengths, True, 0), exact(lengths, True, 0), qkv(201, 2, 1, d), dtype, scale=1.0)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("window", [0, 50])
def test_what_each_gpu_has(target, window, monkeypatch):
    """Its blocks, and its ways to load; of rows that lie further apart than they are long."""
    monkeypatch.setattr(attention_module, "target", lambda device: target)
    lengths = [70, 1, 130]

    def apart(q, k, v):
        wide = [torch.cat([x, torch.full_like(x, float("nan"))], 2)[..., : x.shape[2]] for x in (q, k, v)]
        return ours(lengths, True, window)(*wide)

    assert_near(apart, exact(lengths, True, window), qkv(201, 2, 1, 64), torch.bfloat16, scale=1.0)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_another_document_holds_does_not_come_in(target, bad, monkeypatch):
    monkeypatch.setattr(attention_module, "target", lambda device: target)
    q, k, v = (x.bfloat16().requires_grad_() for x in qkv(200, 2, 1, 64))
    spoilt = torch.where(torch.arange(200)[:, None, None] < 70, 0.0, bad).bfloat16()
    out = ours([70, 130], True, 0)(q, k + spoilt, v + spoilt)
    gradients = torch.autograd.grad(out[:70].float().sum(), (q, k, v))
    assert out[:70].isfinite().all()
    assert all(one[:70].isfinite().all() for one in gradients)


def test_a_window_may_be_wider_than_everything():
    q, k, v = (x.float().requires_grad_() for x in qkv(40, 2, 1, 16))
    made = []
    for window in (0, 2**31 - 1, 2**40):
        out = ours([10, 30], True, window)(q, k, v)
        made.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(one, other) for wide in made[1:] for one, other in zip(made[0], wide, strict=True))


def test_memory_that_tma_cannot_address():
    """Rows that begin between multiples of 16 bytes, and heads that are one and the same."""
    q, k, v = (x.bfloat16() for x in qkv(40, 2, 2, 64))
    memory = torch.zeros(q.numel() + 1, dtype=torch.bfloat16)
    apart = memory[1:].view_as(q)
    apart.copy_(q)
    same = k[:, :1].expand(-1, 2, -1)
    want = ours([40], True, 0)(q, same.contiguous(), v)
    assert torch.equal(ours([40], True, 0)(apart, same, v), want)


def test_the_logarithm_of_the_denominator_comes_too():
    q, k, v = (x.float() for x in qkv(9, 2, 1, 16))
    for one in (q, q.double()):
        _, lse = attention_and_lse(one, k.to(one.dtype), v.to(one.dtype), even(1, 9, q.device), False)
        scores = torch.einsum("qhd,khd->hqk", q.double(), k.repeat_interleave(2, 1).double()) / 4
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_the_same_input_has_the_same_bits():
    made = [x.bfloat16().requires_grad_() for x in qkv(201, 4, 2, 64)]
    runs = []
    for _ in range(2):
        out = ours([70, 1, 130], True, 0)(*made)
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), made)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_positions_further_apart_than_32_bits_count():
    """The last document of so many positions that its elements are beyond 2^31, in memory that is hardly touched."""
    total, length, d, stride = 600_000, 10, 16, 4096
    assert (total - length) * stride > 2**31
    near = [torch.randn(length, 1, d, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    memory = torch.from_numpy(np.empty(total * stride, np.float32))
    far = [memory.as_strided((total, 1, d), (stride, d, 1), d * n) for n in range(3)]
    far.append(torch.zeros(total, 1, d))
    for one, small in zip(far, near, strict=True):
        one[-length:] = small
    blocks, cu = torch.tensor([[total - length, length, 0]], dtype=torch.int32), torch.tensor([0, length])
    tables = (blocks, blocks, blocks, cu)
    o, lse = attention_forward(*far[:3], *tables, True, 0)
    want, want_lse = attention_forward(*(x.double() for x in near[:3]), *tables, True, 0)
    torch.testing.assert_close(o[-length:].double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[:, -length:].double(), want_lse, rtol=1e-5, atol=1e-5)

    q, k, v, do = far
    delta = torch.zeros(1, total)
    delta[:, -length:] = (near[3] * want.float()).sum(-1).T
    dq, dk, dv = (torch.zeros(total, 1, d) for _ in range(3))
    shared = (1 / math.sqrt(d) / math.log(2), total, None, *[x for one in (q, k, v) for x in one.stride()[:2]])
    options = switches(q, k, True, 0) | {"BM": 32, "BN": 32, "TMA": False}
    kernels.backward_keys[1, 1](q, k, v, do, lse, delta, dk, dv, blocks, *shared, **options)
    kernels.backward_queries[1, 1](q, k, v, do, lse, delta, dq, blocks, *shared, **options)
    exactly = attention_backward(*(x.double() for x in (near[3], *near[:3])), want, want_lse, *tables[1:], True, 0)
    for got, one in zip((dq, dk, dv), exactly, strict=True):
        torch.testing.assert_close(got[-length:].double(), one, rtol=1e-4, atol=1e-5)
        assert not got[:-length].any()
