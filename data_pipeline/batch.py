"""A packed batch: what one micro-batch of one data-parallel rank looks like, and how it is made of documents."""

import bisect
import collections
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from armillary.data_pipeline.document import LEARNED
from armillary.data_pipeline.images import ImageShape, patchify
from armillary.data_pipeline.shards import Columns
from armillary.data_pipeline.shuffle import key_of


@dataclass(frozen=True)
class PackedBatch:
    """Several rows of packed documents, flattened to T = rows x seq_length positions.

    Documents never see each other: attention is causal within each [cu_seqlens[i], cu_seqlens[i+1]).
    An image takes `ImageShape.positions` consecutive positions, whose tokens are all the image token.
    """

    tokens_T: np.ndarray  # uint16 or uint32, as in the shards
    labels_T: np.ndarray  # the same: the next token of the same document
    loss_mask_T: np.ndarray  # float32: the weight of the label in the loss, 0 where it is not learned
    positions_T: np.ndarray  # int32: from 0 in each piece
    cu_seqlens: np.ndarray  # int32 [pieces + 1]; padding is a piece of its own
    piece_sources: np.ndarray  # int32 [pieces]: number of the source in `data.sources`; -1: padding
    patches_IND: np.ndarray  # uint8: images x patches x patch_dim
    image_starts_I: np.ndarray  # int64: first position of each image

    @property
    def piece_ids_T(self) -> np.ndarray:
        """The piece of each position, int32."""
        return np.repeat(np.arange(len(self.piece_sources), dtype=np.int32), np.diff(self.cu_seqlens))

    @property
    def source_ids_T(self) -> np.ndarray:
        """The source of each position, int32; -1: padding."""
        return np.repeat(self.piece_sources, np.diff(self.cu_seqlens))


@dataclass(frozen=True)
class Pieces:
    """Stretches of documents and where each goes in a batch; one entry a piece, in the order of the batch."""

    columns: list[Columns]  # where the piece's document is
    row: np.ndarray  # int64: its number there
    first: np.ndarray  # int64: as in shards.INDEX_SCHEMA
    start: np.ndarray  # int64: the piece is input positions [start, stop) of the document
    stop: np.ndarray  # int64
    at: np.ndarray  # int64: the batch's position where it begins
    source: np.ndarray  # int32
    variation: np.ndarray  # uint64: names the random variation of its images; 0: as they are


def assemble(
    pieces: Pieces,
    rows: int,
    seq_length: int,
    shape: ImageShape,
    image_token: int,
    with_images: bool = True,
    each: Callable[[Callable, Iterable], Iterable] = map,
) -> PackedBatch:
    """Lay pieces into `rows` rows of `seq_length` positions.

    `with_images=False` leaves the patches out, for a rank that never sees them. `each` is `map`, or that of a pool
    of threads: it decodes the images.
    """
    total = rows * seq_length
    tokens, mask = np.zeros(total, pieces.columns[0].tokens.dtype), np.ones(total, np.float32)
    last: list[int] = []  # the label of each piece's last position
    images: list[_Image] = []
    for columns, row, first, start, stop, at, variation in zip(
        pieces.columns,
        *(column.tolist() for column in (pieces.row, pieces.first, pieces.start, pieces.stop, pieces.at)),
        pieces.variation.tolist(),
        strict=True,
    ):
        if first >= 0:
            tokens[at : at + stop - start] = columns.tokens[first + start : first + stop]
            last.append(columns.tokens[first + stop])
        else:
            label, found = _lay(columns, row, start, stop, at, shape.positions, image_token, tokens, mask)
            last.append(label)
            images += [_Image(place, columns.image(j), _one_of(variation, j)) for place, j in found]
    ends = pieces.at + pieces.stop - pieces.start
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    labels[-1] = 0
    labels[ends - 1] = last
    edges = np.unique(np.concatenate([pieces.at, ends, np.arange(rows + 1) * seq_length])).astype(np.int32)
    sizes, padding = np.diff(edges), np.isin(edges[:-1], pieces.at, assume_unique=True, invert=True)
    for begin, end in zip(edges[:-1][padding].tolist(), edges[1:][padding].tolist(), strict=True):
        mask[begin:end] = labels[begin:end] = 0
    begins_T = np.repeat(edges[:-1], sizes)
    sources = np.full(len(sizes), -1, np.int32)
    sources[~padding] = pieces.source
    return PackedBatch(
        tokens_T=tokens,
        labels_T=labels,
        loss_mask_T=mask,
        positions_T=np.subtract(_numbers(total), begins_T, out=begins_T),
        cu_seqlens=edges,
        piece_sources=sources,
        patches_IND=_patches(images if with_images else [], shape, each),
        image_starts_I=np.array([image.place for image in images], np.int64),
    )


@functools.lru_cache(4)
def _numbers(count: int) -> np.ndarray:
    """0, 1, ..., int32: read only."""
    return np.arange(count, dtype=np.int32)


def whole_documents(columns: Columns, seq_length: int, shape: ImageShape) -> tuple[Pieces, int]:
    """All documents of a batch, none cut, in rows of `seq_length` positions: for `assemble`, with the rows' number."""
    lengths = np.diff(columns.offsets) - 1 + np.diff(columns.image_offsets) * (shape.positions - 1)
    assert lengths.max() <= seq_length, f"a document takes {lengths.max()} positions, a row has {seq_length}"
    places, room, row = [], 0, 0
    for length in lengths.tolist():
        if length > room:
            row, room = row + 1, seq_length
        places.append(row * seq_length - room)
        room -= length
    rows = np.arange(len(lengths))
    nothing = np.zeros(len(rows), np.int64)
    return Pieces(
        columns=[columns] * len(rows),
        row=rows,
        first=np.full(len(rows), -1),
        start=nothing,
        stop=lengths.astype(np.int64),
        at=np.array(places, np.int64),
        source=nothing.astype(np.int32),
        variation=nothing.astype(np.uint64),
    ), row


@dataclass(frozen=True)
class _Image:
    place: int  # its first position in the batch
    data: np.ndarray
    variation: int | None


def _lay(
    columns: Columns,
    row: int,
    start: int,
    stop: int,
    at: int,
    width: int,
    image_token: int,
    tokens: np.ndarray,
    mask: np.ndarray,
) -> tuple[int, list[tuple[int, int]]]:
    """Lay one piece with images or roles. Position p of the document goes to at + p - start; an image takes `width`.

    Returns the label of its last position, and (place in the batch, number in `columns`) of its images.
    """
    first, length = int(columns.offsets[row]), int(columns.offsets[row + 1] - columns.offsets[row])
    numbers = range(columns.image_offsets[row], columns.image_offsets[row + 1])
    image_tokens = columns.image_at[numbers.start : numbers.stop].tolist()
    shift, begin, label, found = at - start, 0, image_token, []
    for k, end in enumerate([*image_tokens, length]):  # tokens [begin, end) stand behind k images
        wider = k * (width - 1)
        low, high = max(begin + wider, start), min(end + wider, stop)
        if low < high:
            tokens[low + shift : high + shift] = columns.tokens[first + low - wider : first + high - wider]
        if begin + wider <= stop < end + wider:
            label = int(columns.tokens[first + stop - wider])
        if k < len(numbers) and start <= end + wider < stop:
            place = end + wider + shift
            tokens[place : place + width] = image_token
            found.append((place, numbers[k]))
        begin = end + 1
    weight = columns.weights[row]
    mask[at : at + stop - start] = 0
    begin = 0
    for end, role in columns.spans(row) or [(length, 0)]:
        if LEARNED[role]:
            wider = bisect.bisect_left(image_tokens, begin) * (width - 1) - 1  # the label stands a position earlier
            mask[max(begin + wider, start) + shift : max(min(end + wider, stop), start) + shift] = weight
        begin = end
    return label, found


def _one_of(variation: int, number: int) -> int | None:
    """The variation of one image of a document."""
    return int(key_of(variation, number)) if variation else None


def _patches(images: list[_Image], shape: ImageShape, each: Callable[[Callable, Iterable], Iterable]) -> np.ndarray:
    patches = np.empty((len(images), shape.patches, shape.patch_dim), np.uint8)

    def fill(number: int) -> None:
        patches[number] = patchify(images[number].data, shape, images[number].variation)

    collections.deque(each(fill, range(len(images))), maxlen=0)
    return patches
