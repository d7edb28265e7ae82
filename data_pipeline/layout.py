"""Where in memory the tokens of pieces of documents are, the images among them, and what their labels weigh."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from armillary.data_pipeline import native
from armillary.data_pipeline.document import LEARNED


@dataclass(frozen=True)
class Layout:
    """m pieces, one behind the other. Piece i has the stretches up to stretch_ends[i], and so on (int64 [m]).

    A piece is made of stretches of its document's tokens, and stretches of image tokens between them; what stands in
    memory behind its last stretch is the label of its last position. Each piece has a stretch and a run at least.
    """

    bounds: np.ndarray  # int64 [m + 1]: positions up to each piece, and in all
    address: np.ndarray  # int64 [stretches]: where its tokens are
    count: np.ndarray  # int64 [stretches]: how many
    stretch_ends: np.ndarray
    mask_bounds: np.ndarray  # int64 [runs + 1]: positions up to each run of labels of one weight
    mask_ends: np.ndarray
    image_place: np.ndarray  # int64 [images]: the first position of each
    image_number: np.ndarray  # int64 [images]: of its document's
    image_ends: np.ndarray
    mask_value: np.ndarray  # float32 [runs]


class Described(Protocol):
    """What is known of documents beside their tokens: that of row i is image_at[image_offsets[i]:image_offsets[i + 1]]
    (uint32, the tokens that stand for its images), and so on."""

    image_at: np.ndarray
    image_offsets: np.ndarray  # int32
    span_ends: np.ndarray  # uint32
    span_roles: np.ndarray  # uint8
    span_offsets: np.ndarray  # int32
    weight: np.ndarray  # float32


PLAIN = np.zeros(9, np.int64)  # the table of documents of nothing but tokens


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


def lay_out(documents: Sequence[np.ndarray], tables: Sequence[np.ndarray], pieces: np.ndarray, blank: Blank) -> Layout:
    """Lay out pieces behind each other.

    documents: address, tokens, table and row there, int64 [n] each; tables: see `table_of`; pieces: document, start and
    stop, int64 [3, m], where document -1 is padding. LookupError(number of the document) where its table contradicts
    itself or a piece.
    """
    *found, mask_value = native.lay_out(
        np.stack(documents), np.stack(tables), LEARNED, pieces, blank.width, blank.itemsize, blank.image, blank.padding
    )
    return Layout(*(np.frombuffer(one, np.int64) for one in found), np.frombuffer(mask_value, np.float32))


def address_of(array: np.ndarray) -> int:
    """Where an array's numbers begin in memory."""
    return array.__array_interface__["data"][0]
