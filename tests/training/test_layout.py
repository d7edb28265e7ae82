import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from armillary.training.config import OptimizerConfig
from armillary.training.layout import Layout

sizes = st.integers(1, 6)


@given(sizes, sizes, sizes, sizes)
def test_coordinates_name_every_rank_once(data, tensor, pipeline, context):
    layout = Layout(data=data, tensor=tensor, pipeline=pipeline, context=context)
    assert layout.world_size == data * tensor * pipeline * context
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size
    assert all(
        all(at < size for at, size in zip(place, (data, tensor, pipeline, context), strict=True)) for place in places
    )
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


def test_learning_rate_rises_falls_and_ends_at_its_ratio():
    config = OptimizerConfig(learning_rate=1.0, final_ratio=0.1, warmup_steps=10)
    rates = [config.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
