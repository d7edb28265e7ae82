"""The same image+text transformer in plain PyTorch: one process, one document at a time. The tests' yardstick.

Parameter names are those of the sharded model in global coordinates, so weights are compared one to one.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, positions, theta):
    """x [t, heads, d]: rotary embedding over the two halves of d (Su et al. 2021, section 3.4)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions[:, None].double() * frequency
    cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Reference(nn.Module):
    """config: ModelConfig; state: {global name: tensor} as the checkpoint names them."""

    def __init__(self, config, state):
        super().__init__()
        self.config = config
        self.names = list(state)
        self.weights = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(t.clone()) for name, t in state.items()})

    def w(self, name):
        return self.weights[name.replace(".", "/")]

    def state(self):
        return {name: self.w(name) for name in self.names}

    def block(self, x, prefix, heads, groups, causal, theta):
        """One pre-norm transformer layer on x [t, hidden]; keys and values of `groups` heads are shared."""
        eps = self.config.norm_eps
        d = x.shape[-1] // heads
        y = rms_norm(x, self.w(f"{prefix}.input_layernorm.weight"), eps)
        qkv = (y @ self.w(f"{prefix}.self_attention.linear_qkv.weight").T).view(len(x), groups, heads // groups + 2, d)
        q = qkv[:, :, :-2].reshape(len(x), heads, d)
        k, v = qkv[:, :, -2], qkv[:, :, -1]
        if theta:
            positions = torch.arange(len(x))
            q, k = rotate(q, positions, theta), rotate(k, positions, theta)
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(d)
        if causal:
            scores = scores.masked_fill(torch.ones(len(x), len(x), dtype=torch.bool).triu(1), -math.inf)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(x), heads * d)
        x = x + out @ self.w(f"{prefix}.self_attention.linear_proj.weight").T
        y = rms_norm(x, self.w(f"{prefix}.pre_mlp_layernorm.weight"), eps)
        gate, up = (y @ self.w(f"{prefix}.mlp.linear_fc1.weight").T).chunk(2, -1)
        return x + (F.silu(gate) * up) @ self.w(f"{prefix}.mlp.linear_fc2.weight").T

    def encode_image(self, patches):
        """patches [n, patch_dim] of pixels 0 to 255 -> decoder inputs [n / merge^2, hidden]."""
        c = self.config
        pixels = (patches.to(self.w("output.weight").dtype) / 255 - c.image_mean) / c.image_std
        x = pixels @ self.w("vision.patch_embedding.weight").T + self.w("vision.position_embedding")
        for i in range(c.vision_layers):
            x = self.block(x, f"vision.encoder.layers.{i}", c.vision_num_heads, c.vision_num_heads, False, None)
        x = rms_norm(x, self.w("vision.encoder.final_layernorm.weight"), c.norm_eps)
        x = x.reshape(-1, c.patch_merge**2 * x.shape[-1])
        x = F.gelu(x @ self.w("projector.linear_in.weight").T)
        return x @ self.w("projector.linear_out.weight").T

    def document(self, tokens, images, starts):
        """Logits [t, vocab] of one document: tokens [t], images [i, n, patch_dim], starts [i]."""
        c = self.config
        x = self.w("embedding.weight")[tokens].clone()
        for image, start in zip(images, starts, strict=True):
            features = self.encode_image(image)
            x[start : start + len(features)] = features
        for i in range(c.depth):
            x = self.block(x, f"decoder.layers.{i}", c.num_heads, c.num_query_groups, True, c.rope_theta)
        x = rms_norm(x, self.w("decoder.final_layernorm.weight"), c.norm_eps)
        return x @ self.w("output.weight").T

    def loss(self, batch, learned_tokens):
        """Summed cross entropy of a PackedBatch's learned labels / learned_tokens, piece by piece."""
        dtype = self.w("output.weight").dtype
        total = 0.0
        for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            mask = torch.tensor(batch.loss_mask_T[start:stop], dtype=dtype)
            if not mask.any():
                continue
            inside = [i for i, at in enumerate(batch.image_starts_I) if start <= at < stop]
            logits = self.document(
                torch.from_numpy(batch.tokens_T[start:stop]).long(),
                torch.from_numpy(batch.patches_IND[inside]),
                [int(batch.image_starts_I[i] - start) for i in inside],
            )
            labels = torch.from_numpy(batch.labels_T[start:stop]).long()
            total = total + (F.cross_entropy(logits, labels, reduction="none") * mask).sum()
        return total / learned_tokens
