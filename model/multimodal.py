"""The image+text transformer: a ViT-style image encoder, a projector and a decoder, sharded by Megatron-core."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from armillary.kernels.cross_entropy import linear_cross_entropy
from armillary.model.config import ModelConfig
from armillary.model.context import own_places, own_positions
from armillary.model.experts import Experts
from armillary.model.layers import KVCache, PackedContext, Recompute, block_spec, no_init, transformer_config


@dataclass(frozen=True)
class Inputs:
    """A packed batch as the model sees it; T positions, all on one device. See data_pipeline.batch.PackedBatch."""

    tokens_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    cu_seqlens: torch.Tensor  # int32 [documents + 1]
    patches_IND: torch.Tensor  # uint8: images x patches x patch_dim
    image_starts_I: torch.Tensor  # int64


class Targets(NamedTuple):
    """What a packed batch is to predict, at each of T positions."""

    labels_T: torch.Tensor  # int64
    weights_T: torch.Tensor  # float32, of each label in the loss


class VisionEncoder(MegatronModule):
    """ViT (Dosovitskiy et al. 2021) without class token: patches [i, n, patch_dim] -> [i, n, vision_hidden_size]."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, recompute: Recompute):
        super().__init__(config)
        self.patch_embedding = torch.nn.Linear(model.patch_dim, config.hidden_size, False, dtype=config.params_dtype)
        self.position_embedding = torch.nn.Parameter(
            torch.empty(model.num_patches, config.hidden_size, dtype=config.params_dtype)
        )
        self.encoder = TransformerBlock(config, block_spec(config, causal=False, recompute=recompute))

    def forward(self, patches_IND: torch.Tensor) -> torch.Tensor:
        x_IND = self.patch_embedding(patches_IND) + self.position_embedding
        return self.encoder(x_IND.transpose(0, 1).contiguous(), attention_mask=None).transpose(0, 1)


class Projector(MegatronModule):
    """Merges neighbouring patches, then two linear layers with a GELU between.

    [i, n, vision_hidden_size] -> [i, n / merge^2, hidden_size]; the patches of a square stand together.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, merge: int):
        super().__init__(config)
        self.merged_size = config.hidden_size * merge**2
        shared = dict(config=config, init_method=no_init, bias=False, skip_bias_add=False)
        self.linear_in = ColumnParallelLinear(self.merged_size, hidden_size, gather_output=False, **shared)
        self.linear_out = RowParallelLinear(hidden_size, hidden_size, input_is_parallel=True, **shared)

    def forward(self, x_IND: torch.Tensor) -> torch.Tensor:
        merged = x_IND.reshape(len(x_IND), -1, self.merged_size)
        return self.linear_out(F.gelu(self.linear_in(merged)[0]))[0]


def _decoder_config(
    model: ModelConfig, sequence_parallel: bool, stage_layers: Sequence[int], virtual: int, shared: dict
) -> TransformerConfig:
    """Of a stage of the decoder; shared: what the image encoder's has too."""
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    uneven = len(set(stage_layers)) > 1
    return transformer_config(
        layers=model.depth,
        hidden=model.hidden_size,
        heads=model.num_heads,
        groups=model.num_query_groups,
        ffn=model.ffn_hidden_size,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        num_layers_in_first_pipeline_stage=stage_layers[0] if uneven else None,
        # Of two stages the last one has what the first leaves; Megatron-core divides by those between.
        num_layers_in_last_pipeline_stage=stage_layers[-1] if uneven and pipeline > 2 else None,
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        # Of two stages, batched sends and receives are mixed up where they have virtual ones.
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
        **shared,
    )


class MultimodalModel(MegatronModule):
    """This rank's part of the model, or one of its virtual stages. The first pipeline stage holds embedding, image
    encoder and projector.

    Call it with Inputs, of all positions under context parallelism too: the last stage returns logits [T, 1, vocab /
    tensor], or with Targets their loss; others return hidden states [T (/ context, / tensor under sequence
    parallelism), 1, hidden]. Needs Megatron-core's parallel state.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(
        self,
        model: ModelConfig,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        recompute: Recompute = "none",
        stage_layers: Sequence[int] = (),
        virtual: int = 1,
        vp_stage: int = 0,
    ):
        """stage_layers: of each pipeline stage, if they are not shared evenly; vp_stage: which of `virtual` parts."""
        shared = dict(
            eps=model.norm_eps,
            dtype=dtype,
            tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        )
        config = _decoder_config(model, sequence_parallel, stage_layers, virtual, shared)
        super().__init__(config)
        self.model, self.vp_stage = model, vp_stage if virtual > 1 else None
        self.pre_process = parallel_state.is_pipeline_first_stage() and vp_stage == 0
        self.post_process = parallel_state.is_pipeline_last_stage() and vp_stage == virtual - 1
        if self.pre_process:
            # The image encoder lives on one stage, and its sequences (patches) are short: neither pipeline
            # nor sequence parallelism applies inside it.
            vision = transformer_config(
                layers=model.vision_layers,
                hidden=model.vision_hidden_size,
                heads=model.vision_num_heads,
                groups=model.vision_num_heads,
                ffn=model.vision_ffn_hidden_size,
                **shared,
            )
            self.embedding = VocabParallelEmbedding(
                model.vocab_size, model.hidden_size, init_method=no_init, config=vision
            )
            self.vision = VisionEncoder(vision, model, recompute)
            self.projector = Projector(vision, model.hidden_size, model.patch_merge)
        self.decoder = TransformerBlock(
            config,
            block_spec(config, True, recompute, model if model.num_experts else None, self.vp_stage),
            pre_process=self.pre_process,
            post_process=self.post_process,
            vp_stage=self.vp_stage,
        )
        if self.post_process and not (model.tied_embeddings and self.pre_process):
            self.output = ColumnParallelLinear(
                model.hidden_size, model.vocab_size, config=config, init_method=no_init, bias=False, gather_output=False
            )

        pipeline = parallel_state.get_pipeline_model_parallel_world_size()
        if model.tied_embeddings and pipeline > 1 and (self.pre_process or self.post_process):
            weight = self.embedding.weight if self.pre_process else self.output.weight
            weight.shared_embedding = True  # Megatron-core gives it a bucket of its own, alike on both stages
            weight.copy_of_embedding = self.post_process

    @property
    def output_weight(self) -> torch.Tensor:
        """The last stage's [vocab / tensor, hidden]."""
        own = self.model.tied_embeddings and self.pre_process
        return self.embedding.weight if own else self.output.weight

    def set_aux_scale(self, scale: float) -> None:
        """What a micro-batch's own losses of routers are multiplied by in the next backward passes."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.aux_scale = scale

    def set_input_tensor(self, input_tensor) -> None:
        """Pipeline schedules hand over the previous stage's output here."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        inputs: Inputs,
        targets: Targets | None = None,
        cache: KVCache | None = None,
        cache_rows: torch.Tensor | None = None,
        decode: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Hidden states, logits, or with `targets` what `losses` gives; see the class.

        cache: keys and values are written to it, position t's to its sequence cache_rows[t] (int64 [T]).
        decode: each of the T positions is the one new token of its sequence and sees what the cache holds of it.
        """
        context = PackedContext(
            self.own(inputs.positions_T),
            inputs.cu_seqlens,
            self.model.head_dim,
            self.model.rope_theta,
            cache,
            cache_rows,
            decode,
        )
        hidden = self.embed(inputs) if self.pre_process else None
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=context)
        if not self.post_process:
            return hidden
        if targets is not None:
            return self.losses(hidden, self.own(targets.labels_T), self.own(targets.weights_T))
        return F.linear(self._gathered(hidden), self.output_weight)

    def losses(
        self, hidden: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of weights_T * losses, and losses, float32 [T] without a gradient: each position's cross entropy with
        labels_T (int64), in nats, for this rank's positions. The logits are never whole."""
        hidden = self._gathered(hidden)
        group = parallel_state.get_tensor_model_parallel_group()
        return linear_cross_entropy(hidden[:, 0], self.output_weight, labels_T, weights_T, group=group)

    def embed(self, inputs: Inputs) -> torch.Tensor:
        """Token embeddings with the images' features in their places: [T, 1, hidden], scattered over tensor
        ranks under sequence parallelism."""
        hidden_TH = self.embedding(self.own(inputs.tokens_T))
        patches_IND, starts_I, ranks = inputs.patches_IND, inputs.image_starts_I, _context()[0]
        places_IP = starts_I[:, None] + torch.arange(self.model.image_positions, device=hidden_TH.device)
        own_IP = None
        if ranks > 1:  # images of which this rank has no position are not encoded
            own_IP, places_IP = own_places(places_IP, len(inputs.tokens_T), *_context())
            seen_I = own_IP.any(1)
            patches_IND, own_IP, places_IP = patches_IND[seen_I], own_IP[seen_I], places_IP[seen_I]
        if len(patches_IND):
            features_IPH = self.projector(self.vision(self.normalise(patches_IND)))
            if own_IP is None:
                places, features = places_IP.flatten(), features_IPH.flatten(0, 1)
            else:
                places, features = places_IP[own_IP], features_IPH[own_IP]
            hidden_TH = hidden_TH.index_copy(0, places, features)
        elif self.training:
            # Every weight gets a gradient, if of zeros, on every rank: data-parallel reductions must match.
            blank = hidden_TH.new_zeros(1, self.model.num_patches, self.model.patch_dim)
            hidden_TH = hidden_TH + 0.0 * self.projector(self.vision(blank)).sum()
        hidden = hidden_TH[:, None]
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        return hidden

    def normalise(self, patches: torch.Tensor) -> torch.Tensor:
        """Pixels (uint8) as the image encoder takes them: (pixel / 255 - image_mean) / image_std, params dtype."""
        pixels = patches.float() / 255
        return ((pixels - self.model.image_mean) / self.model.image_std).to(self.config.params_dtype)

    def _gathered(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states for the output layer, of which each tensor-parallel rank has a part of the vocabulary."""
        if self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(hidden)
        return tensor_parallel.copy_to_tensor_model_parallel_region(hidden)

    def own(self, x_T: torch.Tensor) -> torch.Tensor:
        """Of what all positions have, what those of this rank have."""
        return own_positions(x_T, *_context())


def _context() -> tuple[int, int]:
    """How many ranks share a row's positions, and which of them this one is."""
    return parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
