import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.pack import pack

documents = st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=60)
not_empty = documents.filter(lambda drawn: any(size for size, _ in drawn))


def source(documents, seq_length):
    """lengths(start, count) over an endless repetition; what may not be cut is made to fit."""

    def lengths(start, count):
        chosen = [documents[i % len(documents)] for i in range(start, start + count)]
        sizes = [size if cuttable else min(size, seq_length) for size, cuttable in chosen]
        return np.array(sizes, np.int64), np.array([cuttable for _, cuttable in chosen])

    return lengths


@given(not_empty, st.integers(8, 64), st.integers(1, 12))
def test_nothing_is_lost_repeated_or_out_of_order(documents, seq_length, rows):
    lengths = source(documents, seq_length)
    packed, after = pack(Cursor(), rows, seq_length, lengths)
    assert len(packed) == rows
    at = (0, 0)
    for row in packed:
        assert 0 < sum(piece.stop - piece.start for piece in row) <= seq_length
        for piece in row:
            while at[0] < piece.sample:
                size = int(lengths(at[0], 1)[0][0])
                assert at[1] == size or size == 0, "a sample was left before its end"
                at = (at[0] + 1, 0)
            assert (piece.sample, piece.start) == at
            at = (piece.sample, piece.stop)
            size, cuttable = (x[0] for x in lengths(piece.sample, 1))
            assert cuttable or (piece.start, piece.stop) == (0, size), "an image document was cut"
    done = int(lengths(at[0], 1)[0][0]) == at[1]
    while after.sample > at[0] and done:
        at = (at[0] + 1, 0)
        done = int(lengths(at[0], 1)[0][0]) == 0
    assert (after.sample, after.carry) == at


@given(not_empty, st.integers(8, 64), st.lists(st.integers(1, 5), max_size=6))
def test_any_division_into_steps_gives_the_same_rows(documents, seq_length, steps):
    lengths = source(documents, seq_length)
    whole, end = pack(Cursor(), sum(steps) + 1, seq_length, lengths)
    cursor, parts = Cursor(), []
    for rows in [*steps, 1]:
        packed, cursor = pack(cursor, rows, seq_length, lengths)
        parts += packed
    assert parts == whole
    assert cursor == end


def test_rows_of_text_are_full():
    packed, _ = pack(Cursor(), 50, 32, source([(45, True), (3, True), (17, True)], 32))
    assert all(sum(piece.stop - piece.start for piece in row) == 32 for row in packed)
