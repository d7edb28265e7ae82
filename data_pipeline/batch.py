"""A packed batch: what one micro-batch of one data-parallel rank looks like, and how it is made of pieces."""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from armillary.data_pipeline import layout
from armillary.data_pipeline.images import ImageShape, patchify
from armillary.data_pipeline.layout import Blank, Layout, address_of, table_of
from armillary.data_pipeline.native import gather
from armillary.data_pipeline.shards import Columns

AT_ONCE = 4  # images that a thread decodes before it asks for more


class PackedBatch(NamedTuple):
    """Several rows of packed documents, flattened to T = rows x seq_length positions.

    Documents never see each other: attention is causal within each [cu_seqlens[i], cu_seqlens[i+1]).
    An image takes `ImageShape.positions` consecutive positions, whose tokens are all the image token. What follows
    from the fields is not stored, since a device makes it faster than it is sent.
    """

    tokens_T: np.ndarray  # uint16 or uint32, as in the shards
    last_labels: np.ndarray  # [pieces], the same: the token that follows each piece in its document; 0 for padding
    mask_bounds: np.ndarray  # int32 [runs + 1]: positions up to each run of labels with one weight
    mask_values: np.ndarray  # float32 [runs]: the labels' weight in the loss, 0 where they are not learned
    cu_seqlens: np.ndarray  # int32 [pieces + 1]; padding is a piece of its own
    piece_sources: np.ndarray  # int32 [pieces]: number of the source in `data.sources`; -1: padding
    patches_IND: np.ndarray  # uint8: images x patches x patch_dim
    image_starts_I: np.ndarray  # int64: first position of each image

    @property
    def labels_T(self) -> np.ndarray:
        """The next token of the same document, of the tokens' dtype."""
        labels_T = np.empty_like(self.tokens_T)
        labels_T[:-1] = self.tokens_T[1:]
        labels_T[self.cu_seqlens[1:] - 1] = self.last_labels
        return labels_T

    @property
    def loss_mask_T(self) -> np.ndarray:
        """The weight of each label in the loss, float32."""
        return np.repeat(self.mask_values, np.diff(self.mask_bounds))

    @property
    def positions_T(self) -> np.ndarray:
        """Of each position, how far it is from the beginning of its piece, int32."""
        begins_T = np.repeat(self.cu_seqlens[:-1], np.diff(self.cu_seqlens))
        return np.subtract(_numbers(len(begins_T)), begins_T, out=begins_T)

    @property
    def piece_ids_T(self) -> np.ndarray:
        """The piece of each position, int32."""
        return np.repeat(np.arange(len(self.piece_sources), dtype=np.int32), np.diff(self.cu_seqlens))

    @property
    def source_ids_T(self) -> np.ndarray:
        """The source of each position, int32; -1: padding."""
        return np.repeat(self.piece_sources, np.diff(self.cu_seqlens))


class Pieces(NamedTuple):
    """What a batch is made of. Padding is a piece of source -1."""

    layout: Layout
    source: np.ndarray  # int32 [pieces]
    images: list[memoryview]  # the images' files; none for a rank that never sees them
    variations: np.ndarray  # uint64 [images]: names the random variation of each; 0: it is as it is
    held: list  # the owners of the memory that the layout is of: while these are here, it is


def joined(parts: list[Pieces]) -> Pieces:
    """The pieces of several parts behind each other."""
    if len(parts) == 1:
        return parts[0]
    layouts, sources, images, variations, held = zip(*parts, strict=True)
    images, held = (list(itertools.chain.from_iterable(lists)) for lists in (images, held))
    return Pieces(layout.joined(layouts), np.concatenate(sources), images, np.concatenate(variations), held)


def assemble(
    pieces: Pieces, dtype: np.dtype, shape: ImageShape, each: Callable[[Callable, Iterable], Iterable] = map
) -> PackedBatch:
    """Copy pieces behind each other; `dtype` is that of the shards' tokens. `each` is `map`, or that of a pool of
    threads: it decodes the images."""
    made = pieces.layout
    tokens_T, last_labels = np.empty(made.bounds[-1], dtype), np.empty(len(made.last), dtype)
    gather(made.address, made.count, made.last, dtype.itemsize, tokens_T, last_labels)
    return PackedBatch(
        tokens_T=tokens_T,
        last_labels=last_labels,
        mask_bounds=made.mask_bounds,
        mask_values=made.mask_value,
        cu_seqlens=made.bounds,
        piece_sources=pieces.source,
        patches_IND=_patches(pieces, shape, each),
        image_starts_I=made.image_place,
    )


@functools.lru_cache(4)
def _numbers(count: int) -> np.ndarray:
    """0, 1, ..., int32: read only."""
    return np.arange(count, dtype=np.int32)


def whole_documents(columns: Columns, seq_length: int, shape: ImageShape, image_token: int) -> Pieces:
    """All documents of a batch, of two tokens or more and none cut, in rows of `seq_length` positions."""
    dtype = columns.tokens.dtype
    lengths = np.diff(columns.offsets) - 1 + np.diff(columns.image_offsets) * (shape.positions - 1)
    assert lengths.min() > 0, "a document has no position"
    assert lengths.max() <= seq_length, f"a document takes {lengths.max()} positions, a row has {seq_length}"
    document, length, room = [], [], seq_length  # of pieces; padding is document -1
    for number, positions in enumerate(lengths.tolist()):
        if positions > room:
            if room:
                document.append(-1)
                length.append(room)
            room = seq_length
        document.append(number)
        length.append(positions)
        room -= positions
    if room:
        document.append(-1)
        length.append(room)
    of = np.array(document)
    padding, image = np.zeros(seq_length + 1, dtype), np.full(shape.positions + 1, image_token, dtype)
    blank = Blank(address_of(padding), address_of(image), shape.positions, dtype.itemsize)
    start, tables = np.zeros_like(of), table_of(columns)[None]
    made = layout.lay_out(documents_of(columns), tables, of, start, np.array(length), blank)
    images = [columns.image(number) for number in range(len(made.image_place))]
    unvaried = np.zeros(len(images), np.uint64)
    return Pieces(made, np.where(of < 0, -1, 0).astype(np.int32), images, unvaried, [columns, padding, image])


def documents_of(columns: Columns) -> np.ndarray:
    """All documents of a batch, for `lay_out`."""
    address = address_of(columns.tokens) + columns.offsets[:-1].astype(np.int64) * columns.tokens.itemsize
    rows = np.arange(len(columns))
    return np.stack([address, np.diff(columns.offsets).astype(np.int64), np.zeros_like(rows), rows])


@functools.cache
def _no_patches(shape: ImageShape) -> np.ndarray:
    return np.empty((0, shape.patches, shape.patch_dim), np.uint8)


def _patches(pieces: Pieces, shape: ImageShape, each: Callable[[Callable, Iterable], Iterable]) -> np.ndarray:
    if not pieces.images:
        return _no_patches(shape)
    patches = np.empty((len(pieces.images), shape.patches, shape.patch_dim), np.uint8)

    def fill(first: int) -> None:
        for number in range(first, min(first + AT_ONCE, len(patches))):
            patchify(pieces.images[number], shape, int(pieces.variations[number]) or None, patches[number])

    collections.deque(each(fill, range(0, len(patches), AT_ONCE)), maxlen=0)
    return patches
