import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.kernels import decode
from armillary.kernels.decode import decode_attention


@given(
    lengths=st.lists(st.integers(0, 600), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]), d=st.sampled_from([16, 64, 80]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_any_lengths_are_near_float64(lengths, heads, d, dtype):
    generator, n = torch.Generator().manual_seed(0), len(lengths)
    q = torch.randn(n, heads[0], d, generator=generator).to(dtype)
    k, v = (torch.randn(n, 600, heads[1], d, generator=generator).to(dtype) for _ in range(2))
    for i, length in enumerate(lengths):
        v[i, length:] = float("nan")
        k[i, length:] = float("nan")
    out = decode_attention(q, k, v, torch.tensor(lengths))
    for i, length in enumerate(lengths):
        wide = [x[i, :length].double().repeat_interleave(heads[0] // heads[1], 1) for x in (k, v)]
        scores = torch.einsum("hd,khd->hk", q[i].double(), wide[0]) / math.sqrt(d)
        want = torch.einsum("hk,khd->hd", scores.softmax(-1), wide[1])
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert (out[i].double() - want).norm() <= tolerance * want.norm()
        assert length or not out[i].any()


@pytest.mark.parametrize("processors", [1, 64])
def test_the_number_of_parts_changes_nothing(monkeypatch, processors):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 32, generator=generator), torch.randn(2, 2000, 2, 32, generator=generator)
    monkeypatch.setattr(decode, "processors", lambda device: processors)
    assert (decode.split(q, k)[0] == 1) == (processors == 1)
    lengths = torch.tensor([3, 1999])
    torch.testing.assert_close(decode_attention(q, k, k, lengths), decode._reference(q, k, k, lengths))
