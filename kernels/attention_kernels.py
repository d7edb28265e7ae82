"""Attention's kernels: FlashAttention-2 (Dao 2023, algorithms 1 and 2) over packed documents, without atomic additions.

A row of `blocks` (int32 [3]) is a block of one document: where the document starts, its length, and the block's first
position in it. Exponents are of 2, so `scale` has log2(e) in it. Offsets along positions are of 64 bits.

With TMA, a program describes its document's rows of a head to the hardware, which gives zeros behind the last of them.

Given a `shift`, queries (and o, do, lse, delta, dq) are there from this position on only, keys and values from the
first: their pointers are moved to where position 0 would be, and nothing is loaded or stored in front of `shift`.
"""

import triton
import triton.language as tl

LN2, LOG2E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)


@triton.jit
def _block(blocks_ptr, number):
    """A document's start and length, and the block's first position in it."""
    block = blocks_ptr + number * 3
    return tl.load(block).to(tl.int64), tl.load(block + 1), tl.load(block + 2)


@triton.jit
def _load(ptr, row, stride, inside, MASKED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Rows of a head, [len(row), DP]: zeros where they are not `inside`, and beyond D."""
    d = tl.arange(0, DP)
    at = ptr + row[:, None] * stride + d[None, :]
    if MASKED or DP != D:
        return tl.load(at, inside[:, None] & (d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _head(
    ptr, start, head, stride_t, stride_h, length, TMA: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Where a document's rows of a head are, for `_rows`, which loads ROWS at once."""
    ptr += start * stride_t + tl.cast(head, tl.int64) * stride_h
    if TMA:  # of an unused block, too, it has a row
        ptr = tl.make_tensor_descriptor(ptr, [tl.maximum(length, 1), D], [stride_t, 1], [ROWS, DP])
    return ptr


@triton.jit
def _rows(
    of, first, stride_t, length, MASKED: tl.constexpr, TMA: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Rows from `first` on, [ROWS, DP]: zeros behind the document's end, which only MASKED ones reach, and beyond D."""
    if TMA:
        rows = of.load([first, 0])
    else:
        row = tl.arange(0, ROWS)
        rows = _load(of + tl.cast(first, tl.int64) * stride_t, row, stride_t, first + row < length, MASKED, D, DP)
    return rows


@triton.jit
def _seen(row, column, length, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which positions see which: broadcast over row and column; of rows in the document."""
    seen = column < length
    if CAUSAL:
        seen = row >= column
    if WINDOW > 0:
        seen = (row - column).to(tl.uint32, bitcast=True) < WINDOW  # what is below 0 is huge
    return seen


@triton.jit
def _attend(
    o, total, peak, q, k_head, v_head, stride_kt, stride_vt, low, high, row, length, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """The keys [low, high) of the online softmax."""
    for begin in tl.range(low, high, BN, warp_specialize=SPECIALISED):
        column = begin + tl.arange(0, BN)
        k = _rows(k_head, begin, stride_kt, length, MASKED, TMA, D, DP, BN)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            s = tl.where(_seen(row[:, None], column[None, :], length, CAUSAL, WINDOW), s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1) * scale)
        shift = higher
        if MASKED:
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen no key yet
        p = tl.exp2(s * scale - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(p, 1)
        o = o * decay[:, None]
        v = _rows(v_head, begin, stride_vt, length, MASKED, TMA, D, DP, BN)
        o = tl.dot(p.to(v.dtype), v, o, input_precision=PRECISION)
        peak = higher
    return o, total, peak


@triton.jit
def forward(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, blocks_ptr, scale, positions, shift,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TMA: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """o [positions, heads, D], contiguous; lse [heads, positions], of base e."""
    start, length, first = _block(blocks_ptr, tl.program_id(0))  # an unused block has no key, and stores nothing
    if not SPECIALISED:  # noqa: SIM102 - with a return, what is specialised does not compile
        if first >= length:
            return
    head = tl.program_id(1)
    if shift is not None:
        ahead = tl.cast(shift, tl.int64)
        q_ptr -= ahead * stride_qt
        o_ptr -= ahead * tl.num_programs(1) * D
        lse_ptr -= ahead
    row = first + tl.arange(0, BM)
    q_head = _head(q_ptr, start, head, stride_qt, stride_qh, length, TMA, D, DP, BM)
    q = _rows(q_head, first, stride_qt, length, True, TMA, D, DP, BM)
    k_head = _head(k_ptr, start, head // GROUP, stride_kt, stride_kh, length, TMA, D, DP, BN)
    v_head = _head(v_ptr, start, head // GROUP, stride_vt, stride_vh, length, TMA, D, DP, BN)

    # Of the keys [low, high) that some row of the block sees, [whole, edge) are seen by all of its rows.
    low = 0
    whole = 0
    high = length
    edge = length // BN * BN
    if CAUSAL:
        high = tl.minimum(length, first + BM)
        edge = first // BN * BN
    if WINDOW > 0:
        low = tl.maximum(first - WINDOW + 1, 0) // BN * BN
        whole = (tl.maximum(first + BM - WINDOW, 0) + BN - 1) // BN * BN
    edge = tl.maximum(whole, edge)
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, DP], tl.float32)
    if SPECIALISED:  # the compiler gives warps their own work where there is one loop, and no other
        o, total, peak = _attend(
            o, total, peak, q, k_head, v_head, stride_kt, stride_vt, low, high, row, length, scale,
            True, CAUSAL, WINDOW, PRECISION, D, DP, BN, TMA, True,
        )  # fmt: skip
    else:
        if WINDOW > 0:
            o, total, peak = _attend(
                o, total, peak, q, k_head, v_head, stride_kt, stride_vt, low, tl.minimum(whole, high), row, length,
                scale, True, CAUSAL, WINDOW, PRECISION, D, DP, BN, TMA, False,
            )  # fmt: skip
        o, total, peak = _attend(
            o, total, peak, q, k_head, v_head, stride_kt, stride_vt, edge, high, row, length, scale,
            True, CAUSAL, WINDOW, PRECISION, D, DP, BN, TMA, False,
        )  # fmt: skip
        o, total, peak = _attend(  # the longest loop last: so it takes the fewest registers
            o, total, peak, q, k_head, v_head, stride_kt, stride_vt, whole, edge, row, length, scale,
            False, CAUSAL, WINDOW, PRECISION, D, DP, BN, TMA, False,
        )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # of a row without a key: o is 0, lse the least there is
    o = o / total[:, None]
    d = tl.arange(0, DP)
    to = o_ptr + ((start + row)[:, None] * tl.num_programs(1) + head) * D + d[None, :]
    tl.store(to, o.to(o_ptr.dtype.element_ty), (row < length)[:, None] & (d < D)[None, :])
    lse = (peak + tl.log2(total)) * LN2
    tl.store(lse_ptr + head.to(tl.int64) * positions + start + row, lse, row < length)


@triton.jit
def delta(o_ptr, do_ptr, delta_ptr, positions, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr):
    """The sum of o * do over each head of each position: delta [heads, positions]."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    head = tl.program_id(1)
    at = head * D
    stride = tl.num_programs(1) * D
    o = _load(o_ptr + at, row, stride, row < positions, True, D, DP).to(tl.float32)
    do = _load(do_ptr + at, row, stride, row < positions, True, D, DP).to(tl.float32)
    tl.store(delta_ptr + head.to(tl.int64) * positions + row, tl.sum(o * do, 1), row < positions)


@triton.jit
def backward_keys(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, blocks_ptr, scale, positions, shift,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v, [positions, groups, D], contiguous; do is too. A program sums over its group's heads."""
    # Blocks that begin latest come first in the table; here they have the least to do.
    start, length, first = _block(blocks_ptr, tl.num_programs(0) - 1 - tl.program_id(0))
    if first >= length:
        return
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    if shift is not None:
        ahead = tl.cast(shift, tl.int64)
        q_ptr -= ahead * stride_qt
        do_ptr -= ahead * groups * GROUP * D
        lse_ptr -= ahead
        delta_ptr -= ahead
    column = first + tl.arange(0, BN)
    k_head = _head(k_ptr, start, group, stride_kt, stride_kh, length, TMA, D, DP, BN)
    k = _rows(k_head, first, stride_kt, length, True, TMA, D, DP, BN)
    v_head = _head(v_ptr, start, group, stride_vt, stride_vh, length, TMA, D, DP, BN)
    v = _rows(v_head, first, stride_vt, length, True, TMA, D, DP, BN)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)

    # The queries [low, high) see some key of the block. One loop for those that see all of them and those that do not,
    # here and below: two would take more registers than there are.
    low = 0
    high = length
    if CAUSAL:
        low = first // BM * BM
    if shift is not None:
        low = tl.maximum(low, (shift - start).to(tl.int32))
    if WINDOW > 0:
        high = tl.minimum(length, first + BN + WINDOW - 1)
    for i in tl.range(0, GROUP):
        head = group * GROUP + i
        stride_do = groups * GROUP * D
        q_head = _head(q_ptr, start, head, stride_qt, stride_qh, length, TMA, D, DP, BM)
        do_head = _head(do_ptr, start, head, stride_do, D, length, TMA, D, DP, BM)
        for begin in tl.range(low, high, BM):
            row = begin + tl.arange(0, BM)
            q = _rows(q_head, begin, stride_qt, length, True, TMA, D, DP, BM)
            do = _rows(do_head, begin, stride_do, length, True, TMA, D, DP, BM)
            at = tl.cast(head, tl.int64) * positions + start + row
            lse = tl.load(lse_ptr + at, row < length, other=0.0) * LOG2E
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])
            if CAUSAL:  # rows behind the document's end are zeros, and add nothing
                p = tl.where(_seen(row[None, :], column[:, None], length, CAUSAL, WINDOW), p, 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            delta = tl.load(delta_ptr + at, row < length, other=0.0)
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    d = tl.arange(0, DP)
    to = ((start + column)[:, None] * groups + group) * D + d[None, :]
    inside = (column < length)[:, None] & (d < D)[None, :]
    tl.store(dk_ptr + to, (dk * (scale * LN2)).to(dk_ptr.dtype.element_ty), inside)
    tl.store(dv_ptr + to, dv.to(dv_ptr.dtype.element_ty), inside)


@triton.jit
def backward_queries(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, blocks_ptr, scale, positions, shift,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The gradient of q, [positions, heads, D], contiguous; do is too."""
    start, length, first = _block(blocks_ptr, tl.program_id(0))
    if first >= length:
        return
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    if shift is not None:
        ahead = tl.cast(shift, tl.int64)
        q_ptr -= ahead * stride_qt
        do_ptr -= ahead * heads * D
        dq_ptr -= ahead * heads * D
        lse_ptr -= ahead
        delta_ptr -= ahead
    row = first + tl.arange(0, BM)
    inside = row < length
    q_head = _head(q_ptr, start, head, stride_qt, stride_qh, length, TMA, D, DP, BM)
    q = _rows(q_head, first, stride_qt, length, True, TMA, D, DP, BM)
    do_head = _head(do_ptr, start, head, heads * D, D, length, TMA, D, DP, BM)
    do = _rows(do_head, first, heads * D, length, True, TMA, D, DP, BM)
    lse = tl.load(lse_ptr + head * positions + start + row, inside, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + head * positions + start + row, inside, other=0.0)
    k_head = _head(k_ptr, start, head // GROUP, stride_kt, stride_kh, length, TMA, D, DP, BN)
    v_head = _head(v_ptr, start, head // GROUP, stride_vt, stride_vh, length, TMA, D, DP, BN)
    low = 0
    high = length
    if CAUSAL:
        high = tl.minimum(length, first + BM)
    if WINDOW > 0:
        low = tl.maximum(first - WINDOW + 1, 0) // BN * BN
    dq = tl.zeros([BM, DP], tl.float32)
    for begin in tl.range(low, high, BN):
        column = begin + tl.arange(0, BN)
        k = _rows(k_head, begin, stride_kt, length, True, TMA, D, DP, BN)
        v = _rows(v_head, begin, stride_vt, length, True, TMA, D, DP, BN)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
        p = tl.where(_seen(row[:, None], column[None, :], length, CAUSAL, WINDOW), p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    d = tl.arange(0, DP)
    to = dq_ptr + ((start + row)[:, None] * heads + head) * D + d[None, :]
    tl.store(to, (dq * (scale * LN2)).to(dq_ptr.dtype.element_ty), inside[:, None] & (d < D)[None, :])
