"""The decoder's weights under the names and in the shapes of Hugging Face's Llama, and back.

Llama's layout holds it as it is: RMSNorm, rotary embedding of halves, grouped queries, SwiGLU, no biases. Only what
Megatron-core keeps together, queries with their keys and values, and gate with up, is taken apart. The image encoder
and the projector have no such layout: they keep their own names.
"""

from collections.abc import Iterator

import torch

from armillary.errors import CheckpointError
from armillary.model.config import ModelConfig

ARCHITECTURE = "LlamaForCausalLM"
PLAIN = {  # ours: theirs, of what is the same tensor
    "embedding.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
QKV, GATE_UP = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
QKV_PARTS = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")
GATE_UP_PARTS = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
MEANT = {  # keys of a Llama's configuration that must have these values, or not be there
    "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "pretraining_tp": 1,
}  # fmt: skip


def is_decoder(name: str) -> bool:
    """Whether a weight has a place in Llama's layout."""
    return name in PLAIN or name.startswith("decoder.")


def to_llama(config: ModelConfig, name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What a weight of the decoder is there: (name, tensor), one or several."""
    if name in PLAIN:
        yield PLAIN[name], weight
        return
    number, _, rest = name.removeprefix("decoder.layers.").partition(".")
    if rest in LAYER:
        yield f"model.layers.{number}.{LAYER[rest]}", weight
        return
    parts = _split_qkv(config, weight) if rest == QKV else weight.chunk(2)
    for part, tensor in zip(QKV_PARTS if rest == QKV else GATE_UP_PARTS, parts, strict=True):
        yield f"model.layers.{number}.{part}", tensor.contiguous()


def sources(name: str) -> list[str]:
    """Llama's names of what a weight of the decoder is made of."""
    if name in PLAIN:
        return [PLAIN[name]]
    number, _, rest = name.removeprefix("decoder.layers.").partition(".")
    parts = {QKV: QKV_PARTS, GATE_UP: GATE_UP_PARTS}.get(rest) or (LAYER[rest],)
    return [f"model.layers.{number}.{part}" for part in parts]


def from_llama(config: ModelConfig, name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    """A weight of the decoder from the tensors that `sources` names."""
    if name.endswith(QKV):
        return _join_qkv(config, *tensors)
    return torch.cat(tensors)


def llama_config(config: ModelConfig, length: int) -> dict:
    """config.json. length: positions of a row in training. CheckpointError where Llama's layout does not hold it."""
    if config.num_experts:
        raise CheckpointError(
            "Llama's layout has no experts",
            "model.num_experts",
            "export it with --format safetensors, in its own layout",
        )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "max_position_embeddings": length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        **MEANT,
    }


def model_config(llama: dict, image: dict, where: str) -> ModelConfig:
    """The `[model]` table of a Llama's config.json, its image part by `image`; CheckpointError where it is another kind
    of model, or a Llama with what ours has not."""
    wrong = [f"{key} = {llama[key]!r}" for key, value in MEANT.items() if llama.get(key, value) != value]
    rope = llama.get("rope_scaling") or llama.get("rope_parameters") or {}
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        wrong.append(f"rope_type = {kind!r}")
    if llama.get("architectures") != [ARCHITECTURE]:
        wrong = [f"architectures = {llama.get('architectures')!r}"]
    hidden, heads = llama.get("hidden_size", 0), llama.get("num_attention_heads", 1)
    if llama.get("head_dim") not in (None, hidden // heads):
        wrong.append(f"head_dim = {llama['head_dim']!r}")
    if wrong:
        raise CheckpointError(
            f"this model cannot be had here: {', '.join(wrong)}", where, f"import a {ARCHITECTURE} without these"
        )
    return ModelConfig.model_validate(image | {
        "depth": llama["num_hidden_layers"], "hidden_size": hidden, "num_heads": heads,
        "num_query_groups": llama.get("num_key_value_heads", heads), "ffn_hidden_size": llama["intermediate_size"],
        "vocab_size": llama["vocab_size"], "norm_eps": llama.get("rms_norm_eps", 1e-6),
        "rope_theta": llama.get("rope_theta", rope.get("rope_theta", 10000.0)),
        "tied_embeddings": llama.get("tie_word_embeddings", False),
    })  # fmt: skip


def _split_qkv(config: ModelConfig, weight: torch.Tensor) -> list[torch.Tensor]:
    """Of each group of queries, these, its key and its value lie behind each other."""
    groups, width = config.num_query_groups, config.head_dim
    queries = config.num_heads // groups * width
    by_group = weight.view(groups, queries + 2 * width, -1)
    return [part.reshape(-1, weight.shape[1]) for part in by_group.split([queries, width, width], 1)]


def _join_qkv(config: ModelConfig, *parts: torch.Tensor) -> torch.Tensor:
    groups = config.num_query_groups
    by_group = [part.view(groups, -1, part.shape[1]) for part in parts]
    return torch.cat(by_group, 1).reshape(-1, parts[0].shape[1])
