import pytest
import torch

from armillary.errors import JobError
from armillary.kernels import choose as chosen
from armillary.kernels.choose import choose
from armillary.kernels.forced import OPERATIONS, forced


def test_a_gpu_has_the_kernels_and_the_processor_the_references(monkeypatch):
    monkeypatch.setattr(chosen, "FORCED", frozenset())
    assert choose("norm", True, torch.bfloat16).implementation == "triton"
    assert choose("norm", False, torch.bfloat16).implementation == "reference"
    assert choose("norm", True, torch.float64).implementation == "reference", "kernels compute in float32"


def test_references_are_forced_by_name():
    assert forced("") == frozenset()
    assert forced("reference") == set(OPERATIONS)
    assert forced("reference:norm,rope") == {"norm", "rope"}
    for wrong in ("triton", "reference:normal", "ref", "reference,norm"):
        with pytest.raises(JobError, match="means nothing"):
            forced(wrong)


def test_what_is_forced_is_said(monkeypatch):
    monkeypatch.setattr(chosen, "FORCED", forced("reference:norm"))
    assert "forces it" in choose("norm", True, torch.bfloat16).reason
    assert choose("rope", True, torch.bfloat16).implementation == "triton"
