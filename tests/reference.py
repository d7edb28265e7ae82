"""The same image+text transformer in plain PyTorch, in one process. The tests' yardstick.

Parameter names are those of the sharded model in global coordinates, so weights are compared one to one.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def swiglu(x, fc1, fc2):
    gate, up = (x @ fc1.T).chunk(2, -1)
    return (F.silu(gate) * up) @ fc2.T


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

    def attend(self, x, prefix, heads, groups, causal, theta):
        """x [t, hidden] and what attention adds to it; keys and values of `groups` heads are shared."""
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
        return x + out @ self.w(f"{prefix}.self_attention.linear_proj.weight").T

    def feed(self, x, prefix):
        """x [t, hidden] and what SwiGLU, or a layer of experts, adds to it; and the router's own losses."""
        y = rms_norm(x, self.w(f"{prefix}.pre_mlp_layernorm.weight"), self.config.norm_eps)
        if f"{prefix}.mlp.router" in self.names:
            out, losses = self.experts(y, prefix)
            return x + out, losses
        return x + swiglu(y, self.w(f"{prefix}.mlp.linear_fc1.weight"), self.w(f"{prefix}.mlp.linear_fc2.weight")), 0.0

    def experts(self, y, prefix):
        """One expert after the other on the tokens that choose it; one that is full takes those of largest weight."""
        c = self.config
        logits = y @ self.w(f"{prefix}.mlp.router").T
        p = logits.softmax(-1)
        chosen = p.argsort(-1, descending=True)[:, : c.experts_per_token]
        weight = p.gather(1, chosen)
        if c.experts_per_token > 1:
            weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(y)
        for e in range(c.num_experts):
            tokens, choice = (chosen == e).nonzero(as_tuple=True)
            if c.capacity_factor:
                room = math.ceil(c.capacity_factor * chosen.numel() / c.num_experts)
                best = weight[tokens, choice].argsort(descending=True, stable=True)[:room]
                tokens, choice = tokens[best], choice[best]
            fc1, fc2 = (self.w(f"{prefix}.mlp.linear_{name}")[e] for name in ("fc1", "fc2"))
            out = out.index_add(0, tokens, swiglu(y[tokens], fc1, fc2) * weight[tokens, choice, None])
        share = torch.bincount(chosen.flatten(), minlength=c.num_experts) / chosen.numel()
        balance = c.num_experts * (share * p.mean(0)).sum()
        return out, c.balance_loss * balance + c.router_z_loss * logits.logsumexp(-1).square().mean()

    def encode_image(self, patches):
        """patches [n, patch_dim] of pixels 0 to 255 -> decoder inputs [n / merge^2, hidden]."""
        c = self.config
        pixels = (patches.to(self.w("embedding.weight").dtype) / 255 - c.image_mean) / c.image_std
        x = pixels @ self.w("vision.patch_embedding.weight").T + self.w("vision.position_embedding")
        for i in range(c.vision_layers):
            prefix = f"vision.encoder.layers.{i}"
            x, _ = self.feed(self.attend(x, prefix, c.vision_num_heads, c.vision_num_heads, False, None), prefix)
        x = rms_norm(x, self.w("vision.encoder.final_layernorm.weight"), c.norm_eps)
        x = x.reshape(-1, c.patch_merge**2 * x.shape[-1])
        x = F.gelu(x @ self.w("projector.linear_in.weight").T)
        return x @ self.w("projector.linear_out.weight").T

    def batch(self, batch):
        """Logits [T, vocab] of a PackedBatch, each document by itself but for experts; and the routers' own losses."""
        c = self.config
        x = self.w("embedding.weight")[torch.from_numpy(batch.tokens_T).long()].clone()
        for image, start in zip(batch.patches_IND, batch.image_starts_I, strict=True):
            features = self.encode_image(torch.from_numpy(image))
            x[start : start + len(features)] = features
        lengths, losses = list(map(int, batch.cu_seqlens[1:] - batch.cu_seqlens[:-1])), 0.0
        for i in range(c.depth):
            prefix, shape = f"decoder.layers.{i}", (c.num_heads, c.num_query_groups, True, c.rope_theta)
            x = torch.cat([self.attend(piece, f"decoder.layers.{i}", *shape) for piece in x.split(lengths)])
            x, more = self.feed(x, prefix)
            losses = losses + more
        x = rms_norm(x, self.w("decoder.final_layernorm.weight"), c.norm_eps)
        return x @ self.w("embedding.weight" if c.tied_embeddings else "output.weight").T, losses

    def loss(self, batches, learned_tokens):
        """Summed cross entropy of PackedBatches' learned labels / learned_tokens; and the mean of routers' losses."""
        total, own = 0.0, 0.0
        for batch in batches:
            logits, losses = self.batch(batch)
            each = F.cross_entropy(logits, torch.from_numpy(batch.labels_T).long(), reduction="none")
            total = total + (each * torch.tensor(batch.loss_mask_T, dtype=each.dtype)).sum()
            own = own + losses
        return total / learned_tokens, own / len(batches)
