"""Which implementation of an operation runs: Triton's kernel, or the reference in plain PyTorch.

See `forced` for how to have references.
"""

import functools
import os
from dataclasses import dataclass

import torch
import triton

from armillary.kernels.forced import VARIABLE, forced

FORCED = forced(os.environ.get(VARIABLE, ""))
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
    """Whether the kernel of `operation` runs for x; ValueError where x is on another GPU than the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        here = torch.cuda.current_device()
        raise ValueError(
            f"{operation}: its tensors are on {x.device}, kernels start on the current device, cuda:{here}"
        )
    return choose(operation, x.is_cuda, x.dtype).implementation == "triton"


def processors(device: torch.device) -> int:
    """How many streaming multiprocessors a GPU has; 2 for the interpreter, so that tests see several programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def target(device: torch.device) -> str:
    """Of the GPUs that kernels are laid out for, the one that a GPU is nearest to; Hopper for what is no GPU."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")
