import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.kernels.rope import rope, rope_table
from armillary.kernels.swiglu import swiglu
from tests.kernels.interpreted.near import assert_near

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@given(shape=st.lists(st.integers(1, 5), max_size=2), n=st.integers(1, 1100), dtype=dtypes)
@settings(deadline=None, max_examples=30)
def test_swiglu(shape, n, dtype):
    def exact(x):
        gate, up = x[..., :n], x[..., n:]
        return gate / (1 + torch.exp(-gate)) * up

    assert_near(swiglu, exact, [drawn(*shape, 2 * n)], dtype)


@given(
    positions=st.lists(st.integers(0, 100_000), min_size=1, max_size=5), heads=st.integers(1, 9),
    half=st.integers(1, 70), dtype=dtypes,
)  # fmt: skip
@settings(deadline=None, max_examples=30)
def test_rope(positions, heads, half, dtype):
    cos, sin = rope_table(torch.tensor(positions), 2 * half, 10_000.0)

    def exact(x):
        pairs = torch.complex(x[..., :half], x[..., half:])
        angle = torch.tensor(positions).double()[:, None] * 10_000.0 ** (-torch.arange(half).double() / half)
        turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    assert_near(lambda x: rope(x, cos, sin), exact, [drawn(len(positions), heads, 2 * half)], dtype)


def test_rope_of_a_part_of_a_wider_tensor():
    whole = drawn(4, 6, 32).float()
    cos, sin = rope_table(torch.arange(4), 32, 100.0)
    assert torch.equal(rope(whole[:, 2:5], cos, sin), rope(whole[:, 2:5].contiguous(), cos, sin))
    assert math.isclose(float(rope(whole, cos, sin).norm()), float(whole.norm()), rel_tol=1e-6)
