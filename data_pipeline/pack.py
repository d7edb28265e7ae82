"""Packing a block's documents into rows of a fixed length: pure functions of their lengths."""

from dataclasses import dataclass

import numpy as np

from armillary.data_pipeline import native
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


def greedy(parts: Parts, seq_length: int, max_images: int, alone: bool = False) -> Packed:
    """Fill rows in the order of the parts, each to `seq_length` positions: with what is cut off the next row opens, and
    with what may not be cut and has no room, too. `alone`: each document opens a row.

    A row holds at most `max_images` images; ValueError where parts with images do not fit in one.
    """
    columns = np.stack([parts.document, parts.start, parts.length, parts.images])
    pieces, row_ends = (np.frombuffer(one, np.int64) for one in native.fill(columns, seq_length, max_images, alone))
    return Packed(*pieces.reshape(3, -1), row_ends)


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
    packed = Packed(
        document=pieces.document[order],
        start=pieces.start[order],
        stop=(pieces.start + pieces.length)[order],
        row_ends=np.searchsorted(shuffled[order], np.arange(len(images_in)), side="right"),
    )
    return _padded(packed, seq_length)


def _padded(packed: Packed, seq_length: int) -> Packed:
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
    parts: Parts, long: np.ndarray, image_starts: np.ndarray, width: int, seq_length: int, max_images: int
) -> Parts:
    """The same, but parts `long` (int64 [n], ascending), each a whole document with images, cut so that each fits in a
    row, with none of its images cut.

    image_starts: int64 [images of these documents], the first position of each in its document; it takes `width`.
    """
    held, length = parts.images[long], parts.length[long]
    of, before = np.repeat(np.arange(len(long)), held), np.cumsum(held) - held
    stretches = 2 * held + 1  # text, image, text, ..., image, text; a text may be of no length
    ends = np.cumsum(stretches)
    image = (ends - stretches)[of] + 2 * (np.arange(len(of)) - before[of]) + 1
    start, images = np.zeros(int(stretches.sum()), np.int64), np.zeros(int(stretches.sum()), np.int64)
    start[image], start[image + 1], images[image] = image_starts, image_starts + width, 1
    stop = np.append(start[1:], 0)
    stop[ends - 1] = length
    filled = stop > start
    document = np.repeat(np.arange(len(long)), stretches)
    rows = greedy(
        Parts(document[filled], start[filled], (stop - start)[filled], images[filled]), seq_length, max_images, True
    )

    opening = np.append(0, rows.row_ends[:-1])  # a row has stretches of one document, which follow each other
    document, start = rows.document[opening], rows.start[opening]
    begin = np.cumsum(length) - length  # the documents' positions, one behind the other
    at = np.append(begin[document] + start, length.sum())
    shown = np.searchsorted(begin[of] + image_starts, at)
    cut, counts = np.zeros(len(parts.length), bool), np.ones(len(parts.length), np.int64)
    cut[long], counts[long] = True, np.bincount(document)
    own = np.repeat(cut, counts)
    found = Parts(*(np.repeat(column, counts) for column in (parts.document, parts.start, parts.length, parts.images)))
    found.start[own], found.length[own], found.images[own] = start, np.diff(at), np.diff(shown)
    return found
