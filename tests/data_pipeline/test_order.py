import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.data_pipeline.order import Order

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=12).map(tuple)


def epoch_of(order, epoch):
    return order.documents(np.arange(order.size), np.full(order.size, epoch))


@given(sizes, st.integers(0, 2**64 - 1), st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None)
def test_every_epoch_has_every_document_once_and_knows_its_place(sizes, key, together, epoch):
    order = Order(sizes, key, together)
    documents = epoch_of(order, epoch)
    assert sorted(documents) == list(range(order.size))
    for place in range(0, order.size, 7):
        assert order.place(int(documents[place]), epoch) == place


@given(sizes, st.integers(0, 5), st.data())
@settings(deadline=None)
def test_any_stretch_is_the_same_slice_of_the_order(sizes, together, data):
    order = Order(sizes, 3, together)
    whole = np.concatenate([epoch_of(order, epoch) for epoch in range(3)])
    start = data.draw(st.integers(0, len(whole) - 1))
    ordinals = np.arange(start, data.draw(st.integers(start, len(whole))))
    epochs, places = np.divmod(ordinals, order.size)
    assert np.array_equal(order.documents(places, epochs), whole[ordinals])


@given(sizes, st.integers(1, 5))
@settings(deadline=None)
def test_few_shards_are_in_use_at_a_time(sizes, together):
    order = Order(sizes, 5, together)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[epoch_of(order, 0)]
    last = {int(shard): place for place, shard in enumerate(shard_of)}
    first = {int(shard): place for place, shard in reversed(list(enumerate(shard_of)))}
    for place in range(order.size):
        assert sum(first[shard] <= place <= last[shard] for shard in first) <= together


def test_epochs_keys_and_groups_differ():
    def shards(order, epoch=0):
        return tuple(epoch_of(order, epoch))

    sizes = (50,) * 8
    assert len({shards(Order(sizes, 1, 2)), shards(Order(sizes, 1, 2), 1), shards(Order(sizes, 2, 2)),
                shards(Order(sizes, 1, 4)), shards(Order(sizes, 1))}) == 5  # fmt: skip
    one_shard = Order((50,), 1, 1)  # whose place is the same in every epoch
    assert shards(one_shard) != shards(one_shard, 1)
