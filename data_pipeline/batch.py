"""A packed batch: what one micro-batch of one data-parallel rank looks like, and how it is made of pieces."""

import collections
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from armillary.data_pipeline.images import ImageShape, patchify
from armillary.data_pipeline.layout import Blank, Layout, address_of, lay_out, table_of
from armillary.data_pipeline.native import gather
from armillary.data_pipeline.shards import Columns

_NONE = np.empty(0, np.int64)
AT_ONCE = 4  # images that a thread decodes before it asks for more


@dataclass(frozen=True)
class PackedBatch:
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
    """What a batch is made of, one piece behind the other: stretches of tokens in memory, and runs of labels of one
    weight. Behind a piece's last stretch stands the label of its last position. Padding is a piece of source -1."""

    bounds: np.ndarray  # int64 [pieces + 1]: positions up to each piece, and in all
    source: np.ndarray  # int32 [pieces]
    address: np.ndarray  # int64 [stretches]: where its tokens begin
    count: np.ndarray  # int64 [stretches]: how many
    last: np.ndarray | None  # int64 [pieces]: its last stretch; None: each has one
    mask_bounds: np.ndarray  # int64 [runs + 1]: positions up to each run
    mask_value: np.ndarray  # float32 [runs]
    image_place: np.ndarray  # int64 [images]: the first position of each
    images: list[memoryview]  # their files; none for a rank that never sees them
    variations: np.ndarray  # uint64 [images]: names the random variation of each; 0: it is as it is
    held: list  # the owners of that memory: while these are here, it is


def joined(parts: list[Pieces]) -> Pieces:
    """The pieces of several parts behind each other."""
    if len(parts) == 1:
        return parts[0]
    found = {name: [] for name in Pieces._fields}
    found["bounds"], found["mask_bounds"] = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
    at, stretches = 0, 0
    for part in parts:
        found["bounds"].append(at + part.bounds[1:])
        found["last"].append(stretches + (np.arange(len(part.count)) if part.last is None else part.last))
        found["mask_bounds"].append(at + part.mask_bounds[1:])
        found["image_place"].append(at + part.image_place)
        found["images"] += part.images
        found["held"] += part.held
        for name in ("source", "address", "count", "mask_value", "variations"):
            found[name].append(getattr(part, name))
        at += int(part.bounds[-1])
        stretches += len(part.count)
    return Pieces(**{name: one if name in ("images", "held") else np.concatenate(one) for name, one in found.items()})


def assemble(
    pieces: Pieces, dtype: np.dtype, shape: ImageShape, each: Callable[[Callable, Iterable], Iterable] = map
) -> PackedBatch:
    """Copy pieces behind each other; `dtype` is that of the shards' tokens. `each` is `map`, or that of a pool of
    threads: it decodes the images."""
    positions = int(pieces.bounds[-1])
    tokens_T, behind = np.empty(positions, dtype), np.empty(len(pieces.count), dtype)
    gather(pieces.address, pieces.count, dtype.itemsize, tokens_T, behind)
    return PackedBatch(
        tokens_T=tokens_T,
        last_labels=behind if pieces.last is None else behind[pieces.last],
        mask_bounds=pieces.mask_bounds.astype(np.int32),
        mask_values=pieces.mask_value,
        cu_seqlens=pieces.bounds.astype(np.int32),
        piece_sources=pieces.source,
        patches_IND=_patches(pieces, shape, each),
        image_starts_I=pieces.image_place,
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
    layout = lay_out(
        documents_of(columns),
        [table_of(columns)],
        np.stack([of, np.zeros_like(of), length]),
        Blank(address_of(padding), address_of(image), shape.positions, dtype.itemsize),
    )
    source = np.where(of < 0, -1, 0).astype(np.int32)
    images = [columns.image(number) for number in range(len(layout.image_place))]
    unvaried = np.zeros(len(images), np.uint64)
    return pieces_of(layout, 0, len(of), source, images, unvaried, [columns, padding, image])


def documents_of(columns: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All documents of a batch, for `lay_out`."""
    address = address_of(columns.tokens) + columns.offsets[:-1].astype(np.int64) * columns.tokens.itemsize
    rows = np.arange(len(columns))
    return address, np.diff(columns.offsets).astype(np.int64), np.zeros_like(rows), rows


def pieces_of(
    layout: Layout,
    first: int,
    last: int,
    source: np.ndarray,
    images: list[memoryview],
    variations: np.ndarray,
    held: list,
) -> Pieces:
    """Pieces [first, last) of a layout; what else is given is of these."""
    at, before, count = layout.bounds[first], first - 1, last - first
    stretch, run, image = (
        (int(ends[before]) if first else 0, int(ends[last - 1]))
        for ends in (layout.stretch_ends, layout.mask_ends, layout.image_ends)
    )
    bounds = layout.bounds[first : last + 1] - at
    one_stretch, one_run = (
        stretch[1] - stretch[0] == count,
        run[1] - run[0] == count,
    )  # a piece, as each has one at least
    return Pieces(
        bounds=bounds,
        source=source,
        address=layout.address[stretch[0] : stretch[1]],
        count=layout.count[stretch[0] : stretch[1]],
        last=None if one_stretch else layout.stretch_ends[first:last] - (stretch[0] + 1),
        mask_bounds=bounds if one_run else layout.mask_bounds[run[0] : run[1] + 1] - at,
        mask_value=layout.mask_value[run[0] : run[1]],
        image_place=layout.image_place[image[0] : image[1]] - at if image[0] < image[1] else _NONE,
        images=images,
        variations=variations,
        held=held,
    )


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
