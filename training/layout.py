"""The `[parallel]` table: how ranks share the work, as pure arithmetic."""

from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from armillary.table import Table

AXES = ("data", "tensor", "pipeline", "context")


class Coordinates(NamedTuple):
    """A rank's place in the layout."""

    data: int
    tensor: int
    pipeline: int
    context: int


class Layout(Table):
    """Sizes of the parallel axes. Ranks are numbered tensor first, then context, then data, then pipeline; expert
    parallelism divides the experts over data x context x tensor ranks that are neighbours."""

    world_size: int = Field(
        0, ge=0, description="ranks in all; 0: data x tensor x pipeline x context. When set, `data` follows from it"
    )
    data: int = Field(0, ge=0, description="data-parallel copies; 0: from world_size, or 1")
    tensor: int = Field(1, ge=1, description="ranks that share every matrix (Megatron-core tensor parallelism)")
    pipeline: int = Field(1, ge=1, description="stages that the decoder's layers are cut into (1F1B schedule)")
    virtual: int = Field(1, ge=1, description="parts of each stage, which take turns (interleaved 1F1B schedule)")
    first_stage_layers: int = Field(
        0, ge=0, description="layers of the first stage, which encodes images; 0: as others"
    )
    last_stage_layers: int = Field(0, ge=0, description="layers of the last stage, which has the loss; 0: as others")
    context: int = Field(1, ge=1, description="ranks that share every row's positions, in zig-zag order")
    expert: int = Field(1, ge=1, description="ranks that share every layer's experts")
    sequence_parallel: bool = Field(False, description="split norms and residuals over the tensor-parallel ranks too")
    zero: Literal[1, 2, 3] = Field(
        1, description="what data-parallel ranks share: 1: optimizer state; 2: gradients too; 3: weights too"
    )
    engine: Literal["", "deepspeed", "megatron"] = Field(
        "", description="who reduces gradients: DeepSpeed, or Megatron-core; empty: DeepSpeed for zero > 1 and offload"
    )
    offload: bool = Field(False, description="optimizer state and its arithmetic on the host's processors")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="what a backward pass computes again: nothing; norms and SwiGLU; whole decoder layers"
    )
    micro_batch: int = Field(1, ge=1, description="packed rows that go through the model at once")

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, given):
        if not isinstance(given, dict):
            return given
        sizes = {key: given.get(key) or 0 for key in ("world_size", *AXES)}
        if not all(isinstance(size, int) for size in sizes.values()):
            return given
        shards = (sizes["tensor"] or 1) * (sizes["pipeline"] or 1) * (sizes["context"] or 1)
        data = sizes["data"] or max(1, sizes["world_size"] // shards)
        deepspeed = given.get("zero") in (2, 3) or given.get("offload") is True
        derived = {"data": data, "world_size": sizes["world_size"] or data * shards}
        return given | derived | {"engine": given.get("engine") or ("deepspeed" if deepspeed else "megatron")}

    @model_validator(mode="after")
    def _check(self):
        product = self.data * self.tensor * self.pipeline * self.context
        if product != self.world_size:
            raise ValueError(
                f"world_size={self.world_size} is not data x tensor x pipeline x context = "
                f"{self.data} x {self.tensor} x {self.pipeline} x {self.context} = {product}"
            )
        return self

    def coordinates(self, rank: int) -> Coordinates:
        """Where rank `rank` of `world_size` stands."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(data, tensor, pipeline, context)

    def stage_layers(self, depth: int) -> list[int]:
        """Decoder layers of each pipeline stage; ValueError where `depth` layers cannot be shared out so."""
        given = {0: self.first_stage_layers, self.pipeline - 1: self.last_stage_layers}
        given = {stage: layers for stage, layers in given.items() if layers}
        others, left = self.pipeline - len(given), depth - sum(given.values())
        if left < others or (left % others if others else left):
            raise ValueError(f"{max(left, 0)} are left for {others} other stages, which need the same number each")
        layers = [given.get(stage, left // others if others else 0) for stage in range(self.pipeline)]
        if uneven := [n for n in layers if n % self.virtual]:
            raise ValueError(f"a stage has {uneven[0]}, which virtual={self.virtual} does not divide")
        return layers
