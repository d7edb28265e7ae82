"""The same model as one writes it in plain PyTorch for one device: what one rank's speed is measured against.

It shares no code with armillary: `nn.Linear`, `F.rms_norm`, `F.scaled_dot_product_attention` on each packed document,
`F.cross_entropy` over whole logits, fused AdamW. The tests' reference (tests/reference.py) is written to be right; this
is written to be fast.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from armillary.model.config import ModelConfig
from armillary.training.config import OptimizerConfig
from armillary.training.delivery import DeviceBatch


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, groups: int):
        super().__init__()
        self.heads, self.groups, self.d = heads, groups, hidden // heads
        self.qkv = nn.Linear(hidden, (heads + 2 * groups) * self.d, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x, attend, table):
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.d)).split((self.heads, self.groups, self.groups), -2)
        if table is not None:
            q, k = rotate(q, *table), rotate(k, *table)
        return self.out(attend(q, k, v).flatten(-2))


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, groups: int, ffn: int, eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps), nn.RMSNorm(hidden, eps)
        self.attention = Attention(hidden, heads, groups)
        self.up, self.down = nn.Linear(hidden, 2 * ffn, bias=False), nn.Linear(ffn, hidden, bias=False)

    def forward(self, x, attend, table=None):
        x = x + self.attention(self.norm1(x), attend, table)
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def each_document(q, k, v, lengths: list[int]):
    """Causal attention in each of the documents that lie behind each other: q [T, heads, d], k and v [T, groups, d]."""
    grouped = q.shape[1] != k.shape[1]
    parts = (
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in qkv), is_causal=True, enable_gqa=grouped)
        for qkv in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    )
    return torch.cat([part.transpose(0, 1) for part in parts])


def whole_image(q, k, v):
    """Attention among all patches: [images, patches, heads, d]."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def summed_loss(x, weight, labels, mask):
    return (F.cross_entropy(F.linear(x, weight), labels, reduction="none") * mask).sum()


class Plain(nn.Module):
    """Image encoder, projector and decoder of the dimensions in `config`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, self.config = config, config
        vision = (c.vision_hidden_size, c.vision_num_heads, c.vision_num_heads, c.vision_ffn_hidden_size, c.norm_eps)
        self.patches = nn.Linear(c.patch_dim, c.vision_hidden_size, bias=False)
        self.places = nn.Parameter(torch.empty(c.num_patches, c.vision_hidden_size))
        self.vision = nn.ModuleList(Layer(*vision) for _ in range(c.vision_layers))
        self.vision_norm = nn.RMSNorm(c.vision_hidden_size, c.norm_eps)
        self.project = nn.Sequential(
            nn.Linear(c.vision_hidden_size * c.patch_merge**2, c.hidden_size, bias=False),
            nn.GELU(),
            nn.Linear(c.hidden_size, c.hidden_size, bias=False),
        )
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        text = (c.hidden_size, c.num_heads, c.num_query_groups, c.ffn_hidden_size, c.norm_eps)
        self.layers = nn.ModuleList(Layer(*text) for _ in range(c.depth))
        self.norm = nn.RMSNorm(c.hidden_size, c.norm_eps)
        self.output, self.loss = nn.Linear(c.hidden_size, c.vocab_size, bias=False), summed_loss
        half = c.head_dim // 2
        self.register_buffer("frequency", c.rope_theta ** (-torch.arange(half) / half))

    def compile_layers(self) -> None:
        """torch.compile, a layer at a time, and the loss with its product."""
        for layer in (*self.vision, *self.layers):
            layer.compile()
        self.loss = torch.compile(summed_loss)

    def forward(self, batch: DeviceBatch, scale: float) -> torch.Tensor:
        """scale * the sum of the learned labels' cross entropy."""
        c, inputs = self.config, batch.inputs
        x = self.embedding(inputs.tokens_T)
        if len(inputs.patches_IND):
            pixels = (inputs.patches_IND.float() / 255 - c.image_mean) / c.image_std
            features = self.patches(pixels) + self.places
            for layer in self.vision:
                features = layer(features, whole_image)
            features = self.project(self.vision_norm(features).reshape(len(features), c.image_positions, -1))
            places = inputs.image_starts_I[:, None] + torch.arange(c.image_positions)
            x = x.index_copy(0, places.flatten(), features.flatten(0, 1))
        angle = (inputs.positions_T[:, None] * self.frequency)[:, None]
        table, lengths = (angle.cos(), angle.sin()), inputs.cu_seqlens.diff().tolist()

        @torch.compiler.disable  # a loop over however many documents there are
        def attend(q, k, v):
            return each_document(q, k, v, lengths)

        for layer in self.layers:
            x = layer(x, attend, table)
        return self.loss(self.norm(x), self.output.weight, batch.labels_T, batch.loss_mask_T) * scale

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take over weights, by their global names in checkpoints."""
        for name, own in self.named_parameters():
            own.copy_(self._of(name, state).view_as(own))

    def _of(self, name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
        named = {
            "patches.weight": "vision.patch_embedding.weight",
            "places": "vision.position_embedding",
            "vision_norm.weight": "vision.encoder.final_layernorm.weight",
            "project.0.weight": "projector.linear_in.weight",
            "project.2.weight": "projector.linear_out.weight",
            "norm.weight": "decoder.final_layernorm.weight",
        }
        of_layers = {
            "norm1": "input_layernorm",
            "norm2": "pre_mlp_layernorm",
            "attention.qkv": "self_attention.linear_qkv",
            "attention.out": "self_attention.linear_proj",
            "up": "mlp.linear_fc1",
            "down": "mlp.linear_fc2",
        }
        block, number, part = (*name.split(".", 2), "", "")[:3]
        if part:
            stem = {"vision": "vision.encoder", "layers": "decoder"}.get(block)
            if stem:
                part = of_layers[part.removesuffix(".weight")]
                found = state[f"{stem}.layers.{number}.{part}.weight"]
                return self._by_kind(found, block) if part.endswith("qkv") else found
        return state[named.get(name, name)]

    def _by_kind(self, qkv: torch.Tensor, block: str) -> torch.Tensor:
        """Rows of all queries, then of all keys and values, instead of group by group."""
        attention = self.vision[0].attention if block == "vision" else self.layers[0].attention
        groups, d = attention.groups, attention.d
        q, k, v = qkv.unflatten(0, (groups, -1, d)).split((attention.heads // groups, 1, 1), 1)
        return torch.cat([x.flatten(0, 2) for x in (q, k, v)])


class PlainTrainer:
    """Forward, backward, clip and AdamW on micro-batches."""

    def __init__(self, model: Plain, config: OptimizerConfig):
        self.model, self.config = model, config
        groups = [
            {"params": [p for p in model.parameters() if (p.ndim > 1) is matrices], "weight_decay": decay}
            for matrices, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)

    def step(self, batches: Iterator[DeviceBatch], weight: float, learning_rate: float) -> float:
        """Take a step; the mean loss of the labels, whose weights add up to `weight`."""
        total = 0.0
        for batch in batches:
            loss = self.model(batch, 1 / weight)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        assert math.isfinite(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total
