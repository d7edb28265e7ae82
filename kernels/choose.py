"""Which implementation of an operation runs: Triton's kernel, or the reference in plain PyTorch.

ARMILLARY_KERNELS forces references: `reference` all of them, `reference:norm,rope` some.
"""

import os
from dataclasses import dataclass

import torch
import triton

from armillary.errors import JobError

OPERATIONS = ("attention", "cross_entropy", "norm", "rope", "swiglu")
VARIABLE = "ARMILLARY_KERNELS"
INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run on CPU, slowly, for tests
if INTERPRETED:
    from armillary.kernels.interpreter import install

    install()


@dataclass(frozen=True)
class Choice:
    """What runs, "triton" or "reference", and why; `forced`: somebody wanted it so."""

    implementation: str
    reason: str
    forced: bool = False


def forced(value: str) -> frozenset[str]:
    """The operations that a value of ARMILLARY_KERNELS forces to their references; JobError if it means nothing."""
    head, _, names = value.partition(":")
    chosen = frozenset(names.split(",")) if names else frozenset(OPERATIONS if head == "reference" else ())
    if (value and head != "reference") or not chosen <= set(OPERATIONS):
        raise JobError(
            f"{VARIABLE}={value} means nothing", "the environment",
            f"set it to reference, or to reference:NAME,NAME of {', '.join(OPERATIONS)}",
        )  # fmt: skip
    return chosen


FORCED = forced(os.environ.get(VARIABLE, ""))


def choose(operation: str, on_gpu: bool, dtype: torch.dtype) -> Choice:
    """For tensors of `dtype`, on a GPU or on CPU."""
    if operation in FORCED:
        return Choice("reference", f"{VARIABLE} forces it", forced=True)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return Choice("reference", f"the kernel computes in float32, not in {dtype}")
    if on_gpu:
        return Choice("triton", "the tensors are on a GPU")
    if INTERPRETED:
        return Choice("triton", "TRITON_INTERPRET=1 runs kernels on CPU")
    return Choice("reference", "the tensors are on CPU")


def runs_triton(operation: str, x: torch.Tensor) -> bool:
    """Whether the kernel of `operation` runs for x."""
    return choose(operation, x.is_cuda, x.dtype).implementation == "triton"


def processors(device: torch.device) -> int:
    """How many streaming multiprocessors a GPU has; 2 for the interpreter, so that tests see several programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
