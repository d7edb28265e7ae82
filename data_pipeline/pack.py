"""Packing a block's documents into rows of a fixed length: pure functions of their lengths."""

import bisect
from dataclasses import dataclass

import numpy as np

from armillary.data_pipeline.shuffle import permute


@dataclass(frozen=True)
class Parts:
    """What is packed: a document, or a part of one, of a length above 0; int64 [n] each.

    Part i is the input positions [start[i], start[i] + length[i]) of document[i], with `images[i]` images in it.
    Parts without images may be cut at any position, the others not at all.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    images: np.ndarray


@dataclass(frozen=True)
class Packed:
    """Rows: pieces [row_ends[r - 1], row_ends[r]) make up row r. Piece i is positions [start[i], stop[i]) of
    document[i]; int64. Document -1 is padding."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    row_ends: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.row_ends)

    @property
    def positions(self) -> int:
        """Positions filled; the rest of the rows is padding."""
        return int((self.stop - self.start)[self.document >= 0].sum())


def one_a_row(documents: int, seq_length: int) -> Packed:
    """Rows of one document each, all of `seq_length` positions."""
    numbers, nothing = np.arange(documents), np.zeros(documents, np.int64)
    return Packed(document=numbers, start=nothing, stop=nothing + seq_length, row_ends=numbers + 1)


def greedy(parts: Parts, seq_length: int, max_images: int) -> Packed:
    """Fill rows in the order of the parts; what is cut off opens the next row, and what may not be cut, too.

    A row holds at most `seq_length` positions and `max_images` images; parts with images must fit in a row.
    """
    ends, whole = np.cumsum(parts.length), parts.images > 0
    total = int(ends[-1]) if len(ends) else 0
    if whole.any():
        images = np.cumsum(parts.images)
        bounds = np.array(_bounds(ends, whole, images, seq_length, None), np.int64)
        held = np.append(0, images)[np.searchsorted(ends, bounds, side="right")]  # a row's end cuts no images
        if np.diff(held, prepend=0).max() > max_images:
            bounds = np.array(_bounds(ends, whole, images, seq_length, max_images), np.int64)
    else:
        bounds = np.minimum(np.arange(seq_length, total + seq_length, seq_length), total)
    last = np.searchsorted(ends, bounds, side="left")  # the part that each row ends in or with
    inside = bounds < ends[last]
    cut = last[inside]
    before = np.cumsum(inside) - inside  # cuts that come before each row's end
    part = np.repeat(np.arange(len(ends)), np.bincount(cut, minlength=len(ends)) + 1)
    begins = ends - parts.length
    starts = begins[part]
    starts[cut + before[inside] + 1] = bounds[inside]
    into = starts - (begins - parts.start)[part]
    return Packed(
        document=parts.document[part],
        start=into,
        stop=into + np.diff(starts, append=total),
        row_ends=last + before + 1,
    )


def _bounds(
    ends: np.ndarray, whole: np.ndarray, image_ends: np.ndarray, seq_length: int, max_images: int | None
) -> list[int]:
    """Where rows end in the stream of all parts; max_images None: a row may hold any number."""
    part_ends, images_before, may_not_cut = ends.tolist(), image_ends.tolist(), whole.tolist()
    total, at, crossing, bounds = part_ends[-1], 0, 0, []
    while at < total:
        limit = at + seq_length
        if max_images is not None:
            first = bisect.bisect_right(part_ends, at)  # the part that the row opens with
            budget = (images_before[first - 1] if first else 0) + max_images
            over = bisect.bisect_right(images_before, budget)  # the part whose images are too many
            if over < len(part_ends):
                limit = min(limit, part_ends[over - 1])
        if limit < total:
            crossing = bisect.bisect_right(part_ends, limit, crossing)
            if may_not_cut[crossing]:
                limit = part_ends[crossing - 1] if crossing else 0
        else:
            limit = total
        at = limit
        bounds.append(at)
    return bounds


def padded(packed: Packed, seq_length: int) -> Packed:
    """The same rows, each filled to `seq_length` positions: a piece of padding behind those that are not full."""
    row_starts = np.concatenate([[0], packed.row_ends[:-1]])[: packed.rows]
    lengths = packed.stop - packed.start
    room = seq_length - (np.add.reduceat(lengths, row_starts) if packed.rows else lengths)
    short = np.flatnonzero(room)
    if not len(short):
        return packed
    behind = packed.row_ends[short]
    return Packed(
        document=np.insert(packed.document, behind, -1),
        start=np.insert(packed.start, behind, 0),
        stop=np.insert(packed.stop, behind, room[short]),
        row_ends=packed.row_ends + np.cumsum(room > 0),
    )


def best_fit(parts: Parts, seq_length: int, max_images: int, key: np.uint64) -> Packed:
    """Put each part, the longest first, into the fullest row that has room for it (best-fit decreasing; Ding et al.
    2024, "Fewer Truncations Improve Language Modeling", section 3): only parts longer than a row are cut.

    The rows come in an order that `key` names, or those of long documents would come first.
    """
    pieces = _cut_long(parts, seq_length)
    rooms = 0  # bit n is set where some row has room for exactly n positions
    rows_with: list[list[int]] = [[] for _ in range(seq_length + 1)]
    images_in: list[int] = []
    row_of = np.empty(len(pieces.length), np.int64)
    lengths, images = pieces.length.tolist(), pieces.images.tolist()
    for piece in np.argsort(-pieces.length, kind="stable").tolist():
        length, count = lengths[piece], images[piece]
        found = _room_for(rooms >> length << length, rows_with, images_in, max_images - count)
        if found is None:
            row, room = len(images_in), seq_length
            images_in.append(0)
        else:
            room, place = found
            row = rows_with[room].pop(place)
            if not rows_with[room]:
                rooms ^= 1 << room
        images_in[row] += count
        row_of[piece] = row
        if room > length:
            rows_with[room - length].append(row)
            rooms |= 1 << (room - length)
    shuffled = permute(np.arange(len(images_in)), len(images_in), key)[row_of]
    order = np.argsort(shuffled, kind="stable")
    return Packed(
        document=pieces.document[order],
        start=pieces.start[order],
        stop=(pieces.start + pieces.length)[order],
        row_ends=np.searchsorted(shuffled[order], np.arange(len(images_in)), side="right"),
    )


def _room_for(rooms: int, rows_with: list[list[int]], images_in: list[int], images: int) -> tuple[int, int] | None:
    """The least of these rooms with a row that holds at most `images` images: (room, place in rows_with[room])."""
    while rooms:
        room = (rooms & -rooms).bit_length() - 1
        for place in reversed(range(len(rows_with[room]))):
            if images_in[rows_with[room][place]] <= images:
                return room, place
        rooms &= rooms - 1
    return None


def _cut_long(parts: Parts, seq_length: int) -> Parts:
    """Parts of at most a row each: those that are longer are cut into whole rows and a rest."""
    pieces = np.maximum(-(-parts.length // seq_length), 1)
    of = np.repeat(np.arange(len(parts.length)), pieces)
    offset = (np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * seq_length
    return Parts(
        document=parts.document[of],
        start=parts.start[of] + offset,
        length=np.minimum(parts.length[of] - offset, seq_length),
        images=parts.images[of],
    )


def cut_between_images(
    length: int, image_starts: list[int], positions: int, seq_length: int, max_images: int
) -> list[int]:
    """Where to cut a document with images that is longer than a row: the parts' starts, from 0.

    Each part holds at most `seq_length` positions and `max_images` images, none of them cut. An image takes
    `positions` positions, at most a row.
    """
    starts, at, seen = [0], 0, 0
    while True:
        limit = at + seq_length
        if seen + max_images < len(image_starts):
            limit = min(limit, image_starts[seen + max_images])
        if limit >= length:
            return starts
        inside = bisect.bisect_left(image_starts, limit) - 1
        if inside >= 0 and image_starts[inside] < limit < image_starts[inside] + positions:
            limit = image_starts[inside]
        at, seen = limit, bisect.bisect_left(image_starts, limit)
        starts.append(at)
