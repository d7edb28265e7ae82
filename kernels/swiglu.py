"""SwiGLU (Shazeer 2020, equation 6)."""

import torch
import torch.nn.functional as F


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x [..., 2n] = [gate, up]; result [..., n]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
