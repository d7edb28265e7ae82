"""Kernels run on CPU by Triton's interpreter, in a process of their own: Triton decides for it when it is imported.

TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted
"""

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if not INTERPRETED and Path(__file__).parent in item.path.parents:
            item.add_marker(
                pytest.mark.skip(reason="TRITON_INTERPRET=1 is not set; `make test` runs these by themselves")
            )


@pytest.fixture(autouse=True, scope="session")
def _poisoned():
    """Memory that a kernel is to fill holds NaN before it."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(place, name, poisoned(getattr(place, name)))
        yield
