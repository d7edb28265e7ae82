"""FLOPs and parameters, against the real model, PyTorch's own counter, and published figures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from armillary.launcher.job import resolve
from armillary.model.config import ModelConfig
from armillary.model.coordinates import placements
from armillary.model.flops import backward, forward, hardware_flops, model_flops, parameters, work
from armillary.training.layout import Layout
from armillary.training.loop import build_model
from armillary.training.process_group import Rank, join
from tests.reference import Reference

SMALL = {
    "depth": 3, "hidden_size": 48, "num_heads": 4, "num_query_groups": 2, "vision_layers": 2, "vision_hidden_size": 32,
    "vision_num_heads": 2, "image_size": 32, "patch_size": 8, "patch_merge": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """A small model's job, and its weights by global name, as the trainer builds them."""
    join(Rank(), Layout())
    job = resolve({"model": SMALL, "data": {"seq_length": 64}}, "test").train_job()
    built = build_model(job, torch.device("cpu"))
    return job.model, {place.name: weight.detach() for weight, place in placements(built)}


def test_parameters_are_those_of_the_real_model(model):
    dims, weights = model
    counted = parameters(dims)
    for part in ("embedding", "vision", "projector", "decoder", "output"):
        real = sum(weight.numel() for name, weight in weights.items() if name.split(".")[0] == part)
        assert getattr(counted, part) == real, part
    assert counted.total == counted.active == sum(weight.numel() for weight in weights.values())


def test_flops_are_those_that_pytorch_counts(model):
    """The reference computes all pairs of positions, of which the causal half counts here."""
    dims, weights = model
    reference = Reference(dims, weights)
    length, images = 40, 3
    row = SimpleNamespace(
        tokens_T=np.random.default_rng(0).integers(0, dims.vocab_size, length),
        cu_seqlens=np.array([0, length]),
        patches_IND=np.zeros((images, dims.num_patches, dims.patch_dim), np.uint8),
        image_starts_I=[0, 10, 20],
    )
    with FlopCounterMode(display=False) as counter:
        logits, _ = reference.batch(row)
    done = work(length, length, images)
    ours = forward(dims, done)
    assert counter.get_total_flops() == ours.total + ours.attention
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    no_gradient_of_pixels = images * dims.num_patches * 2 * dims.patch_dim * dims.vision_hidden_size
    behind = backward(dims, done)
    assert counter.get_total_flops() == behind.total + behind.attention - no_gradient_of_pixels
    assert model_flops(dims, done) == pytest.approx(ours.total + behind.total)


def llama(**dims):
    """Without an image encoder to speak of, whose parameters the comparisons leave out."""
    return ModelConfig(vision_layers=1, vision_hidden_size=64, vision_num_heads=1, **dims)


PUBLISHED = {  # parameters as the models' own checkpoints count them
    "Llama 3 8B": (8_030_261_248, llama(depth=32, hidden_size=4096, num_heads=32, num_query_groups=8,
                                        ffn_hidden_size=14336, vocab_size=128256)),
    "Llama 3 70B": (70_553_706_496, llama(depth=80, hidden_size=8192, num_heads=64, num_query_groups=8,
                                          ffn_hidden_size=28672, vocab_size=128256)),
    "Mixtral 8x7B": (46_702_792_704, llama(depth=32, hidden_size=4096, num_heads=32, num_query_groups=8,
                                           ffn_hidden_size=14336, vocab_size=32000, num_experts=8)),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters(name):
    published, dims = PUBLISHED[name]
    counted = parameters(dims)
    assert counted.embedding + counted.decoder + counted.output == published


def test_of_experts_only_those_that_are_used_are_active():
    counted = parameters(PUBLISHED["Mixtral 8x7B"][1])
    assert (counted.total - counted.active) == 32 * 6 * 3 * 4096 * 14336
    dense, sparse = (llama(depth=2, hidden_size=64, num_heads=2, vocab_size=64, num_experts=e) for e in (0, 8))
    token = work(1, 1)
    router = 2 * 2 * 64 * 8
    assert forward(sparse, token).mlp == 2 * forward(dense, token).mlp + router


def test_gpt3_and_the_formula_of_narayanan():
    """Equation 3 (of a 4 h MLP, which SwiGLU of 8/3 h equals): 96 B s l h^2 (1 + s / 6h + V / 16 l h), with the layers
    computed again; its attention counts all pairs, ours half of them."""
    h, layers, s, v, rows = 12288, 96, 2048, 51200, 1536
    dims = llama(depth=layers, hidden_size=h, num_heads=96, num_query_groups=96, ffn_hidden_size=8 * h // 3,
                 vocab_size=v, tied_embeddings=True)  # fmt: skip
    counted = parameters(dims)
    assert (counted.embedding + counted.decoder + counted.output) / 1e9 == pytest.approx(174.6, abs=0.1)
    done = hardware_flops(dims, work(rows * s, s), "full")
    assert done == pytest.approx(96 * rows * s * layers * h**2 * (1 + s / (12 * h) + v / (16 * layers * h)))
    assert hardware_flops(dims, work(rows * s, s)) == model_flops(dims, work(rows * s, s))


def test_packed_documents_see_only_themselves():
    dims = PUBLISHED["Llama 3 8B"][1]
    whole, packed = forward(dims, work(8192, 8192)), forward(dims, work(8192, 1024))
    assert whole.attention == 8 * packed.attention
    assert whole.projections == packed.projections
