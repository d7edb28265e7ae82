"""What Megatron-core's TransformerBlock is built from: its sharded linears, our norm, attention and SwiGLU."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from armillary.kernels.attention import Packing, attention, even
from armillary.kernels.decode import decode_attention
from armillary.kernels.norm import rms_norm
from armillary.kernels.rope import rope, rope_table
from armillary.kernels.swiglu import swiglu


class RMSNorm(torch.nn.Module):
    """kernels.norm.rms_norm as Megatron-core builds norms; its weight is replicated over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each rank sees part of the positions: the gradient is summed over them.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        """The norm of x; with a residual that of their sum, and the sum."""
        return rms_norm(x, self.weight, self.eps, residual)


class SwiGLU(torch.nn.Module):
    """kernels.swiglu as Megatron-core builds activations."""

    def __init__(self, config: TransformerConfig):
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu(x)


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

    positions int64 [T]; cu_seqlens int [documents + 1]. With a cache, keys and values of position t also go to
    sequence rows[t] of it. `decode`: every position is the one new token of its sequence.
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
        self.packing = None if decode else Packing(cu_seqlens, len(positions))
        self.positions, self.cache, self.rows, self.decode = positions, cache, rows, decode


class CoreAttention(torch.nn.Module):
    """Attention after the projections: bidirectional on [s, images, heads, d], or causal on a PackedContext."""

    def __init__(self, config: TransformerConfig, layer_number: int, **_):
        super().__init__()
        self.layer_number = layer_number

    def forward(self, q, k, v, attention_mask, *, packed_seq_params: PackedContext | None = None, **_):
        if packed_seq_params is None:
            length, images = q.shape[:2]
            packing = even(images, length, q.device)
            out = attention(*(x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)), packing, causal=False)
            return out.unflatten(0, (images, length)).transpose(0, 1).flatten(2)
        context = packed_seq_params
        q, k = rope(q, context.cos, context.sin), rope(k, context.cos, context.sin)
        if context.cache is not None:
            keys, values = context.cache.append(self.layer_number, k, v, context.rows, context.positions)
            if context.decode:
                return decode_attention(q, keys, values, context.cache.lengths + 1)
        return attention(q, k, v, context.packing)


class Layer(TransformerLayer):
    """Megatron-core's modules, of which the second norm takes the sum before it along in one kernel. No dropout."""

    def forward(self, hidden_states, attention_mask=None, *, packed_seq_params: PackedContext | None = None, **_):
        attended, _ = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask=attention_mask, packed_seq_params=packed_seq_params
        )
        normed, hidden_states = self.pre_mlp_layernorm(attended, hidden_states)
        return hidden_states + self.mlp(normed)[0], None


def block_spec(config: TransformerConfig, causal: bool) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage: pre-norm attention and SwiGLU, RMSNorm at the end."""
    layer = ModuleSpec(
        module=Layer,
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
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=SwiGLU
                ),
            ),
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def transformer_config(
    *,
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    ffn: int,
    eps: float,
    tensor: int,
    pipeline: int,
    sequence_parallel: bool,
    dtype: torch.dtype,
) -> TransformerConfig:
    """Megatron-core's view of one transformer; weights are initialised by `coordinates.initialize`."""
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
        use_te_activation_func=True,  # means here: build the spec's activation module, our SwiGLU
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=sequence_parallel,
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
    )


def no_init(weight: torch.Tensor) -> None:
    """Leaves a new weight alone: `coordinates.initialize` fills all of them, alike under every layout."""
