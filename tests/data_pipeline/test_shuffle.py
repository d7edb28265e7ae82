from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from armillary.data_pipeline.shuffle import key_of, permute, unpermute


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_is_a_bijection(size, key):
    out = permute(np.arange(size), size, np.uint64(key))
    assert np.array_equal(np.sort(out), np.arange(size))


@given(size=st.integers(1, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_one_index_at_a_time_is_the_same(size, key, data):
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    together = permute(indices, size, np.uint64(key))
    assert ((together >= 0) & (together < size)).all()
    assert [int(permute(np.array([i]), size, np.uint64(key))[0]) for i in indices] == together.tolist()


@given(size=st.integers(1, 10**12), key=st.integers(0, 2**64 - 1), data=st.data())
def test_has_an_inverse(size, key, data):
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    assert np.array_equal(unpermute(permute(indices, size, np.uint64(key)), size, np.uint64(key)), indices)


def test_is_a_bijection_for_every_small_size():
    for size in range(1, 2001):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key_of(size))), np.arange(size))


def test_looks_random():
    out = permute(np.arange(10_000), 10_000, key_of(1, 2))
    assert abs(np.corrcoef(np.arange(10_000), out)[0, 1]) < 0.05
    assert (np.diff(out) == 1).mean() < 0.01


def test_few_numbers_come_in_every_order_about_as_often():
    counts = Counter(tuple(permute(np.arange(4), 4, key_of(9, seed)).tolist()) for seed in range(12_000))
    assert len(counts) == 24
    assert 400 < min(counts.values()) <= max(counts.values()) < 600


def test_keys_depend_on_every_part_and_on_their_order():
    keys = {int(key_of(*parts)) for parts in [(1,), (2,), (1, 2), (2, 1), (1, 2, 0), (0, 1, 2)]}
    assert len(keys) == 6
