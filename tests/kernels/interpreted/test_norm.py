import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from armillary.kernels.norm import WIDEST, layer_norm, norm_backward, rms_norm
from tests.kernels.interpreted.near import assert_near

EPS = 1e-5
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def exact(layer, zero_centred, dtype):
    """`dtype`: to which x + residual is rounded before it is normalised, which a mean near to every number makes much
    of; its gradient passes as if it were not."""

    def norm(x, weight, bias, residual):
        s = x if residual is None else x + residual
        s = s + (s.to(dtype).double() - s).detach()
        away = s - s.mean(-1, keepdim=True) if layer else s
        y = away / (away.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight + zero_centred)
        y = y if bias is None else y + bias
        return y if residual is None else (y, s)

    return norm


def ours(layer, zero_centred):
    def norm(x, weight, bias, residual):
        if layer:
            return layer_norm(x, weight, bias, EPS, residual, zero_centred)
        return rms_norm(x, weight, EPS, residual, zero_centred)

    return norm


def tensors(shape, bias, residual, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, shape[-1:], shape[-1:], shape)
    ]
    return [made[0] * 2 + 0.5, made[1], made[2] if bias else None, made[3] if residual else None]


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(3, 300)),
    layer=st.booleans(), bias=st.booleans(), residual=st.booleans(), zero_centred=st.booleans(), dtype=dtypes,
)  # fmt: skip
@example(shape=(2, 6, 3), layer=True, bias=False, residual=True, zero_centred=False, dtype=torch.bfloat16)
@settings(deadline=None, max_examples=60)
def test_rows_of_any_length_are_near_float64(shape, layer, bias, residual, zero_centred, dtype):
    made = tensors(shape, layer and bias, residual)
    assert_near(ours(layer, zero_centred), exact(layer, zero_centred, dtype), made, dtype)


def test_a_row_of_one_number():
    """Its gradient is what rounding leaves of a difference, and is not compared."""
    x, weight = torch.tensor([[3.0], [-0.5]]), torch.tensor([2.0])
    torch.testing.assert_close(rms_norm(x, weight, EPS), torch.tensor([[2.0], [-2.0]]), rtol=1e-4, atol=0)
    assert not layer_norm(x, weight, None, EPS).any()


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_no_program_holds_at_once(layer, dtype):
    assert_near(ours(layer, True), exact(layer, True, dtype), tensors((3, WIDEST + 77), layer, True), dtype)


@pytest.mark.parametrize("n", [500, WIDEST + 5])
def test_a_mean_far_from_nothing_costs_what_rounding_does(n):
    """A variance from the mean of squares would be a hundred times as far off."""
    x = tensors((4, n), True, False)
    x[0] += 300
    assert_near(ours(True, False), exact(True, False, torch.float32), x, torch.float32, tolerance=1e-4)


def test_the_same_input_gives_the_same_bits():
    x, weight, *_ = (one if one is None else one.float() for one in tensors((37, 200), False, False))
    rstd = torch.ones(37)
    first, second = (norm_backward(x, None, x, weight, rstd[:0], rstd, True, False, False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_lies_apart_in_memory_counts_as_it_is():
    made = tensors((8, 6), True, True)
    x, weight, bias, residual = (one.float() for one in made)
    apart = [torch.stack([one, torch.full_like(one, 1e9)], -1)[..., 0] for one in (x.T, weight, bias, residual)]
    found = layer_norm(apart[0].T, *apart[1:3], EPS, apart[3])
    torch.testing.assert_close(found, layer_norm(x, weight, bias, EPS, residual))


def test_a_result_that_is_not_used_has_no_gradient_to_give():
    x, weight, _, residual = tensors((5, 7), False, True)
    for used in (0, 1):
        grads = []
        for dtype in (torch.float32, torch.float64):
            given = [one.to(dtype).requires_grad_() for one in (x, weight, residual)]
            found = rms_norm(*given[:2], EPS, given[2])[used]
            grads.append(torch.autograd.grad(found.square().sum(), given, allow_unused=True))
        for got, want in zip(*grads, strict=True):
            want = torch.zeros_like(got, dtype=torch.float64) if want is None else want
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
