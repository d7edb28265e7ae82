"""A batch holds what its documents say, position by position."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.data_pipeline.batch import Pieces, assemble, documents_of, joined
from armillary.data_pipeline.document import Encoded, Role
from armillary.data_pipeline.images import ImageShape
from armillary.data_pipeline.layout import Blank, address_of, lay_out, table_of
from armillary.data_pipeline.native import gather
from armillary.data_pipeline.shards import Columns, schema_of
from armillary.data_pipeline.write import record_batch
from tests.data_pipeline.plain import batch_of, decoded
from tests.data_pipeline.plain import lay_out as plainly

IMAGE = 1
SHAPE = ImageShape(8, 4)  # four positions an image


@st.composite
def encoded(draw):
    """A document with any number of images and stretches of any role; images are prompts."""
    tokens = draw(st.lists(st.integers(0, 6), min_size=2, max_size=30))
    roles = draw(st.lists(st.sampled_from(Role), min_size=len(tokens), max_size=len(tokens)))
    roles = [Role.PROMPT if token == IMAGE else role for token, role in zip(tokens, roles, strict=True)]
    spans = [(end, roles[end - 1]) for end in range(1, len(tokens) + 1)]
    merged = [span for i, span in enumerate(spans) if i + 1 == len(spans) or spans[i + 1][1] != span[1]]
    plain = merged == [(len(tokens), Role.TEXT)]
    return Encoded(
        tokens=tokens,
        spans=[] if plain else merged,
        images=[(place, b"%d" % place) for place, token in enumerate(tokens) if token == IMAGE],
        weight=draw(st.sampled_from([1.0, 0.5])),
    )


@given(st.lists(encoded(), min_size=1, max_size=8), st.sampled_from([SHAPE, ImageShape(8, 8)]), st.data())
@settings(deadline=None)
def test_any_pieces_of_any_documents_are_laid_out_as_they_are_one_by_one(documents, shape, data):
    columns = Columns.of(record_batch(documents, schema_of(512)))
    laid_out = [plainly(document, IMAGE, shape.positions) for document in documents]
    chosen = []
    for number, one in enumerate(laid_out):
        inside = {at + i for at in one.image_starts for i in range(1, shape.positions)}
        cuts = [place for place in range(1, len(one.tokens)) if place not in inside]
        bounds = sorted(
            {0, len(one.tokens), *data.draw(st.lists(st.sampled_from(cuts or [len(one.tokens)]), max_size=3))}
        )
        chosen += [(number, low, high) for low, high in itertools.pairwise(bounds)]
    seq_length = sum(high - low for _, low, high in chosen) + data.draw(st.integers(0, 3))
    number, start, stop = (np.array(column, np.int64) for column in zip(*chosen, strict=True))
    padding = seq_length - int((stop - start).sum())
    if padding:
        number, start, stop = np.append(number, -1), np.append(start, 0), np.append(stop, padding)
    blank = Blank(nothing(seq_length), nothing(shape.positions, IMAGE), shape.positions, 2)

    def part(first: int, last: int) -> Pieces:
        cut = (column[first:last] for column in (number, start, stop))
        layout = lay_out(documents_of(columns), table_of(columns)[None], *cut, blank)
        return Pieces(layout, number[first:last].astype(np.int32), [], np.empty(0, np.uint64), [columns])

    def same(pieces: Pieces, first: int, last: int) -> None:
        batch, at = assemble(pieces, columns.tokens.dtype, shape), 0
        starts = []
        for document, low, high in zip(number[first:last], start[first:last], stop[first:last], strict=True):
            where = slice(at, at + high - low)
            assert batch.positions_T[where].tolist() == list(range(high - low))
            assert set(batch.source_ids_T[where]) == {document}
            if document < 0:
                assert not batch.loss_mask_T[where].any()
            else:
                one = laid_out[document]
                assert batch.tokens_T[where].tolist() == one.tokens[low:high]
                assert batch.labels_T[where].tolist() == one.labels[low:high]
                assert batch.loss_mask_T[where].tolist() == one.mask[low:high]
                starts += [at + place - low for place in one.image_starts if low <= place < high]
            at += high - low
        assert batch.image_starts_I.tolist() == starts
        assert batch.cu_seqlens.tolist() == np.cumsum([0, *(stop - start)[first:last]]).tolist()

    same(part(0, len(number)), 0, len(number))
    first, middle, last = sorted(data.draw(st.permutations(range(len(number) + 2))).index(k) for k in (0, 1, 2))
    if first < (last := min(last, len(number))):
        same(part(first, last), first, last)
        if first < middle < last:
            both = joined([part(first, middle), part(middle, last)])
            same(both, first, last)
            assert len(both.held) == 2, "the owners of both parts' memory"
            for one, other in zip(both.layout, part(first, last).layout, strict=True):
                assert one.dtype == other.dtype
                assert np.array_equal(one, other)


@functools.cache
def blank(count: int, token: int) -> np.ndarray:
    return np.full(count + 1, token, np.uint16)


def nothing(count: int, token: int = 0) -> int:
    return address_of(blank(count, token))


@given(st.lists(encoded(), min_size=1, max_size=5))
def test_columns_hold_the_documents(documents):
    columns = Columns.of(record_batch(documents, schema_of(512)))
    assert [decoded(columns, row) for row in range(len(columns))] == documents


def test_a_large_vocabulary_takes_wider_tokens():
    assert batch_of([Encoded([65535, 3])], 4, SHAPE, IMAGE, 1 << 16).tokens_T.dtype == np.uint16
    wide = batch_of([Encoded([65536, 3])], 4, SHAPE, IMAGE, (1 << 16) + 1)
    assert wide.tokens_T.dtype == np.uint32
    assert wide.tokens_T[0] == 65536


@given(
    st.sampled_from([np.uint16, np.uint32]),
    st.integers(20, 20_000).flatmap(
        lambda size: st.tuples(
            st.just(size), st.lists(st.tuples(*[st.integers(0, size - 1)] * 2, st.booleans()), max_size=40)
        )
    ),
)
@settings(deadline=None)
def test_stretches_are_gathered_with_what_stands_behind_them(dtype, stretches):
    size, cuts = stretches
    memory = np.random.default_rng(0).integers(0, 1 << 16, size).astype(dtype)
    begins, ends = (np.array([fold(cut[:2]) for cut in cuts], np.int64) for fold in (min, max))
    last = np.flatnonzero([cut[2] for cut in cuts])
    out, behind = np.empty((ends - begins).sum(), dtype), np.empty(len(last), dtype)
    gather(address_of(memory) + begins * memory.itemsize, ends - begins, last, memory.itemsize, out, behind)
    expected = [memory[begin:end] for begin, end in zip(begins, ends, strict=True)]
    assert np.array_equal(out, np.concatenate([np.empty(0, dtype), *expected]))
    assert np.array_equal(behind, memory[ends[last]])


@pytest.mark.parametrize(
    ("counts", "last", "out", "behind"),
    [
        ([3, 2], [0, 1], 4, 2),
        ([3, 2], [0, 1], 6, 2),
        ([3, 2], [0, 1], 5, 1),
        ([7, -2], [0, 1], 5, 2),
        ([2**62, 2], [0, 1], 5, 2),
        ([3, 2], [1, 2], 5, 2),
        ([3, 2], [1, 1], 5, 2),
        ([3, 2], [-1, 1], 5, 2),
    ],
)
def test_what_does_not_fit_is_not_gathered(counts, last, out, behind):
    memory = np.arange(8, dtype=np.uint16)
    address = np.full(2, address_of(memory))
    to, labels = np.zeros(out, np.uint16), np.zeros(behind, np.uint16)
    with pytest.raises(ValueError, match="do not fit"):
        gather(address, np.array(counts), np.array(last), 2, to, labels)
    with pytest.raises(ValueError, match="do not fit"):
        gather(address[:1], np.array([3, 2]), np.array([0, 1]), 2, np.zeros(5, np.uint16), np.zeros(2, np.uint16))
    assert not to.any()


def test_padding_is_a_piece_of_its_own():
    batch = batch_of([Encoded([2, 3, 4, 5, 6]), Encoded([2] * 6), Encoded([3] * 6)], 10, SHAPE, IMAGE)
    assert batch.cu_seqlens.tolist() == [0, 4, 9, 10, 15, 20]
    assert batch.piece_sources.tolist() == [0, 0, -1, 0, -1]
    assert batch.piece_ids_T.tolist() == [0] * 4 + [1] * 5 + [2] + [3] * 5 + [4] * 5
    assert batch_of([Encoded([2] * 6), Encoded([3] * 6)], 5, SHAPE, IMAGE).piece_sources.tolist() == [0, 0], "none"


def test_a_document_longer_than_a_row_is_not_packed_whole():
    with pytest.raises(AssertionError, match="takes 5 positions"):
        batch_of([Encoded([2] * 6)], 4, SHAPE, IMAGE)
