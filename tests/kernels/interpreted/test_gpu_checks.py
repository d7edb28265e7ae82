"""What a GPU's results are compared with, tried on what the interpreter gives."""

import pytest
import torch

from armillary.kernels.swiglu import swiglu
from benchmarks.gpu.checks import Check, checked, checks


@pytest.mark.parametrize("name", ["rope 64", "decode 64", "adamw", "swiglu"])
def test_a_right_kernel_passes(name):
    (check,) = (one for one in checks() if one.name == name)
    rows = list(checked(check))
    assert rows
    assert not any(row["wrong"] for row in rows), rows


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        (lambda x: swiglu(x) * (1 if x.dtype == torch.float64 else 1.03), "too far from float64"),
        (lambda x: swiglu(x) + torch.rand(1) * 1e-7, "not the same bits twice"),
        (lambda x: swiglu(x[:, 1:]), "ValueError: swiglu: x must be of an even last axis"),
    ],
)
def test_a_wrong_one_is_found(operation, said):
    (row,) = checked(Check("wrong", operation, [(5, 64)], (torch.float32,)))
    assert row["wrong"].startswith(said)
