import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from armillary.kernels.cross_entropy import IGNORED, linear_cross_entropy
from tests.kernels.interpreted.near import assert_near


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    tokens=st.integers(1, 40), hidden=st.integers(1, 24), entries=st.integers(2, 90) | st.just(5000),
    z_loss=st.sampled_from([0.0, 1e-2]), smoothing=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@example(tokens=38, hidden=1, entries=2, z_loss=0.0, smoothing=0.0, seed=0, dtype=torch.bfloat16)  # nearly cancels
@settings(deadline=None, max_examples=30)
def test_any_sizes_are_near_float64(tokens, hidden, entries, z_loss, smoothing, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, entries, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.2] = IGNORED
    weights = torch.rand(tokens, generator=generator)

    def exact(x, w):
        logits = x @ w.T
        lse = logits.logsumexp(-1)
        target = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        losses = lse - (1 - smoothing) * target - smoothing * logits.mean(-1) + z_loss * lse**2
        return (losses * weights)[labels != IGNORED].sum()

    def ours(x, w):
        total, losses = linear_cross_entropy(x, w, labels, weights, z_loss, smoothing)
        assert not losses[labels == IGNORED].any()
        return total.to(dtype)

    tensors = [drawn(tokens, hidden), drawn(entries, hidden, seed=1) / hidden**0.5]
    # A weight's gradient is a sum over tokens of terms of about 1 / entries, which may cancel.
    assert_near(ours, exact, tensors, dtype, scale=0.2 / entries)
