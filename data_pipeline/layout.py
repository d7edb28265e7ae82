"""Documents with images, roles or weights on positions: of any number of them, and of any pieces of them, at once.

An image takes `width` positions, of which each holds the image token. A document's tokens have one such token for each
image, so that its positions are its tokens, with width - 1 image tokens more before each image's own. A piece is made
of stretches of the document's tokens, and stretches of image tokens between them; and what stands in memory behind its
last stretch is the label of its last position.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Documents:
    """n documents. Those of their images and spans that belong to document i end at image_ends[i] and span_ends[i]."""

    address: np.ndarray  # int64 [n]: where its first token is
    tokens: np.ndarray  # int64 [n]: how many it has
    weight: np.ndarray  # float32 [n]
    image_at: np.ndarray  # int64 [images]: the token that stands for each
    image_ends: np.ndarray  # int64 [n]
    span_end: np.ndarray  # int64 [spans]: tokens of the document up to and with each span
    span_learned: np.ndarray  # bool [spans]
    span_ends: np.ndarray  # int64 [n]; a document without spans is learned whole


@dataclass(frozen=True)
class Laid:
    """Which pieces of a batch are of such documents (int64 [laid] each): pieces[i] is positions [start[i], stop[i]) of
    document[i]. They cut no image."""

    pieces: np.ndarray
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray


@dataclass(frozen=True)
class Layout:
    """m pieces, one behind the other. Piece i has the stretches up to stretch_ends[i], and so on (int64 [m])."""

    bounds: np.ndarray  # int64 [m + 1]: positions up to each piece, and in all
    address: np.ndarray  # int64 [stretches]: where its tokens are
    count: np.ndarray  # int64 [stretches]: how many
    of_image: np.ndarray  # bool [stretches]: they are image tokens, of no document
    stretch_ends: np.ndarray
    mask_bounds: np.ndarray  # int64 [runs + 1]: positions up to each run of labels of one weight
    mask_value: np.ndarray  # float32 [runs]
    mask_ends: np.ndarray
    image_place: np.ndarray  # int64 [images]: the first position of each
    image_number: np.ndarray  # int64 [images]: of its document's
    image_ends: np.ndarray


def plain(length: np.ndarray, address: np.ndarray, value: np.ndarray) -> Layout:
    """Pieces of nothing but their tokens: lengths, where the tokens are, and the weight of the labels; [m] each."""
    bounds, ends = np.cumsum(np.append(0, length)), np.arange(1, len(length) + 1)
    none = np.empty(0, np.int64)
    return Layout(
        bounds, address, length, np.zeros(len(length), bool), ends,
        bounds, value, ends, none, none, np.zeros(len(length), np.int64),
    )  # fmt: skip


def lay_out(pieces: Layout, documents: Documents, laid: Laid, width: int, itemsize: int, blank: int) -> Layout:
    """Put the pieces that `laid` names in their places among plain ones.

    width: positions of an image; itemsize: bytes of a token; blank: where width image tokens are.
    """
    images = np.diff(documents.image_ends, prepend=0)
    size = documents.tokens + images * (width - 1)
    begin = np.cumsum(size) - size  # the documents' positions, one behind the other
    of = np.repeat(np.arange(len(images)), images)
    number = np.arange(len(of)) - (documents.image_ends - images)[of]
    image_begin = begin[of] + documents.image_at + number * (width - 1)
    low, high = begin[laid.document] + laid.start, begin[laid.document] + laid.stop
    shift = pieces.bounds[laid.pieces] - low  # from there to where they go

    starts = np.concatenate([begin, image_begin, image_begin + width - 1])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.append(starts[order][1:], size.sum())
    from_image = documents.address[of] + documents.image_at * itemsize
    address = np.concatenate([documents.address, np.full(len(of), blank), from_image])[order]
    of_image = (order >= len(begin)) & (order < len(begin) + len(of))
    piece, stretch, stretch_counts = _overlaps(starts, low, high)
    first = np.maximum(starts[stretch], low[piece])
    into = first - starts[stretch]  # 0 in an image, which no piece cuts

    run_begin, run_value = _learned(documents, begin, images, width)
    run_piece, run, run_counts = _overlaps(run_begin, low, high)
    run_at = np.maximum(run_begin[run], low[run_piece]) + shift[run_piece]

    shown_from = np.searchsorted(image_begin, low)
    shown_counts = np.searchsorted(image_begin, high) - shown_from
    image_piece, image = ranges(shown_from, shown_counts)

    stretches, own_stretch = _among(pieces, laid, stretch_counts)
    runs, own_run = _among(pieces, laid, run_counts)
    shown = np.zeros(len(pieces.count), np.int64)
    shown[laid.pieces] = shown_counts
    return Layout(
        bounds=pieces.bounds,
        address=_put(pieces.address, stretches, own_stretch, address[stretch] + into * itemsize),
        count=_put(pieces.count, stretches, own_stretch, np.minimum(ends[stretch], high[piece]) - first),
        of_image=_put(pieces.of_image, stretches, own_stretch, of_image[stretch]),
        stretch_ends=np.cumsum(stretches),
        mask_bounds=np.append(_put(pieces.bounds[:-1], runs, own_run, run_at), pieces.bounds[-1]),
        mask_value=_put(pieces.mask_value, runs, own_run, run_value[run]),
        mask_ends=np.cumsum(runs),
        image_place=image_begin[image] + shift[image_piece],
        image_number=number[image],
        image_ends=np.cumsum(shown),
    )


def _among(pieces: Layout, laid: Laid, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Laid pieces have `counts` items, the others one: how many each has, and which items are of laid pieces."""
    each = np.ones(len(pieces.count), np.int64)
    each[laid.pieces] = counts
    return each, ranges((np.cumsum(each) - each)[laid.pieces], counts)[1]


def _put(plain: np.ndarray, each: np.ndarray, own: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The items of all pieces, of which `values` are those at `own`."""
    found = np.repeat(plain, each)
    found[own] = values
    return found


def _learned(documents: Documents, begin: np.ndarray, images: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """From which position on labels have which weight; a label stands a position before its token."""
    spans = np.diff(documents.span_ends, prepend=0)
    of = np.repeat(np.arange(len(spans)), spans)
    token = np.append(0, documents.span_end[:-1])[: len(of)]
    token[(documents.span_ends - spans)[spans > 0]] = 0
    tokens_before = np.cumsum(documents.tokens) - documents.tokens
    image_token = np.repeat(tokens_before, images) + documents.image_at
    before = np.searchsorted(image_token, tokens_before[of] + token) - (documents.image_ends - images)[of]
    at = np.maximum(begin[of] + token + before * (width - 1) - 1, begin[of])
    whole = np.flatnonzero(spans == 0)
    starts = np.concatenate([begin[whole], at])
    order = np.argsort(starts, kind="stable")
    values = np.concatenate([documents.weight[whole], np.where(documents.span_learned, documents.weight[of], 0)])
    return starts[order], values[order].astype(np.float32)


def _overlaps(starts: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stretches begin at `starts` and end where the next one begins. Which of them the intervals [low, high) overlap:
    (interval, stretch) of each overlap, interval by interval, and how many each has."""
    first = np.searchsorted(starts, low, side="right") - 1
    count = np.searchsorted(starts, high, side="left") - first
    return *ranges(first, count), count


def ranges(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """first[i], first[i] + 1, ..., count[i] of them, for each i: (i, number) of each."""
    ends, of = np.cumsum(count), np.repeat(np.arange(len(count)), count)
    return of, first[of] + np.arange(len(of)) - (ends - count)[of]
