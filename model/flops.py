"""Floating-point operations and parameters of the image+text transformer, from its dimensions alone.

A product of matrices [m, k] x [k, n] counts 2 m k n. Norms, activations, softmax and embedding look-ups count nothing.
A backward pass costs twice the forward one (the gradients of the input and of the weight). These are the conventions of
Narayanan et al. 2021 (section 5.1, equation 3), Chowdhery et al. 2022 (PaLM, appendix B: MFU) and Korthikanti et al.
2022 (section 6, appendix A: model and hardware FLOPs), but for causal attention: the half that is computed counts.
"""

from dataclasses import dataclass, fields

from armillary.model.config import ModelConfig


@dataclass(frozen=True)
class Work:
    """What goes through the model: in a step, a micro-batch or a second, whatever the caller counts.

    positions: of the packed rows; pairs: of positions that see each other in the decoder's attention; images: of
    `image_size` pixels a side.
    """

    positions: float
    pairs: float
    images: float = 0.0


def work(positions: float, document: float, images: float = 0.0) -> Work:
    """Work of packed rows whose documents do not see each other.

    document: the mean squared length of the documents over their mean length, which is the length of the document that
    a position lies in on average; a row without documents in it has its own length. A causal pair counts half.
    """
    return Work(positions, positions * document / 2, images)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by part of the model."""

    vision: float  # image encoder, its attention included
    projector: float
    projections: float  # the decoder's query, key, value and output matrices
    attention: float  # the decoder's scores, and the values that they weigh
    mlp: float  # SwiGLU, of the experts that are used; and the router
    output: float  # logits

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def times(self, factor: float) -> "Flops":
        return Flops(*(factor * getattr(self, part.name) for part in fields(self)))


def forward(model: ModelConfig, done: Work) -> Flops:
    """FLOPs of one forward pass."""
    hidden, vision, patches = model.hidden_size, model.vision_hidden_size, done.images * model.num_patches
    inside = model.vision_layers * 2 * (4 * vision**2 + 3 * vision * model.vision_ffn_hidden_size)
    seen = model.vision_layers * 4 * vision * model.num_patches
    merged = vision * model.patch_merge**2
    return Flops(
        vision=patches * (2 * model.patch_dim * vision + inside + seen),
        projector=done.images * model.image_positions * 2 * (merged * hidden + hidden**2),
        projections=done.positions * model.depth * 2 * _attention_weights(model),
        attention=done.pairs * model.depth * 4 * hidden,
        mlp=done.positions * model.depth * 2 * _mlp_weights(model, model.experts_per_token),
        output=done.positions * 2 * hidden * model.vocab_size,
    )


def backward(model: ModelConfig, done: Work) -> Flops:
    """FLOPs of one backward pass, without anything computed again: twice the forward pass's."""
    return forward(model, done).times(2)


def model_flops(model: ModelConfig, done: Work) -> float:
    """FLOPs that training needs, whatever runs it: MFU is their rate over the peak (PaLM, appendix B)."""
    return 3 * forward(model, done).total


def hardware_flops(model: ModelConfig, done: Work, recompute: str = "none") -> float:
    """FLOPs that are carried out, what is computed again included (Korthikanti et al. 2022, section 6).

    recompute: "full" runs every decoder layer's forward pass twice; "selective" (norms and SwiGLU) repeats no product
    of matrices. What attention's backward pass repeats inside its kernel is not counted, as is the custom.
    """
    again = forward(model, done) if recompute == "full" else None
    return model_flops(model, done) + (again.projections + again.attention + again.mlp if again else 0.0)


@dataclass(frozen=True)
class Parameters:
    """Parameters by part of the model; `active` ones meet each position (of experts, those it is sent to)."""

    embedding: int
    vision: int
    projector: int
    decoder: int  # with the norm behind its last layer
    output: int  # 0 where it is the embedding's matrix
    active: int

    @property
    def total(self) -> int:
        return self.embedding + self.vision + self.projector + self.decoder + self.output


def parameters(model: ModelConfig) -> Parameters:
    """How many parameters the model has."""
    hidden, vision = model.hidden_size, model.vision_hidden_size
    encoder_layer = 4 * vision**2 + 3 * vision * model.vision_ffn_hidden_size + 2 * vision
    encoder = (model.patch_dim + model.num_patches + 1) * vision + model.vision_layers * encoder_layer
    projector = vision * model.patch_merge**2 * hidden + hidden**2
    embedding = model.vocab_size * hidden
    output = 0 if model.tied_embeddings else embedding
    decoder = model.depth * layer_parameters(model) + hidden
    idle = model.depth * (_mlp_weights(model, model.num_experts) - _mlp_weights(model, model.experts_per_token))
    whole = embedding + encoder + projector + decoder + output
    return Parameters(embedding, encoder, projector, decoder, output, whole - idle)


def layer_parameters(model: ModelConfig) -> int:
    """Of one decoder layer: attention, SwiGLU or all experts with their router, two norms."""
    return _attention_weights(model) + _mlp_weights(model, model.num_experts) + 2 * model.hidden_size


def _attention_weights(model: ModelConfig) -> int:
    return 2 * model.hidden_size * model.head_dim * (model.num_heads + model.num_query_groups)


def _mlp_weights(model: ModelConfig, experts: int) -> int:
    """Of `experts` SwiGLUs and the router, or of the one that a layer without experts has."""
    one = 3 * model.hidden_size * model.ffn_hidden_size
    return experts * one + model.hidden_size * model.num_experts if model.num_experts else one
