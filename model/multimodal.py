"""The image+text transformer: a ViT-style image encoder, a projector and a decoder, sharded by Megatron-core."""

from dataclasses import dataclass

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
from armillary.model.layers import KVCache, PackedContext, block_spec, no_init, transformer_config


@dataclass(frozen=True)
class Inputs:
    """A packed batch as the model sees it; T positions, all on one device. See data_pipeline.batch.PackedBatch."""

    tokens_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    cu_seqlens: torch.Tensor  # int32 [documents + 1]
    patches_IND: torch.Tensor  # uint8: images x patches x patch_dim
    image_starts_I: torch.Tensor  # int64


class VisionEncoder(MegatronModule):
    """ViT (Dosovitskiy et al. 2021) without class token: patches [i, n, patch_dim] -> [i, n, vision_hidden_size]."""

    def __init__(self, config: TransformerConfig, model: ModelConfig):
        super().__init__(config)
        self.patch_embedding = torch.nn.Linear(model.patch_dim, config.hidden_size, False, dtype=config.params_dtype)
        self.position_embedding = torch.nn.Parameter(
            torch.empty(model.num_patches, config.hidden_size, dtype=config.params_dtype)
        )
        self.encoder = TransformerBlock(config, block_spec(config, causal=False))

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


class MultimodalModel(MegatronModule):
    """This rank's part of the model. The first pipeline stage holds embedding, image encoder and projector.

    Call it with Inputs: the last stage returns logits [T, 1, vocab / tensor] or, for `losses`, hidden states as the
    others do: [T (/ tensor under sequence parallelism), 1, hidden]. Needs Megatron-core's parallel state.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, model: ModelConfig, sequence_parallel: bool = False, dtype: torch.dtype = torch.float32):
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        shared = dict(eps=model.norm_eps, tensor=tensor, dtype=dtype)
        config = transformer_config(
            layers=model.depth,
            hidden=model.hidden_size,
            heads=model.num_heads,
            groups=model.num_query_groups,
            ffn=model.ffn_hidden_size,
            pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
            sequence_parallel=sequence_parallel,
            **shared,
        )
        super().__init__(config)
        self.model = model
        self.pre_process = parallel_state.is_pipeline_first_stage()
        self.post_process = parallel_state.is_pipeline_last_stage()
        if self.pre_process:
            # The image encoder lives on one stage, and its sequences (patches) are short: neither pipeline
            # nor sequence parallelism applies inside it.
            vision = transformer_config(
                layers=model.vision_layers,
                hidden=model.vision_hidden_size,
                heads=model.vision_num_heads,
                groups=model.vision_num_heads,
                ffn=model.vision_ffn_hidden_size,
                pipeline=1,
                sequence_parallel=False,
                **shared,
            )
            self.embedding = VocabParallelEmbedding(
                model.vocab_size, model.hidden_size, init_method=no_init, config=vision
            )
            self.vision = VisionEncoder(vision, model)
            self.projector = Projector(vision, model.hidden_size, model.patch_merge)
        self.decoder = TransformerBlock(
            config, block_spec(config, causal=True), pre_process=self.pre_process, post_process=self.post_process
        )
        if self.post_process:
            self.output = ColumnParallelLinear(
                model.hidden_size, model.vocab_size, config=config, init_method=no_init, bias=False, gather_output=False
            )

    def set_input_tensor(self, input_tensor) -> None:
        """Pipeline schedules hand over the previous stage's output here."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        inputs: Inputs,
        cache: KVCache | None = None,
        cache_rows: torch.Tensor | None = None,
        decode: bool = False,
        logits: bool = True,
    ) -> torch.Tensor:
        """Logits of a whole or last stage if they are wanted, else hidden states; see the class.

        cache: keys and values are written to it, position t's to its sequence cache_rows[t] (int64 [T]).
        decode: each of the T positions is the one new token of its sequence and sees what the cache holds of it.
        """
        context = PackedContext(
            inputs.positions_T,
            inputs.cu_seqlens,
            self.model.head_dim,
            self.model.rope_theta,
            cache,
            cache_rows,
            decode,
        )
        hidden = self.embed(inputs) if self.pre_process else None
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=context)
        return self.output(hidden)[0] if self.post_process and logits else hidden

    def losses(
        self, hidden: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of weights_T * losses, and losses, float32 [T] without a gradient: each position's cross entropy with
        labels_T (int64), in nats. `hidden`: what the last stage returns with logits=False; its logits are never whole.
        """
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        group = parallel_state.get_tensor_model_parallel_group()
        return linear_cross_entropy(hidden[:, 0], self.output.weight, labels_T, weights_T, group=group)

    def embed(self, inputs: Inputs) -> torch.Tensor:
        """Token embeddings with the images' features in their places: [T, 1, hidden], scattered over tensor
        ranks under sequence parallelism."""
        hidden_TH = self.embedding(inputs.tokens_T)
        if len(inputs.image_starts_I):
            features = self.projector(self.vision(self.normalise(inputs.patches_IND))).flatten(0, 1)
            offsets = torch.arange(self.model.image_positions, device=features.device)
            places = (inputs.image_starts_I[:, None] + offsets).flatten()
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
