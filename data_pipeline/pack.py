"""Packing documents into rows of a fixed length: a pure function of lengths and cursor."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from armillary.data_pipeline.cursor import Cursor


@dataclass(frozen=True)
class Piece:
    """Input positions [start, stop) of one sample."""

    sample: int
    start: int
    stop: int


Lengths = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


def pack(cursor: Cursor, rows: int, seq_length: int, lengths: Lengths) -> tuple[list[list[Piece]], Cursor]:
    """Fill `rows` rows of `seq_length` positions, in sample order, from `cursor` on.

    lengths(start, count) gives, for samples [start, start + count), their input lengths (int64 [count]) and
    whether they may be cut at a row's end (bool [count]). What is cut off opens the next row. A document with
    images is never cut: it opens a new row where it does not fit, so its length must be at most `seq_length`.
    Returns the rows' pieces and the cursor after them.
    """
    packed: list[list[Piece]] = []
    row: list[Piece] = []
    room, sample, carry = seq_length, cursor.sample, cursor.carry
    base, window, cuttable = sample, np.empty(0, np.int64), np.empty(0, bool)
    while len(packed) < rows:
        if sample - base >= len(window):
            base = sample
            window, cuttable = lengths(base, 256)
        length, may_cut = int(window[sample - base]), bool(cuttable[sample - base])
        take = min(length - carry, room)
        if take < length - carry and not may_cut:
            assert row, f"sample {sample} of {length} positions cannot be cut and is longer than a row"
            take, room = 0, 0
        if take:
            row.append(Piece(sample, carry, carry + take))
            room, carry = room - take, carry + take
        if carry == length:
            sample, carry = sample + 1, 0
        if room == 0:
            packed.append(row)
            row, room = [], seq_length
    return packed, Cursor(sample=sample, carry=carry)
