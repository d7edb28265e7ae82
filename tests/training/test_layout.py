import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from armillary.model.config import ModelConfig
from armillary.training.config import OptimizerConfig
from armillary.training.layout import Layout

sizes = st.integers(1, 6)


@given(sizes, sizes, sizes)
def test_coordinates_name_every_rank_once(data, tensor, pipeline):
    layout = Layout(data=data, tensor=tensor, pipeline=pipeline)
    assert layout.world_size == data * tensor * pipeline
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size
    assert all(p.data < data and p.tensor < tensor and p.pipeline < pipeline for p in places)
    for rank, place in enumerate(places):  # tensor-parallel ranks are neighbours
        assert places[rank - place.tensor] == place._replace(tensor=0)


@given(sizes, sizes, st.integers(1, 64))
def test_data_follows_from_the_world_size_or_is_refused(tensor, pipeline, world):
    assume(world >= tensor * pipeline)
    if world % (tensor * pipeline):
        with pytest.raises(ValidationError, match="world_size"):
            Layout(world_size=world, tensor=tensor, pipeline=pipeline)
    else:
        assert Layout(world_size=world, tensor=tensor, pipeline=pipeline).data == world // (tensor * pipeline)


def test_sequence_parallel_needs_tensor_parallel():
    with pytest.raises(ValidationError, match="sequence_parallel needs tensor"):
        Layout(sequence_parallel=True)


@pytest.mark.parametrize(
    ("layout", "word"),
    [
        ({"tensor": 3}, "num_heads"),
        ({"tensor": 4}, "num_query_groups"),
        ({"pipeline": 4}, "depth"),
        ({"data": 3}, "global_batch"),
        ({"micro_batch": 3}, "global_batch"),
        ({"tensor": 2, "sequence_parallel": True}, "seq_length"),
    ],
)
def test_what_does_not_divide_is_named(layout, word):
    model = ModelConfig(depth=6, hidden_size=96, num_heads=4, num_query_groups=2, vision_num_heads=4, vocab_size=512)
    problems = Layout(**layout).problems(model, seq_length=33, global_batch=8)
    assert any(word in reason for _, reason in problems)
    assert not Layout().problems(model, 33, 8)


def test_learning_rate_rises_falls_and_ends_at_its_ratio():
    config = OptimizerConfig(learning_rate=1.0, final_ratio=0.1, warmup_steps=10)
    rates = [config.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
