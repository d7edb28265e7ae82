"""A packed batch: what one micro-batch of one data-parallel rank looks like, and how it is made of documents."""

import bisect
import collections
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from armillary.data_pipeline.document import LEARNED
from armillary.data_pipeline.gather import gather
from armillary.data_pipeline.images import ImageShape, patchify
from armillary.data_pipeline.shards import Columns
from armillary.data_pipeline.shuffle import key_of


@dataclass(frozen=True)
class PackedBatch:
    """Several rows of packed documents, flattened to T = rows x seq_length positions.

    Documents never see each other: attention is causal within each [cu_seqlens[i], cu_seqlens[i+1]).
    An image takes `ImageShape.positions` consecutive positions, whose tokens are all the image token. What follows
    from the fields is not stored, since a device makes it faster than it is sent.
    """

    tokens_T: np.ndarray  # uint16 or uint32, as in the shards
    last_labels: np.ndarray  # [pieces], the same: the token that follows each piece in its document; 0 for padding
    loss_mask_T: np.ndarray  # float32: the weight of the label in the loss, 0 where it is not learned
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


@dataclass(frozen=True)
class Laid:
    """A piece of a document with images, roles or a weight: its input positions [start, stop)."""

    columns: Columns  # where the document is
    row: int  # its number there
    start: int
    stop: int
    variation: int = 0  # names the random variation of its images; 0: as they are


@dataclass(frozen=True)
class Pieces:
    """What a batch is made of, one piece behind the other. Padding is a piece of source -1, over `blank`.

    A piece is a stretch of tokens in memory, and behind it stands the label of its last position. A piece that `laid`
    has is made of more; its own stretch is an empty one of `blank`.
    """

    bounds: np.ndarray  # int64 [pieces + 1]: positions up to each piece, and in all
    source: np.ndarray  # int32
    address: np.ndarray  # int64: where its tokens begin
    count: np.ndarray  # int64: how many
    held: list  # what owns the memory, which stays for so long
    laid: dict[int, Laid] = field(default_factory=dict)


def joined(parts: list[Pieces]) -> Pieces:
    """The pieces of several parts behind each other."""
    if len(parts) == 1:
        return parts[0]
    laid, bounds, count, before = {}, [np.zeros(1, np.int64)], 0, 0
    for part in parts:
        laid |= {count + number: piece for number, piece in part.laid.items()}
        bounds.append(before + part.bounds[1:])
        count += len(part.count)
        before += int(part.bounds[-1])
    columns = ([getattr(part, name) for part in parts] for name in ("source", "address", "count"))
    held = [owner for part in parts for owner in part.held]
    return Pieces(np.concatenate(bounds), *map(np.concatenate, columns), held, laid)


def assemble(
    pieces: Pieces,
    dtype: np.dtype,
    shape: ImageShape,
    image_token: int,
    *,
    with_images: bool = True,
    each: Callable[[Callable, Iterable], Iterable] = map,
) -> PackedBatch:
    """Lay pieces behind each other; `dtype` is that of the shards' tokens.

    `with_images=False` leaves the patches out, for a rank that never sees them. `each` is `map`, or that of a pool
    of threads: it decodes the images.
    """
    bounds, address, count = pieces.bounds, pieces.address, pieces.count
    mask_T = _ones(int(bounds[-1]))
    padding = (pieces.source < 0).nonzero()[0].tolist()
    if pieces.laid or padding:
        mask_T = mask_T.copy()
    laid = {
        number: _lay(piece, int(bounds[number]), shape, image_token, mask_T) for number, piece in pieces.laid.items()
    }
    if laid:
        address, count, last = _spliced(pieces, laid)
    tokens_T, last_labels = np.empty(len(mask_T), dtype), np.empty(len(count), dtype)
    gather(address, count, dtype.itemsize, tokens_T, last_labels)
    if laid:
        last_labels = last_labels[last]
        last_labels[list(laid)] = [piece.label for piece in laid.values()]
    for number in padding:
        mask_T[bounds[number] : bounds[number + 1]] = 0
    images = [image for _, piece in sorted(laid.items()) for image in piece.images]
    return PackedBatch(
        tokens_T=tokens_T,
        last_labels=last_labels,
        loss_mask_T=mask_T,
        cu_seqlens=bounds.astype(np.int32),
        piece_sources=pieces.source,
        patches_IND=_patches(images if with_images else [], shape, each),
        image_starts_I=np.array([image.place for image in images], np.int64),
    )


def _spliced(pieces: Pieces, laid: dict[int, "_LaidOut"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The addresses and counts of all stretches, and which of them is the last of each piece."""
    stretches = np.ones(len(pieces.count), np.int64)
    stretches[list(laid)] = [len(piece.stretches) for piece in laid.values()]
    last = np.cumsum(stretches) - 1
    address, count = np.repeat(pieces.address, stretches), np.repeat(pieces.count, stretches)
    for number, piece in laid.items():
        where = slice(last[number] + 1 - len(piece.stretches), last[number] + 1)
        address[where], count[where] = zip(*piece.stretches, strict=True)
    return address, count, last


@functools.lru_cache(4)
def _ones(count: int) -> np.ndarray:
    """Shared, so that it cannot be written to."""
    ones = np.ones(count, np.float32)
    ones.flags.writeable = False
    return ones


@functools.lru_cache(4)
def _numbers(count: int) -> np.ndarray:
    """0, 1, ..., int32: read only."""
    return np.arange(count, dtype=np.int32)


@functools.cache
def blank(count: int, dtype: np.dtype, token: int = 0) -> np.ndarray:
    """A token, `count` times and once more. It is never freed, so that its address can be handed on."""
    return np.full(count + 1, token, dtype)


def address_of(array: np.ndarray) -> int:
    """Where an array's numbers begin in memory."""
    return array.__array_interface__["data"][0]


def whole_documents(columns: Columns, seq_length: int, shape: ImageShape) -> Pieces:
    """All documents of a batch, none cut, in rows of `seq_length` positions: for `assemble`."""
    lengths = np.diff(columns.offsets) - 1 + np.diff(columns.image_offsets) * (shape.positions - 1)
    assert lengths.max() <= seq_length, f"a document takes {lengths.max()} positions, a row has {seq_length}"
    length, source, laid, room = [], [], {}, seq_length
    for row, positions in enumerate(lengths.tolist()):
        if positions > room:
            length.append(room)
            source.append(-1)
            room = seq_length
        laid[len(length)] = Laid(columns, row, 0, positions)
        length.append(positions)
        source.append(0)
        room -= positions
    if room:
        length.append(room)
        source.append(-1)
    address = np.full(len(length), address_of(blank(seq_length, columns.tokens.dtype)))
    count = np.where(np.array(source) < 0, length, 0)
    return Pieces(np.cumsum([0, *length]), np.array(source, np.int32), address, count, [columns], laid)


@dataclass(frozen=True)
class _Image:
    place: int  # its first position in the batch
    data: np.ndarray
    variation: int | None


@dataclass(frozen=True)
class _LaidOut:
    stretches: list[tuple[int, int]]  # (address, count)
    label: int  # of its last position
    images: list[_Image]


def _lay(piece: Laid, at: int, shape: ImageShape, image_token: int, mask_T: np.ndarray) -> _LaidOut:
    """Lay one piece. Position p of the document goes to at + p - start of the batch; an image takes several."""
    columns, row, start, stop, width = piece.columns, piece.row, piece.start, piece.stop, shape.positions
    first, length = int(columns.offsets[row]), int(columns.offsets[row + 1] - columns.offsets[row])
    numbers = range(columns.image_offsets[row], columns.image_offsets[row + 1])
    image_tokens = columns.image_at[numbers.start : numbers.stop].tolist()
    dtype = columns.tokens.dtype
    image = address_of(blank(width, dtype, image_token))
    shift, begin, label, stretches, found = at - start, 0, image_token, [], []
    for k, end in enumerate([*image_tokens, length]):  # tokens [begin, end) stand behind k images
        wider = k * (width - 1)
        low, high = max(begin + wider, start), min(end + wider, stop)
        if low < high:
            stretches.append((columns.address + (low + first - wider) * dtype.itemsize, high - low))
        if begin + wider <= stop < end + wider:
            label = int(columns.tokens[first + stop - wider])
        if k < len(numbers) and start <= end + wider < stop:
            stretches.append((image, min(width, stop - end - wider)))
            variation = int(key_of(piece.variation, numbers[k])) if piece.variation else None
            found.append(_Image(end + wider + shift, columns.image(numbers[k]), variation))
        begin = end + 1
    weight = columns.weights[row]
    mask_T[at : at + stop - start] = 0
    begin = 0
    for end, role in columns.spans(row) or [(length, 0)]:
        if LEARNED[role]:
            wider = bisect.bisect_left(image_tokens, begin) * (width - 1) - 1  # the label stands a position earlier
            mask_T[max(begin + wider, start) + shift : max(min(end + wider, stop), start) + shift] = weight
        begin = end
    return _LaidOut(stretches, label, found)


@functools.cache
def _no_patches(shape: ImageShape) -> np.ndarray:
    return np.empty((0, shape.patches, shape.patch_dim), np.uint8)


def _patches(images: list[_Image], shape: ImageShape, each: Callable[[Callable, Iterable], Iterable]) -> np.ndarray:
    if not images:
        return _no_patches(shape)
    patches = np.empty((len(images), shape.patches, shape.patch_dim), np.uint8)

    def fill(number: int) -> None:
        patches[number] = patchify(images[number].data, shape, images[number].variation)

    collections.deque(each(fill, range(len(images))), maxlen=0)
    return patches
