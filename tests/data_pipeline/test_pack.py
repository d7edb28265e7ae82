import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.data_pipeline.pack import Parts, best_fit, cut_between_images, greedy

SEQ_LENGTH, MAX_IMAGES = 32, 3


@st.composite
def parts(draw, texts_only=False):
    """Documents of any length; those with images fit in a row."""
    text = st.tuples(st.integers(1, 100), st.just(0))
    pictured = st.tuples(st.integers(1, SEQ_LENGTH), st.integers(1, MAX_IMAGES))
    drawn = draw(st.lists(text if texts_only else text | pictured, max_size=60))
    lengths, images = (np.array([one[i] for one in drawn], np.int64) for i in (0, 1))
    return Parts(np.arange(len(drawn)), draw(st.integers(0, 5)) * np.ones(len(drawn), np.int64), lengths, images)


def rows_of(packed, seq_length=SEQ_LENGTH):
    """Each row's pieces, as (document, start, stop), without the padding behind them."""
    pieces = list(zip(packed.document.tolist(), packed.start.tolist(), packed.stop.tolist(), strict=True))
    rows = [pieces[low:high] for low, high in itertools.pairwise([0, *packed.row_ends.tolist()])]
    for row in rows:
        assert sum(stop - start for _, start, stop in row) == seq_length
        if row[-1][0] == -1:
            assert row.pop()[1] == 0
    return rows


def assert_packed(parts, packed):
    """Every position once, rows within their limits, nothing with images cut."""
    rows = rows_of(packed)
    spans: dict[int, list] = {}
    for row in rows:
        assert row
        assert sum(parts.images[document] for document, _, _ in row) <= MAX_IMAGES
        for document, start, stop in row:
            spans.setdefault(document, []).append((start, stop))
    assert sorted(spans) == parts.document.tolist()
    for document, found in spans.items():
        begin, length = int(parts.start[document]), int(parts.length[document])
        found.sort()
        assert (found[0][0], found[-1][1]) == (begin, begin + length)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
        assert parts.images[document] == 0 or len(found) == 1
    return rows, spans


@given(parts())
def test_greedy_packs_everything_in_order(parts):
    packed = greedy(parts, SEQ_LENGTH, MAX_IMAGES)
    rows, _ = assert_packed(parts, packed)
    order = [(document, start) for row in rows for document, start, _ in row]
    assert order == sorted(order)
    for row, after in itertools.pairwise(rows):
        room = SEQ_LENGTH - sum(stop - start for _, start, stop in row)
        document = after[0][0]
        images = sum(parts.images[d] for d, _, _ in row)
        assert room == 0 or (
            parts.images[document] and (parts.length[document] > room or images + parts.images[document] > MAX_IMAGES)
        ), "room is left although the next would fit"


@given(parts(texts_only=True))
def test_greedy_fills_rows_of_text_to_the_last_position(parts):
    packed = greedy(parts, SEQ_LENGTH, MAX_IMAGES)
    assert packed.rows == -(-int(parts.length.sum()) // SEQ_LENGTH)


@given(parts(), st.integers(0, 2**64 - 1))
def test_best_fit_cuts_only_what_is_longer_than_a_row(parts, key):
    packed = best_fit(parts, SEQ_LENGTH, MAX_IMAGES, np.uint64(key))
    _, spans = assert_packed(parts, packed)
    for document, found in spans.items():
        assert len(found) == -(-int(parts.length[document]) // SEQ_LENGTH)


def test_best_fit_leaves_little_room():
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(6.2, 1.0, 3000).astype(np.int64), 1)
    drawn = Parts(np.arange(3000), np.zeros(3000, np.int64), lengths, np.zeros(3000, np.int64))
    packed = best_fit(drawn, 2048, 1, np.uint64(1))
    assert packed.positions == lengths.sum()
    assert packed.positions / (packed.rows * 2048) > 0.98
    per_row = [np.mean([stop - start for _, start, stop in row]) for row in rows_of(packed, 2048)]
    assert abs(np.corrcoef(np.arange(len(per_row)), per_row)[0, 1]) < 0.1, "rows of long documents come first"


@given(
    st.integers(1, 8), st.lists(st.tuples(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 40)), max_size=9)
)
def test_long_documents_are_cut_between_their_images(width, drawn):
    """As early as a row or its images are full, and the other documents stay whole."""
    documents = []  # where the images of each begin, and its length
    for gaps, rest in drawn:
        starts = [sum(gaps[: i + 1]) + i * width for i in range(len(gaps))]
        documents.append((starts, starts[-1] + width + rest if starts else rest))
    columns = [(7 * n, 0, length, len(starts)) for n, (starts, length) in enumerate(documents)]
    parts = Parts(*np.array(columns, np.int64).reshape(-1, 4).T)
    long = np.flatnonzero((parts.images > 0) & ((parts.length > SEQ_LENGTH) | (parts.images > MAX_IMAGES)))
    image_starts = np.array([start for n in long for start in documents[n][0]], np.int64)
    found = cut_between_images(parts, long, image_starts, width, SEQ_LENGTH, MAX_IMAGES) if len(long) else parts
    pieces = list(zip(*(c.tolist() for c in (found.document, found.start, found.length, found.images)), strict=True))
    assert sorted({document for document, *_ in pieces}) == [7 * n for n in range(len(documents))]
    for n, (starts, length) in enumerate(documents):
        mine = [piece for piece in pieces if piece[0] == 7 * n]
        if n not in long:
            assert mine == [columns[n]]
            continue
        ends = [start for _, start, *_ in mine[1:]] + [length]
        assert mine[0][1] == 0
        for (_, low, size, images), high in zip(mine, ends, strict=True):
            assert 0 < size == high - low <= SEQ_LENGTH
            assert images == sum(low <= start < high for start in starts) <= MAX_IMAGES
            assert not any(start < high < start + width for start in starts)
            further = starts.index(high) if high in starts else None  # the image that the next part opens with
            if high < length and size < SEQ_LENGTH:
                assert further is not None
                assert images == MAX_IMAGES or size + width > SEQ_LENGTH, "there was room for the image"


@pytest.mark.parametrize(("length", "images"), [(SEQ_LENGTH + 1, 1), (SEQ_LENGTH, MAX_IMAGES + 1), (0, 0), (5, -1)])
def test_what_fits_in_no_row_is_refused(length, images):
    one = [np.array([value], np.int64) for value in (0, 0, length, images)]
    with pytest.raises(ValueError, match="does not fit in a row"):
        greedy(Parts(*one), SEQ_LENGTH, MAX_IMAGES)


def test_no_documents_make_no_rows():
    nothing = np.zeros(0, np.int64)
    packed = greedy(Parts(nothing, nothing, nothing, nothing), SEQ_LENGTH, MAX_IMAGES)
    assert packed.rows == packed.positions == 0
