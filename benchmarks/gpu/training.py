"""A training step on one device: `python -m benchmarks.gpu.training`, one JSON line. Without a GPU, on CPU.

The model, the gradient buffers and AdamW, as the trainer drives them; the batch is random, packed, with images, and the
same each time. ARMILLARY_KERNELS=reference for the same without kernels.
"""

import argparse
import json
import statistics
import time

import torch

from benchmarks.gpu import checkout  # noqa: F401  # isort: skip

from armillary.data_pipeline.cursor import Cursor
from armillary.model.config import ModelConfig
from armillary.model.coordinates import initialize
from armillary.model.flops import Work, model_flops
from armillary.model.multimodal import MultimodalModel
from armillary.training.config import OptimizerConfig
from armillary.training.delivery import DeviceBatch, DeviceStep, causal_pairs
from armillary.training.engines.megatron import MegatronEngine
from armillary.training.layout import Layout
from armillary.training.process_group import Rank, join, leave
from armillary.training.step import train_step

DOCUMENT = 800  # positions, on average


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--depth", type=int, default=16, help="the model's; its width is 64 times that")
    options.add_argument("--positions", type=int, default=16384, help="of the packed batch")
    options.add_argument("--images", type=int, default=16)
    options.add_argument("--steps", type=int, default=20, help="that are timed, behind three that are not")
    args = options.parse_args()
    model = ModelConfig(depth=args.depth, vocab_size=50304, image_size=256, patch_merge=2)
    print(json.dumps(measured(model, args.positions, args.images, args.steps)))


def measured(config: ModelConfig, positions: int, images: int, steps: int) -> dict:
    """Medians over the steps; `losses` are all of them."""
    join(Rank(), Layout())
    try:
        return _measured(config, positions, images, steps, Rank().device)
    finally:
        leave()


def _measured(config: ModelConfig, positions: int, images: int, steps: int, device: torch.device) -> dict:
    torch.manual_seed(0)
    model = MultimodalModel(config, False, torch.bfloat16)
    initialize([model], 0)
    model = model.to(device)
    optimizer = OptimizerConfig()
    engine = MegatronEngine([model], optimizer, None, 1)
    batch = drawn(config, positions, images, device)
    seconds, losses = [], []
    for _ in range(3 + steps):
        begin = time.perf_counter()
        step = DeviceStep(float(positions), 0.0, 0.0, positions, 1, iter([batch]), Cursor())
        result = train_step([model], engine, step, 1, optimizer.learning_rate, device)
        seconds.append(time.perf_counter() - begin)  # its figures are on the CPU, so that it is done
        losses.append(result.loss)
    median, gpu = statistics.median(seconds[3:]), device.type == "cuda"
    done = Work(positions, causal_pairs(batch.cu_seqlens.cpu().numpy()), images)
    return {
        "parameters": sum(one.numel() for one in model.parameters()),
        "positions": positions,
        "seconds": median,
        "positions/s": positions / median,
        "TFLOP/s": model_flops(config, done) / median / 1e12,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "losses": losses,
    }


def drawn(config: ModelConfig, positions: int, images: int, device: torch.device) -> DeviceBatch:
    """A random batch: documents of about DOCUMENT positions, images evenly among them."""
    documents = max(positions // DOCUMENT, 1)
    cuts = torch.randperm(positions - 1)[: documents - 1].sort().values + 1
    bounds = torch.cat([torch.zeros(1), cuts, torch.full((1,), positions)]).int()
    tokens = torch.randint(config.vocab_size, (positions + documents,))
    starts = torch.arange(images) * (positions // max(images, 1))
    batch = DeviceBatch(
        positions,
        tokens_T=tokens[:positions].to(torch.uint16),
        last_labels=tokens[positions:].to(torch.uint16),
        mask_bounds=torch.tensor([0, positions], dtype=torch.int32),
        mask_values=torch.ones(1),
        cu_seqlens=bounds,
        piece_sources=torch.zeros(documents, dtype=torch.int32),
        patches_IND=torch.randint(256, (images, config.num_patches, config.patch_dim), dtype=torch.uint8),
        image_starts_I=starts,
    )
    moved = {name: one.to(device) for name, one in vars(batch).items() if name != "positions"}
    return DeviceBatch(positions, **moved)


if __name__ == "__main__":
    main()
