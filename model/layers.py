"""What Megatron-core's TransformerBlock is built from: its sharded linears, our norm, attention and SwiGLU."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from armillary.kernels.attention import Packing, attention, even
from armillary.kernels.decode import decode_attention
from armillary.kernels.norm import rms_norm
from armillary.kernels.rope import rope, rope_table
from armillary.kernels.swiglu import swiglu
from armillary.model.config import ModelConfig
from armillary.model.context import SharedAttention
from armillary.model.experts import Experts

Recompute = Literal["none", "selective", "full"]


class RMSNorm(torch.nn.Module):
    """kernels.norm.rms_norm as Megatron-core builds norms; its weight is replicated over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.eps, self.operation = eps, rms_norm
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each rank sees part of the positions: the gradient is summed over them.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        """The norm of x; with a residual that of their sum, and the sum."""
        return self.operation(x, self.weight, self.eps, residual)


class FeedForward(torch.nn.Module):
    """SwiGLU between two sharded linear layers: [s, b, hidden] -> the same."""

    def __init__(self, config: TransformerConfig, recompute: bool):
        super().__init__()
        self.recompute, self.operation = recompute, swiglu
        shared = dict(config=config, init_method=no_init, bias=False, skip_bias_add=False)
        self.linear_fc1 = ColumnParallelLinear(
            config.hidden_size, 2 * config.ffn_hidden_size, gather_output=False, stride=2, **shared
        )
        self.linear_fc2 = RowParallelLinear(
            config.ffn_hidden_size, config.hidden_size, input_is_parallel=True, **shared
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = self.linear_fc1(x)[0]
        return forgotten(self.operation, lambda y: self.linear_fc2(y)[0], self.recompute and self.training, gate_up)


def forgotten(cheap: Callable, linear: Callable, recompute: bool, *inputs: torch.Tensor) -> torch.Tensor:
    """linear(cheap(*inputs)); if `recompute`, what is cheap is not kept for the backward pass, but computed again."""
    if not recompute:
        return linear(cheap(*inputs))
    checkpoint = CheckpointWithoutOutput(fp8=None)
    result = linear(checkpoint.checkpoint(cheap, *inputs))
    checkpoint.discard_output_and_register_recompute(result)
    return result


@dataclass
class KVCache:
    """Rotated keys and values of every layer: [sequences, capacity, groups, d], `lengths` of them filled."""

    capacity: int
    lengths: torch.Tensor  # int64 [sequences]
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, places: torch.Tensor):
        """Write k, v [t, groups, d] to sequence rows[t] at places[t]; returns the layer's whole cache."""
        if layer not in self.layers:
            shape = (len(self.lengths), self.capacity, *k.shape[1:])
            self.layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        keys, values = self.layers[layer]
        keys[rows, places], values[rows, places] = k, v
        return keys, values


class PackedContext:
    """What attention must know of a packed batch, computed once and shared by all decoder layers.

    positions int64 [T], of this rank's positions under context parallelism; cu_seqlens int [documents + 1], of all.
    With a cache, keys and values of position t also go to sequence rows[t] of it. `decode`: every position is the one
    new token of its sequence.
    """

    qkv_format = "thd"  # Megatron-core then drops and restores the batch axis of 1 around attention

    def __init__(
        self,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        head_dim: int,
        theta: float,
        cache: KVCache | None = None,
        rows: torch.Tensor | None = None,
        decode: bool = False,
    ):
        self.cos, self.sin = rope_table(positions, head_dim, theta)
        ranks, group = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_group()
        self.shared = SharedAttention(cu_seqlens, ranks * len(positions), group) if ranks > 1 else None
        self.packing = None if decode or self.shared else Packing(cu_seqlens, len(positions))
        self.positions, self.cache, self.rows, self.decode = positions, cache, rows, decode


class CoreAttention(torch.nn.Module):
    """Attention after the projections: bidirectional on [s, images, heads, d], or causal on a PackedContext."""

    def __init__(self, config: TransformerConfig, layer_number: int, **_):
        super().__init__()
        self.layer_number, self.operation = layer_number, rope

    def forward(self, q, k, v, attention_mask, *, packed_seq_params: PackedContext | None = None, **_):
        if packed_seq_params is None:
            length, images = q.shape[:2]
            packing = even(images, length, q.device)
            out = attention(*(x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)), packing, causal=False)
            return out.unflatten(0, (images, length)).transpose(0, 1).flatten(2)
        context = packed_seq_params
        q, k = (self.operation(x, context.cos, context.sin) for x in (q, k))
        if context.cache is not None:
            keys, values = context.cache.append(self.layer_number, k, v, context.rows, context.positions)
            if context.decode:
                return decode_attention(q, keys, values, context.cache.lengths + 1)
        if context.shared is not None:
            return context.shared(q, k, v)
        return attention(q, k, v, context.packing)


class Layer(TransformerLayer):
    """Megatron-core's attention and our feed-forward; the second norm takes the sum before it along in one kernel.

    `recompute`: what the backward pass computes again: nothing, norms and SwiGLU (after Korthikanti et al. 2022,
    section 5), or all of it. There is no dropout, and so no random state to go back to.
    """

    def __init__(self, config: TransformerConfig, *args, recompute: Recompute, experts: ModelConfig | None, **options):
        super().__init__(config, *args, **options)
        self.recompute = recompute
        self.mlp = Experts(config, experts) if experts else FeedForward(config, recompute == "selective")

    def forward(self, hidden_states, attention_mask=None, *, packed_seq_params: PackedContext | None = None, **_):
        if self.recompute == "full" and self.training:
            run = self._run
            return torch_checkpoint(
                run, hidden_states, packed_seq_params, use_reentrant=False, preserve_rng_state=False
            ), None
        return self._run(hidden_states, packed_seq_params), None

    def _run(self, hidden: torch.Tensor, context: PackedContext | None) -> torch.Tensor:
        def attend(normed):
            return self.self_attention(normed, attention_mask=None, packed_seq_params=context)[0]

        if self.recompute != "selective" or not self.training:
            normed, hidden = self.pre_mlp_layernorm(attend(self.input_layernorm(hidden)), hidden)
            return hidden + self.mlp(normed)
        hidden = hidden + forgotten(self.input_layernorm, attend, True, hidden)
        return hidden + forgotten(self.pre_mlp_layernorm, self.mlp, True, hidden)


def compile_operations(model: torch.nn.Module) -> None:
    """Have torch.compile make the norms, SwiGLUs and rotations of a model. Products, with their collectives, stay
    Megatron-core's: with whole layers compiled, tensor-parallel ranks were seen to wait for each other for ever."""
    for module in model.modules():
        if isinstance(module, RMSNorm | FeedForward | CoreAttention):
            module.operation = torch.compile(module.operation, dynamic=True)


def block_spec(
    config: TransformerConfig,
    causal: bool,
    recompute: Recompute = "none",
    experts: ModelConfig | None = None,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of its part `vp_stage`: pre-norm attention and SwiGLU, or the experts of a
    model; RMSNorm at the end."""
    layer = ModuleSpec(
        module=Layer,
        params={"recompute": recompute, "experts": experts},
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=CoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            pre_mlp_layernorm=RMSNorm,
        ),
    )
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


def transformer_config(
    *,
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    ffn: int,
    eps: float,
    dtype: torch.dtype,
    **parallel,
) -> TransformerConfig:
    """Megatron-core's view of one transformer; weights are initialised by `coordinates.initialize`. `parallel`: what it
    is told of the layout."""
    return TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        layernorm_epsilon=eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        init_method=no_init,
        output_layer_init_method=no_init,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **parallel,
    )


def no_init(weight: torch.Tensor) -> None:
    """Leaves a new weight alone: `coordinates.initialize` fills all of them, alike under every layout."""
