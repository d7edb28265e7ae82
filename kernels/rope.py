"""Rotary position embedding over the two halves of a head (Su et al. 2021, section 3.4.2)."""

import torch


def rope_table(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for positions [t]: float32 [t, 1, head_dim / 2] each, angles computed in float64."""
    half = head_dim // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angle = (positions[:, None].double() * frequency)[:, None]
    return angle.cos().float(), angle.sin().float()


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [t, heads, head_dim] by a `rope_table`; same shape and dtype."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
