"""Where in memory the tokens of pieces of documents are, the images among them, and what their labels weigh."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from armillary.data_pipeline import native
from armillary.data_pipeline.document import LEARNED


class Layout(NamedTuple):
    """m pieces, one behind the other.

    A piece is made of stretches of its document's tokens, and stretches of image tokens between them; what stands in
    memory behind its last stretch is the label of its last position. Each piece has a stretch and a run at least.
    """

    bounds: np.ndarray  # int32 [m + 1]: positions up to each piece, and in all
    address: np.ndarray  # int64 [stretches]: where its tokens are
    count: np.ndarray  # int64 [stretches]: how many
    last: np.ndarray  # int64 [m]: the last stretch of each piece
    mask_bounds: np.ndarray  # int32 [runs + 1]: positions up to each run of labels of one weight
    mask_value: np.ndarray  # float32 [runs]
    image_place: np.ndarray  # int64 [images]: the first position of each
    image_number: np.ndarray  # int64 [images]: of its document's
    image_piece: np.ndarray  # int64 [images]: the piece that it is in


class Described(Protocol):
    """What is known of documents beside their tokens: that of row i is image_at[image_offsets[i]:image_offsets[i + 1]]
    (uint32, the tokens that stand for its images), and so on."""

    image_at: np.ndarray
    image_offsets: np.ndarray  # int32
    span_ends: np.ndarray  # uint32
    span_roles: np.ndarray  # uint8
    span_offsets: np.ndarray  # int32
    weight: np.ndarray  # float32


PLAIN = np.zeros(9, np.int64)  # in the place of the table of documents of nothing but tokens, which nobody asks


def table_of(described: Described) -> np.ndarray:
    """Where these columns are in memory, for `lay_out`; int64 [9]. They must stay there."""
    one = described
    columns = (one.image_offsets, one.image_at, one.span_offsets, one.span_ends, one.span_roles, one.weight)
    images, image_at, spans, span_ends, span_roles, weight = map(address_of, columns)
    return np.array(
        [len(one.weight), images, image_at, len(one.image_at), spans, span_ends, span_roles, len(one.span_ends), weight]
    )


@dataclass(frozen=True)
class Blank:
    """Addresses of what is in no shard: tokens of padding, `width` image tokens for an image of so many positions, and
    one more of each; `itemsize`: a token's bytes."""

    padding: int
    image: int
    width: int
    itemsize: int


def lay_out(
    documents: np.ndarray, tables: np.ndarray, document: np.ndarray, start: np.ndarray, stop: np.ndarray, blank: Blank
) -> Layout:
    """Lay out pieces behind each other.

    documents: int64 [4, n], address, tokens, table and row there (-1: nothing but tokens) of each; tables: int64
    [tables, 9], see `table_of`; document, start and stop: int64 [m], of the pieces, where document -1 is padding.
    LookupError(number of the document) where its table contradicts itself or a piece; OverflowError from 2^31 positions
    on.
    """
    bounds, address, count, last, mask_bounds, mask_value, *images = native.lay_out(
        documents, tables, LEARNED, document, start, stop, blank.width, blank.itemsize, blank.image, blank.padding
    )
    return Layout(
        np.frombuffer(bounds, np.int32), *(np.frombuffer(one, np.int64) for one in (address, count, last)),
        np.frombuffer(mask_bounds, np.int32), np.frombuffer(mask_value, np.float32),
        *(np.frombuffer(one, np.int64) for one in images),
    )  # fmt: skip


def joined(parts: Sequence[Layout]) -> Layout:
    """The pieces of several parts behind each other."""
    if len(parts) == 1:
        return parts[0]
    found: dict[str, list[np.ndarray]] = {name: [] for name in Layout._fields}
    at, stretches, pieces = 0, 0, 0
    for part in parts:
        moved = part._replace(
            bounds=at + part.bounds[1 if at else 0 :], mask_bounds=at + part.mask_bounds[1 if at else 0 :],
            last=stretches + part.last, image_place=at + part.image_place, image_piece=pieces + part.image_piece,
        )  # fmt: skip
        for name, column in moved._asdict().items():
            found[name].append(column)
        at += int(part.bounds[-1])
        stretches += len(part.count)
        pieces += len(part.last)
    return Layout(**{name: np.concatenate(columns) for name, columns in found.items()})


def address_of(array: np.ndarray) -> int:
    """Where an array's numbers begin in memory."""
    return array.__array_interface__["data"][0]
