import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.kernels.adamw import AdamW, adamw

OPTIONS = dict(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def drawn(sizes, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def doubles(tensors):
    return [one.double() for one in tensors]


@given(
    sizes=st.lists(st.integers(0, 50) | st.sampled_from([1023, 1024, 5000]), min_size=1, max_size=5),
    gradient=st.sampled_from([torch.float32, torch.bfloat16]), step=st.integers(1, 1000), copied=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_any_tensors_are_near_float64(sizes, gradient, step, copied):
    weights, gradients = drawn(sizes, 0), drawn(sizes, 1, gradient)
    first, second = drawn(sizes, 2), [one.square() for one in drawn(sizes, 3)]
    copies = [torch.full((size,), float("nan"), dtype=torch.bfloat16) for size in sizes] if copied else []
    exact = [doubles(one) for one in (weights, gradients, first, second)]
    adamw(weights, gradients, first, second, copies, step, **OPTIONS)
    adamw(*exact, [], step, **OPTIONS)
    for got, want in zip((weights, first, second), (exact[0], exact[2], exact[3]), strict=True):
        torch.testing.assert_close(doubles(got), want, rtol=1e-5, atol=1e-6)
    for copy, weight in zip(copies, weights, strict=False):
        assert torch.equal(copy, weight.bfloat16())


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_rounding_by_chance_is_to_a_neighbour_and_without_a_bias(kept):
    """A step too small for bfloat16 to see: to the nearest it is lost, by chance it is there on the mean."""
    n, change = 20_000, 2.0**-11
    options = OPTIONS | {"learning_rate": change, "weight_decay": 0.0, "eps": 1e-30}

    def stepped(seed):
        weights = [torch.ones(n, dtype=kept)]
        copies = [torch.empty(n, dtype=torch.bfloat16)] if kept == torch.float32 else []
        gradients, moments = [torch.full((n,), -1.0)], ([torch.zeros(n)], [torch.zeros(n)])
        adamw(weights, gradients, *moments, copies, 1, **options, seed=seed)
        return (copies or weights)[0].double()

    assert torch.equal(stepped(None), torch.ones(n).double())
    found = stepped(1)
    assert set(found.tolist()) == {1.0, 1.0 + 2.0**-7}
    assert (found - 1).mean().item() == pytest.approx(change, rel=0.15)
    assert torch.equal(found, stepped(1)), "a seed has one result"
    assert not torch.equal(found, stepped(2))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1])
def test_what_is_no_number_stays_none_by_chance(bits):
    """A GPU's own has all bits set, so that what is added to them would make a number of it."""
    weight = torch.full((3000,), bits, dtype=torch.int32).view(torch.float32)
    for exactly in (torch.float32, torch.float64):
        copy, zeros = torch.zeros(3000, dtype=torch.bfloat16), torch.zeros(3000, dtype=exactly)
        tensors = ([one.clone()] for one in (weight.to(exactly), zeros, zeros, zeros))
        adamw(*tensors, [copy], 1, **OPTIONS, seed=1)
        assert copy.isnan().all()


def test_the_optimizer_steps_as_that_of_pytorch_does():
    start, gradients = drawn([7, 2049, 3], 0), [drawn([7, 2049, 3], seed) for seed in range(1, 5)]
    ended = []
    for kind in (AdamW, torch.optim.AdamW):
        parameters = [torch.nn.Parameter(one.clone()) for one in start]
        groups = [{"params": parameters[:2], "weight_decay": 0.3}, {"params": parameters[2:], "lr": 0.5}]
        optimizer = kind(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
        for number, step in enumerate(gradients):
            for parameter, one in zip(parameters, step, strict=True):
                parameter.grad = None if number == 1 and one is step[0] else one.clone()
            optimizer.step()
        ended.append(parameters)
        state = optimizer.state_dict()["state"]
        ended.append([state[k][name] for k in range(3) for name in ("step", "exp_avg", "exp_avg_sq")])
    for ours, theirs in zip(ended[:2], ended[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
