"""Models and steps that several tests plan."""

from armillary.model.config import ModelConfig
from armillary.planner.hardware import cluster, find_gpu
from armillary.planner.stages import Step
from armillary.training.layout import Layout

MODEL = ModelConfig(
    depth=24, hidden_size=4096, num_heads=32, num_query_groups=8, ffn_hidden_size=14336, vocab_size=128256,
    vision_layers=24, vision_hidden_size=1024, vision_num_heads=16, vision_ffn_hidden_size=4096, image_size=448,
    patch_size=14, patch_merge=2,
)  # fmt: skip
EXPERTS = ModelConfig(**MODEL.model_dump() | {"num_experts": 8, "ffn_hidden_size": 4096, "depth": 12})
STEP = Step(4096, 256, 4096.0, 1.0, "bf16")


def machines(gpus, gpu="h100", node_gpus=8):
    return cluster(find_gpu(gpu), gpus, node_gpus)


def layout(**keys):
    if keys.get("tensor", 1) > 1:
        keys = {"sequence_parallel": True} | keys
    return Layout(**keys)
