"""A table that contradicts itself is not followed to where it points; what right ones give: test_batch.py."""

from types import SimpleNamespace

import numpy as np
import pytest

from armillary.data_pipeline.layout import PLAIN, Blank, address_of, lay_out, table_of

WIDTH, ITEMSIZE = 4, 2
MEMORY = np.arange(100, dtype=np.uint16)
BLANK = Blank(padding=address_of(MEMORY), image=address_of(MEMORY), width=WIDTH, itemsize=ITEMSIZE)


def described(**changed):
    """Two documents of ten tokens: the first with images at tokens 2 and 5, the second with a span of three."""
    columns = {
        "image_at": np.array([2, 5], np.uint32),
        "image_offsets": np.array([0, 2, 2], np.int32),
        "span_ends": np.array([3, 10], np.uint32),
        "span_roles": np.array([1, 0], np.uint8),
        "span_offsets": np.array([0, 0, 2], np.int32),
        "weight": np.array([1, 0.5], np.float32),
    }
    return SimpleNamespace(**columns | {name: np.array(new, columns[name].dtype) for name, new in changed.items()})


def laid_out(columns, document=0, start=0, stop=9, table=0, row=None):
    numbers = np.arange(2)
    documents = [np.full(2, address_of(MEMORY)), np.full(2, 10), numbers * 0 + table, numbers if row is None else row]
    piece = (np.array([column]) for column in (document, start, stop))
    return lay_out(np.stack(documents), np.stack([table_of(columns), PLAIN]), *piece, BLANK)


def test_a_table_says_what_its_documents_are():
    columns = described()
    first, second = laid_out(columns, 0, stop=9 + 2 * (WIDTH - 1)), laid_out(columns, 1)
    assert first.count.tolist() == [2, 3, 3, 3, 4]
    assert first.image_place.tolist() == [2, 8]
    assert second.mask_bounds.tolist() == [0, 2, 9]
    assert second.mask_value.tolist() == [0, 0.5]
    assert laid_out(columns, row=np.array([-1, -1])).count.tolist() == [9], "of nothing but tokens"


@pytest.mark.parametrize(
    "changed",
    [
        {"image_at": [2, 10]},
        {"image_at": [2, 2**32 - 1]},
        {"image_at": [5, 2]},
        {"image_offsets": [0, 3, 3]},
        {"image_offsets": [1, 0, 2]},
        {"image_offsets": [-1, 1, 2]},
        {"span_offsets": [0, 0, 3]},
        {"span_offsets": [0, 2, 1]},
        {"span_roles": [1, 3]},
        {"span_ends": [10, 3]},
    ],
)
def test_a_table_that_contradicts_itself_is_refused(changed):
    columns, whole = described(**changed), described()
    for document in (0, 1):
        assert laid_out(whole, document)
    with pytest.raises(LookupError):
        [laid_out(columns, document) for document in (0, 1)]


@pytest.mark.parametrize(
    "piece",
    [
        {"document": 2},
        {"stop": 16},
        {"start": -1},
        {"start": 9},
        {"document": 1, "stop": 10},
        {"table": 1},
        {"row": np.array([-1, -1]), "stop": 10},
        {"table": 2},
        {"table": -1},
        {"row": np.array([2, 2])},
        {"row": np.array([-2, -2])},
    ],
)
def test_a_piece_outside_of_its_document_is_refused(piece):
    with pytest.raises(LookupError) as error:
        laid_out(described(), **piece)
    assert error.value.args == (piece.get("document", 0),)
