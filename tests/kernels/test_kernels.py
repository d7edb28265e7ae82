"""Every operation against a plain float64 computation, values and gradients."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.kernels.attention import Packing, attention, even
from armillary.kernels.decode import decode_attention
from armillary.kernels.norm import rms_norm
from armillary.kernels.rope import rope, rope_table
from armillary.kernels.swiglu import swiglu


def plain_attention(q, k, v, causal):
    """One document: q [t, heads, d], k and v [t, groups, d]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def qkv(total, heads, groups, d, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(total, n, d, dtype=dtype, generator=generator, requires_grad=True) for n in (heads, groups, groups)
    ]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    d=st.sampled_from([2, 8, 16]),
)
@settings(max_examples=40, deadline=None)
def test_packed_attention_is_the_documents_one_by_one(lengths, heads, d):
    q, k, v = qkv(sum(lengths), *heads, d)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    out = attention(q, k, v, Packing(cu, sum(lengths)))
    expected = torch.cat([plain_attention(q[a:b], k[a:b], v[a:b], causal=True) for a, b in itertools.pairwise(cu)])
    torch.testing.assert_close(out, expected)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    for got, want in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("causal", [True, False])
def test_dense_attention(causal):
    q, k, v = qkv(21, 4, 2, 4)
    out = attention(q, k, v, even(3, 7, q.device), causal)
    for i in range(3):
        one = slice(7 * i, 7 * i + 7)
        torch.testing.assert_close(out[one], plain_attention(q[one], k[one], v[one], causal))


def test_decoding_sees_the_filled_part_of_its_cache_only():
    q, _, _ = qkv(3, 4, 2, 8)
    _, k, v = (x.view(3, 10, -1, 8) for x in qkv(30, 4, 2, 8, seed=1))
    lengths = torch.tensor([1, 10, 4])
    out = decode_attention(q, k, v, lengths)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(out[i : i + 1], plain_attention(q[i : i + 1], k[i, :n], v[i, :n], causal=False))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_near_float64(dtype, tolerance):
    q, k, v = (x.detach() for x in qkv(64, 4, 2, 32))
    packing = Packing(torch.tensor([0, 20, 64], dtype=torch.int32), 64)
    exact = attention(q, k, v, packing)
    low = attention(q.to(dtype), k.to(dtype), v.to(dtype), packing)
    assert low.dtype == dtype
    assert (low.double() - exact).norm() / exact.norm() < tolerance


def test_rms_norm():
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    expected = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-3) * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), expected)


def test_swiglu():
    x = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate, up = x[:, :5], x[:, 5:]
    torch.testing.assert_close(swiglu(x), gate / (1 + torch.exp(-gate)) * up)


def test_rope_turns_pairs_by_position_times_frequency():
    x = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 0, 1000, 100_000])
    turned = rope(x, *rope_table(positions, 8, 10_000.0))
    for t, position in enumerate(positions.tolist()):
        for i in range(4):
            angle = position * 10_000.0 ** (-i / 4)
            pair = torch.view_as_complex(torch.stack([x[t, :, i], x[t, :, i + 4]], -1).double())
            expected = pair * complex(math.cos(angle), math.sin(angle))
            assert torch.allclose(turned[t, :, i].double(), expected.real, atol=1e-5)
            assert torch.allclose(turned[t, :, i + 4].double(), expected.imag, atol=1e-5)


def test_rope_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(a, b):
        turned = [rope(x[None], *rope_table(torch.tensor([p]), 16, 10_000.0)) for x, p in ((q[0], a), (k[0], b))]
        return float((turned[0] * turned[1]).sum())

    assert score(5, 3) == pytest.approx(score(1005, 1003), abs=1e-4)
    assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-2)
