"""The model in one process: packed equals unpacked, images anywhere, the cache, and its dimensions."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from armillary.data_pipeline.document import Encoded, Role
from armillary.data_pipeline.images import ImageShape
from armillary.model.config import ModelConfig
from armillary.model.coordinates import initialize, placements
from armillary.model.generation import generate
from armillary.model.multimodal import MultimodalModel, Targets
from armillary.training.delivery import DeviceBatch
from armillary.training.layout import Layout
from armillary.training.process_group import Rank, join
from tests.data_pipeline.plain import batch_of
from tests.reference import Reference

SHAPE = ImageShape(32, 8, merge=2)
IMAGE = 1
CONFIG = ModelConfig(
    depth=2,
    hidden_size=32,
    num_heads=4,
    vision_num_heads=2,
    image_size=32,
    patch_size=8,
    patch_merge=2,
    vocab_size=64,
    init_std=0.1,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    join(Rank(), Layout())
    model = MultimodalModel(CONFIG)
    initialize([model], seed=5)
    return model


@pytest.fixture(scope="module")
def experts():
    join(Rank(), Layout())
    capacity = {"num_experts": 4, "experts_per_token": 1, "capacity_factor": 0.5}
    model = MultimodalModel(ModelConfig(**CONFIG.model_dump() | capacity))
    initialize([model], seed=5)
    return model


def png(number):
    import io

    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def documents():
    """Text alone; an image first; two images among text; an image last but one. Tokens are learned here and there."""
    rng = np.random.default_rng(0)

    def text(n):
        return rng.integers(2, 64, n).tolist()

    drawn = [text(9), [IMAGE, *text(5)], [*text(3), IMAGE, *text(2), IMAGE, *text(4)], [*text(6), IMAGE, *text(1)]]
    return [encoded(tokens, number, rng) for number, tokens in enumerate(drawn)]


def encoded(tokens, number, rng=None, written=0):
    """The last token is learned, of the others some are. Of the last `written` tokens none is an image."""
    roles = [Role.ANSWER if rng is not None and rng.integers(0, 2) else Role.PROMPT for _ in tokens[1:]]
    roles = [Role.PROMPT if token == IMAGE else role for token, role in zip(tokens, [*roles, Role.ANSWER], strict=True)]
    places = [place for place, token in enumerate(tokens[: len(tokens) - written]) if token == IMAGE]
    return Encoded(
        tokens=tokens,
        spans=[(end + 1, role) for end, role in enumerate(roles)],
        images=[(place, png(10 * number + i)) for i, place in enumerate(places)],
    )


def packed(documents, seq_length=None):
    """The documents packed in rows of `seq_length`, or one document alone in a row without padding."""
    if seq_length is None:
        (document,) = documents
        seq_length = len(document.tokens) - 1 + len(document.images) * (SHAPE.positions - 1)
    return batch_of(documents, seq_length, SHAPE, IMAGE, vocab_size=64)


def inputs_of(batch):
    return DeviceBatch.of(batch, CPU).inputs


def summed_loss(model, batch):
    targets = Targets(torch.from_numpy(batch.labels_T).long(), torch.tensor(batch.loss_mask_T))
    return model(inputs_of(batch), targets)[0]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {place.name: p.grad.clone() for p, place in placements([model]) if p.grad is not None}


def test_packed_equals_unpacked(model):
    sequences = documents()
    loss = summed_loss(model, packed(sequences, 40))
    got = gradients(model, loss)
    alone = sum(summed_loss(model, packed([document])) for document in sequences)
    want = gradients(model, alone)
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    assert set(got) == set(want)
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-5 * want[name].norm(), name


def test_equals_the_plain_model_and_its_gradients(model):
    batch = packed(documents(), 40)
    loss = summed_loss(model, batch)
    got = gradients(model, loss)
    plain = Reference(CONFIG, {place.name: p.detach().double() for p, place in placements([model])})
    expected, _ = plain.loss([batch], 1)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, weight in plain.state().items():
        assert (got[name].double() - weight.grad).norm() <= 1e-5 * weight.grad.norm(), name


def test_a_document_sees_neither_its_neighbours_nor_what_comes_after(model):
    sequences = documents()
    row = packed(sequences, 70)
    with torch.no_grad():
        before = model(inputs_of(row))
        start, stop = row.cu_seqlens[2], row.cu_seqlens[3]
        row.tokens_T[stop - 1] = 5  # the last token of the third document
        after = model(inputs_of(row))
    changed = (before != after).any(-1).flatten().nonzero().flatten().tolist()
    assert changed == [stop - 1]
    assert start < stop - 1


def test_experts_that_are_full_in_training_take_all_where_answers_are_given(experts):
    """Else what stands beside a document, and behind a token, would decide what its experts make of it."""
    tokens = torch.arange(2, 40) % 60
    document = [encoded(tokens.tolist(), 9)]

    def logits(*sequences):
        with torch.no_grad():
            return experts(inputs_of(packed(list(sequences), 70)))

    experts.eval()
    alone = logits(*document)[: len(tokens) - 1]
    torch.testing.assert_close(logits(*document, *documents())[: len(alone)], alone)
    experts.train()
    assert not torch.allclose(logits(*document, *documents())[: len(alone)], alone), "some are full in training"


def test_an_image_changes_what_comes_after_it(model):
    batch = packed([documents()[1]])
    with torch.no_grad():
        before = model(inputs_of(batch))
        batch.patches_IND[0, 0] ^= 128
        after = model(inputs_of(batch))
    assert (before != after).any(-1).all()


def test_a_batch_without_images_gives_every_weight_a_gradient(model):
    got = gradients(model, summed_loss(model, packed([documents()[0]])))
    assert set(got) == {place.name for _, place in placements([model])}
    assert all(not g.any() for name, g in got.items() if name.startswith(("vision", "projector")))


@pytest.mark.parametrize("number", range(4))
def test_the_cache_changes_nothing(model, number):
    """Greedy tokens with the cache are those of running everything anew for every token."""
    model.eval()
    tokens, anew = documents()[number].tokens, []
    cached = list(generate(model, inputs_of(packed([encoded(tokens, number)])), 12, end=-1))
    for _ in range(12):
        with torch.no_grad():
            logits = model(inputs_of(packed([encoded([*tokens[:-1], *anew, 0], number, written=len(anew))])))
        anew.append(int(logits[-1, 0].argmax()))
    model.train()
    assert cached == anew


def test_generation_stops_at_the_end_and_samples_by_seed(model):
    prompt = inputs_of(packed([documents()[1]]))
    greedy = list(generate(model, prompt, 8, end=-1))
    assert list(generate(model, prompt, 8, end=greedy[3])) == greedy[: greedy.index(greedy[3])]

    def sampled(seed):
        return list(generate(model, prompt, 8, -1, 1.0, torch.Generator().manual_seed(seed)))

    assert sampled(1) == sampled(1)
    assert len({tuple(sampled(seed)) for seed in range(5)}) > 1


def test_initial_weights_follow_the_rules(model):
    for parameter, place in placements([model]):
        if "layernorm" in place.name:
            assert (parameter == 1).all()
            continue
        std = CONFIG.init_std
        if place.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * (CONFIG.vision_layers if place.name.startswith("vision") else CONFIG.depth))
        assert parameter.std().item() == pytest.approx(std, rel=0.15), place.name
        assert abs(parameter.mean().item()) < std / 4


def test_the_depth_dial_gives_all_dimensions_and_each_can_be_set():
    for depth in (1, 2, 3, 4, 12, 32):
        config = ModelConfig(depth=depth)
        assert config.hidden_size == 64 * depth
        assert config.head_dim == 64
        assert config.num_heads % config.num_query_groups == 0
        assert config.ffn_hidden_size % 32 == 0
        assert 0 <= config.ffn_hidden_size - 8 / 3 * config.hidden_size < 32
    config = ModelConfig(depth=3, ffn_hidden_size=100, vision_layers=7)
    assert (config.ffn_hidden_size, config.vision_layers, config.hidden_size) == (100, 7, 192)
    sizes = [ModelConfig(depth=d).hidden_size for d in range(1, 40)]
    assert all(a < b for a, b in pairwise(sizes))


@pytest.mark.parametrize(
    ("dims", "word"),
    [
        ({"num_heads": 5}, "num_heads=5"),
        ({"num_heads": 4, "num_query_groups": 3}, "num_query_groups=3"),
        ({"patch_size": 15}, "patch_size=15"),
        ({"vision_num_heads": 7}, "vision_num_heads=7"),
        ({"hidden_size": 60, "num_heads": 4}, "even"),
        ({"depth": 0}, "depth"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_impossible_dimensions_are_refused(dims, word):
    with pytest.raises(ValidationError, match=word):
        ModelConfig.model_validate(dims)
