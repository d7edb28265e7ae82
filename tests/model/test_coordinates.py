"""Where the parts of a tensor lie: any flat part of any shape is found again."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from armillary.model.coordinates import Placement, blocks, boxes, split_axis


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_are_the_numbers_of_a_flat_range_in_order(shape, data):
    count = math.prod(shape)
    low = data.draw(st.integers(0, count))
    high = data.draw(st.integers(low, count))
    whole = torch.arange(count).view(shape)
    found = []
    for start, size in boxes(low, high, tuple(shape)):
        box = whole[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))]
        found += box.flatten().tolist()
    assert found == list(range(low, high))
    assert len(list(boxes(low, high, tuple(shape)))) <= 2 * len(shape) - 1


@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(0, 1), st.integers(1, 3), st.data())
def test_the_blocks_of_all_ranks_and_shards_tile_the_tensor(step, stride, ranks, axis, shards, data):
    shape = [data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))]
    shape[axis] = step * stride * ranks
    whole, filled = torch.arange(math.prod(shape)).view(shape), torch.full(shape, -1)
    for rank in range(ranks):
        pieces = split_axis(shape[axis], ranks, rank, stride)
        place = Placement("name", tuple(shape), axis, pieces, 0, 1, False)
        local = torch.cat([whole.narrow(axis, piece.start, piece.size) for piece in pieces], axis).flatten()
        for begin in range(0, len(local), size := -(-len(local) // shards)):
            for block in blocks(place, local[begin : begin + size], begin):
                there = filled[tuple(slice(s, s + n) for s, n in zip(block.start, block.tensor.shape, strict=True))]
                assert (there == -1).all(), "no number twice"
                there.copy_(block.tensor)
    assert torch.equal(filled, whole)
