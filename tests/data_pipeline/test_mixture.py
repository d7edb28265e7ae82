import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.data_pipeline.mixture import BLOCK, Mixture, quotas

mixtures = st.builds(
    Mixture,
    st.tuples(st.integers(1, 900), st.integers(1, 5000)),
    st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)),
    st.integers(0, 9),
)


@given(mixture=mixtures, start=st.integers(0, 5000), count=st.integers(1, 1500))
@settings(max_examples=30, deadline=None)
def test_any_window_is_the_same_slice_of_one_order(mixture, start, count):
    source, document = mixture.samples(start, count)
    whole_source, whole_document = mixture.samples(0, start + count)
    assert np.array_equal(source, whole_source[start:])
    assert np.array_equal(document, whole_document[start:])


@given(mixture=mixtures)
@settings(max_examples=20, deadline=None)
def test_every_epoch_of_a_source_takes_each_document_once(mixture):
    source, document = mixture.samples(0, 8 * BLOCK)
    for s, size in enumerate(mixture.sizes):
        drawn = document[source == s]
        for start in range(0, len(drawn) - size + 1, size):
            assert np.array_equal(np.sort(drawn[start : start + size]), np.arange(size))


@given(rates=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20).map(tuple))
def test_quotas_fill_a_block_and_leave_no_source_out(rates):
    counts = quotas(rates)
    assert counts.sum() == BLOCK
    assert counts.min() >= 1
    if min(rates) / sum(rates) * BLOCK >= 1:
        assert np.abs(counts - np.array(rates) / sum(rates) * BLOCK).max() <= 1


def test_epochs_and_seeds_differ():
    mixture = Mixture((500,), (1.0,), 3)
    _, document = mixture.samples(0, 1000)
    assert not np.array_equal(document[:500], document[500:])
    assert not np.array_equal(document, Mixture((500,), (1.0,), 4).samples(0, 1000)[1])
