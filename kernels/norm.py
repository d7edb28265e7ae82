"""Root-mean-square normalisation (Zhang and Sennrich 2019, equation 4)."""

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; x [..., n], weight [n], result like x."""
    return F.rms_norm(x, weight.shape, weight, eps)
