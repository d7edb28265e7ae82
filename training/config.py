"""The tables that training reads: `[optimizer] [training] [checkpoint] [metrics]`, and all it sees of a job."""

import math
from typing import Literal

from pydantic import Field

from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.images import ImageShape
from armillary.model.config import ModelConfig
from armillary.storage import Location
from armillary.table import Table
from armillary.training.layout import Layout
from armillary.training.support import Setting


class OptimizerConfig(Table):
    """AdamW (Loshchilov and Hutter 2019) with a linear warm-up and a cosine decay."""

    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate")
    final_ratio: float = Field(0.1, ge=0, le=1, description="learning rate of the last step / the peak")
    warmup_steps: int = Field(20, ge=0, description="steps over which the learning rate rises to its peak")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of matrices; norms have none")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's mean")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the gradient's square")
    eps: float = Field(1e-8, gt=0, description="added to the root of the gradient's square")
    clip_grad: float = Field(
        1.0, gt=0, description="largest gradient norm, over all ranks; larger ones are scaled to it"
    )

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, steps - 1 - self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * (self.final_ratio + (1 - self.final_ratio) * cosine)


class TrainingConfig(Table):
    """How long, how much at once, in which precision."""

    steps: int = Field(
        1000, ge=1, le=1 << 40, description="optimizer steps of the whole run; the learning rate follows it"
    )
    global_batch: int = Field(8, ge=1, le=1 << 24, description="packed rows in one optimizer step, over all ranks")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of weights and gradients in use; master weights are fp32"
    )
    seed: int = Field(0, ge=0, description="seed of the initial weights")
    deterministic: bool = Field(
        False, description="add gradients up in one order, so that data, pipeline and zero change no bit of the weights"
    )
    compile: bool = Field(False, description="torch.compile norms, SwiGLU and rotary embeddings, where no kernel runs")
    bad_step: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="what follows a loss or gradient norm that is not finite, or a spike, which no weight ever sees: "
        "the run ends; goes on without that update; or goes back to a checkpoint and leaves out the data since then",
    )
    spike: float = Field(
        0.0,
        ge=0,
        description="so many standard deviations above recent steps a loss or gradient norm is a spike; 0: none is",
    )
    evaluate: bool = Field(True, description="score held-out questions when the last step is done")


class CheckpointConfig(Table):
    """When the run's state is saved."""

    every: int = Field(200, ge=1, description="steps between checkpoints; one is also saved at the end and on Ctrl-C")
    path: Location = Field(
        "", description="folder or URL (s3://bucket/folder) that gets a folder of them; empty: in the run's directory"
    )
    start: Location = Field("", description="a checkpoint's folder or URL whose weights a new run begins with")
    when_busy: Literal["wait", "skip"] = Field(
        "wait", description="where the one before it is still being written: wait for it, or leave this one out"
    )
    keep_last: int = Field(0, ge=0, description="how many of the newest are kept; 0: all")
    keep_every: int = Field(0, ge=0, description="of older ones, those whose step it divides are kept; 0: none")
    keep_best: int = Field(0, ge=0, description="of older ones, so many with the lowest loss are kept")


class MetricsConfig(Table):
    """Where each rank answers Prometheus."""

    host: str = Field("127.0.0.1", description="address that the exporters listen on")
    port: int = Field(0, ge=0, le=65535, description="port of rank 0, rank r listens on port + r; 0: any free port")


class TrainJob(Table):
    """Everything that training sees of a job."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: Layout = Layout()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()

    @property
    def image_shape(self) -> ImageShape:
        return ImageShape(self.model.image_size, self.model.patch_size, self.model.patch_merge)

    @property
    def setting(self) -> Setting:
        """What the rules for layouts look at."""
        training = self.training
        bf16 = training.precision == "bf16"
        return Setting(
            self.parallel, self.model, self.data.seq_length, training.global_batch, bf16, training.deterministic,
            training.compile,
        )  # fmt: skip

    @property
    def tokens_per_step(self) -> int:
        """Positions in one global batch, padding included."""
        return self.training.global_batch * self.data.seq_length
