"""The `[parallel]` table: how ranks share the work, as pure arithmetic."""

import math
from typing import NamedTuple

from pydantic import Field, model_validator

from armillary.model.config import ModelConfig
from armillary.table import Table


class Coordinates(NamedTuple):
    """A rank's place in the layout."""

    data: int
    tensor: int
    pipeline: int


class Layout(Table):
    """Sizes of the parallel axes. Ranks are numbered tensor first, then data, then pipeline."""

    world_size: int = Field(
        0, ge=0, description="ranks in all; 0: data x tensor x pipeline. When set, `data` follows from it"
    )
    data: int = Field(0, ge=0, description="data-parallel copies (DeepSpeed ZeRO-1); 0: from world_size, or 1")
    tensor: int = Field(1, ge=1, description="ranks that share every matrix (Megatron-core tensor parallelism)")
    pipeline: int = Field(1, ge=1, description="stages that the decoder's layers are cut into (1F1B schedule)")
    sequence_parallel: bool = Field(False, description="split norms and residuals over the tensor-parallel ranks too")
    micro_batch: int = Field(1, ge=1, description="packed rows that go through the model at once")

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, given):
        if not isinstance(given, dict):
            return given
        sizes = {key: given.get(key) or 0 for key in ("world_size", "data", "tensor", "pipeline")}
        if not all(isinstance(size, int) for size in sizes.values()):
            return given
        shards = (sizes["tensor"] or 1) * (sizes["pipeline"] or 1)
        data = sizes["data"] or max(1, sizes["world_size"] // shards)
        return given | {"data": data, "world_size": sizes["world_size"] or data * shards}

    @model_validator(mode="after")
    def _check(self):
        if self.data * self.tensor * self.pipeline != self.world_size:
            raise ValueError(
                f"world_size={self.world_size} is not data x tensor x pipeline = "
                f"{self.data} x {self.tensor} x {self.pipeline} = {self.data * self.tensor * self.pipeline}"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel needs tensor > 1")
        return self

    def coordinates(self, rank: int) -> Coordinates:
        """Where rank `rank` of `world_size` stands."""
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(data, tensor, pipeline)

    def problems(self, model: ModelConfig, seq_length: int, global_batch: int) -> list[tuple[str, str]]:
        """Why this layout cannot run this model and batch: (key, reason) pairs, empty where it can."""
        tensor_sizes = {
            "model.num_heads": model.num_heads,
            "model.num_query_groups": model.num_query_groups,
            "model.ffn_hidden_size": model.ffn_hidden_size,
            "model.hidden_size": model.hidden_size,
            "model.vocab_size": model.vocab_size,
            "model.vision_num_heads": model.vision_num_heads,
            "model.vision_ffn_hidden_size": model.vision_ffn_hidden_size,
        }
        found = []
        if undivided := [f"{key}={size}" for key, size in tensor_sizes.items() if size % self.tensor]:
            fitting = math.gcd(*tensor_sizes.values())
            sizes = ", ".join(str(n) for n in range(1, fitting + 1) if fitting % n == 0)
            reason = f"tensor={self.tensor} does not divide {', '.join(undivided)}; {sizes} would"
            found.append(("parallel.tensor", reason))
        if model.depth % self.pipeline:
            found.append(("parallel.pipeline", f"pipeline={self.pipeline} does not divide model.depth={model.depth}"))
        rows = self.data * self.micro_batch
        if global_batch % rows:
            found.append(
                (
                    "training.global_batch",
                    f"data x micro_batch = {self.data} x {self.micro_batch} = {rows} does not divide "
                    f"training.global_batch={global_batch}",
                )
            )
        if self.sequence_parallel and (self.micro_batch * seq_length) % self.tensor:
            found.append(
                (
                    "parallel.sequence_parallel",
                    f"tensor={self.tensor} does not divide micro_batch x seq_length = {self.micro_batch * seq_length}",
                )
            )
        return found
