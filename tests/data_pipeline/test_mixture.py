import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.data_pipeline.mixture import Mixture, Stage
from armillary.data_pipeline.order import Order

rates = st.floats(0, 300) | st.floats(0, 0.01)


@st.composite
def orders(draw, key):
    """Sources of up to six shards, shuffled over all or a few of them."""
    sizes = draw(st.lists(st.integers(1, 400), min_size=1, max_size=6))
    return Order(tuple(sizes), key, draw(st.integers(0, 4)))


@st.composite
def mixtures(draw):
    sources = draw(st.integers(1, 3))
    starts = [0, *sorted(draw(st.sets(st.integers(1, 30), max_size=2)))]
    stages = [Stage(start, tuple(draw(rates) for _ in range(sources))) for start in starts]
    seed = draw(st.integers(0, 9))
    return Mixture(tuple(draw(orders(seed + n)) for n in range(sources)), tuple(stages), seed)


@given(mixtures(), st.integers(1, 40))
@settings(deadline=None)
def test_every_epoch_of_a_source_takes_each_document_once(mixture, blocks):
    drawn = [mixture.block(block) for block in range(blocks)]
    source, document = (np.concatenate(column) for column in zip(*drawn, strict=True))
    assert np.array_equal(np.bincount(source, minlength=len(mixture.orders)), mixture.drawn(blocks))
    for s, order in enumerate(mixture.orders):
        mine = document[source == s]
        counts = np.bincount(mine, minlength=order.size)
        assert counts.max() - counts.min() <= 1
        epochs, places = np.divmod(np.arange(len(mine)), order.size)
        assert np.array_equal(mine, order.documents(places, epochs)), "in its own order"


@given(mixtures(), st.integers(0, 10**6), st.integers(0, 1000))
def test_shares_are_exact_over_any_stretch(mixture, start, blocks):
    start += mixture.stages[-1].start
    given_out = mixture.drawn(start + blocks) - mixture.drawn(start)
    assert np.abs(given_out - np.array(mixture.stages[-1].rates) * blocks).max() <= 1 + 1e-6


@given(mixtures(), st.integers(1, 30), st.tuples(rates, rates, rates))
@settings(deadline=None)
def test_a_later_stage_disturbs_nothing_before_it(mixture, start, later):
    start += mixture.stages[-1].start
    changed = Mixture(mixture.orders, (*mixture.stages, Stage(start, later[: len(mixture.orders)])), mixture.seed)
    for block in (0, start - 1):
        for a, b in zip(mixture.block(block), changed.block(block), strict=True):
            assert np.array_equal(a, b)


@given(mixtures(), st.integers(0, 40), st.data())
@settings(deadline=None)
def test_a_document_is_found_again(mixture, block, data):
    source, document = mixture.block(block)
    if len(source):
        number = data.draw(st.integers(0, len(source) - 1))
        s, d = int(source[number]), int(document[number])
        first, last = (int(mixture.drawn(b)[s]) for b in (block, block + 1))
        epochs = range(first // mixture.orders[s].size, last // mixture.orders[s].size + 1)
        ordinals = [o for epoch in epochs if first <= (o := mixture.ordinal(s, d, epoch)) < last]
        assert ordinals
        assert {mixture.block_of(s, ordinal) for ordinal in ordinals} == {block}


def test_ten_thousand_million_samples_take_no_more_memory_than_a_thousand():
    """A hundred thousand shards of a hundred thousand documents, shuffled over all, and over a few at a time."""

    def peak(sizes, together):
        tracemalloc.start()
        mixture = Mixture((Order(sizes, 1, together),), (Stage(0, (5000.0,)),), 0)
        for block in (0, 1, 10**6):
            mixture.block(block)
            mixture.block_of(0, mixture.ordinal(0, 999, 3))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small, large = (100,) * 10, (10**5,) * 10**5
    assert peak(large, 0) < 1.2 * peak(small, 0)
    assert peak(large, 64) < 50e6


def test_what_is_never_drawn_has_no_block():
    mixture = Mixture((Order((5,), 1), Order((5,), 2)), (Stage(0, (2.0, 1.0)), Stage(3, (2.0, 0.0))), 1)
    assert mixture.block_of(1, 2) == 2
    assert mixture.block_of(1, 3) is None


def test_epochs_and_seeds_differ():
    def order(seed, block):
        return Mixture((Order((500,), seed),), (Stage(0, (500.0,)),), seed).block(block)[1]

    assert sorted(order(3, 0)) == sorted(order(3, 1)) == list(range(500))
    assert not np.array_equal(order(3, 0), order(3, 1))
    assert not np.array_equal(order(3, 0), order(4, 0))


def test_a_block_far_into_a_huge_source_costs_what_the_first_costs():
    mixture = Mixture((Order((10**12,), 1),), (Stage(0, (1000.0,)),), 1)
    _, document = mixture.block(10**9 - 1)
    assert len(document) == len(set(document.tolist())) == 1000
    assert document.max() > 9 * 10**11
