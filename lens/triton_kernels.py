"""Triton kernels of the lexical head: a matrix product whose logits are pooled in registers, and a sum of chosen rows.

Clusters are the tile's first axis and texts' rows its second, so that a maximum over a text's rows runs along registers
of one thread. A tile's columns are `SLOTS` rows of each of several texts: short texts fill a tile as long ones do.
"""

import os

import triton
import triton.language as tl

# Legend: B texts, T packed rows, D hidden size, K clusters.

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_WIDEN = tl.constexpr(INTERPRETED)  # the interpreter multiplies bfloat16 as if its bits were integers


def _tile(clusters: int, columns: int, depth: int, warps: int, stages: int) -> triton.Config:
    sizes = {"CLUSTERS": clusters, "COLUMNS": columns, "DEPTH": depth}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


_TILES = [
    _tile(128, 128, 64, 8, 3),
    _tile(128, 256, 64, 8, 3),
    _tile(64, 128, 64, 4, 3),
    _tile(64, 128, 32, 8, 3),  # fits every device, also in float32
]
_TILES = _TILES[:1] if INTERPRETED else _TILES  # the interpreter has no clock to choose by


@triton.jit
def _logits(
    a, a_row, b, b_row,
    WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows a_row (A,) of a times rows b_row (B,) of b, given as offsets of their first element -> (A, B) float32."""
    product = tl.zeros((A, B), dtype=tl.float32)
    for start in range(0, WIDTH, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        if WIDTH % DEPTH == 0:
            left = tl.load(a + a_row[:, None] + depth[None, :])
            right = tl.load(b + b_row[None, :] + depth[:, None])
        else:
            left = tl.load(a + a_row[:, None] + depth[None, :], mask=depth[None, :] < WIDTH, other=0.0)
            right = tl.load(b + b_row[None, :] + depth[:, None], mask=depth[:, None] < WIDTH, other=0.0)
        if _WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    return product


@triton.autotune(configs=_TILES, key=["clusters", "WIDTH", "SLOTS", "SUM", "ARGMAX", "PRECISION"])
@triton.jit(do_not_specialize=["texts", "total"])
def pool(
    values, argmax, rows, weight, bias, starts, ends, order, texts, total, clusters, row_stride, weight_stride,
    WIDTH: tl.constexpr, SLOTS: tl.constexpr, SUM: tl.constexpr, ARGMAX: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, CLUSTERS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Per text and cluster the greatest logit and the first row that reaches it, or the sum of log(1 + relu(logit)).

    rows (T, D), weight (K, D), bias (K,) for sums only, starts and ends (B,) of the texts in rows, order (B,) in which
    texts are taken -> values (B, K) float32, argmax (B, K) int32. One program per tile of clusters and texts.
    """
    TEXTS: tl.constexpr = COLUMNS // SLOTS
    SWEEP: tl.constexpr = 8  # groups of texts that pass over all clusters together, so that they share them in L2
    tiles = tl.cdiv(clusters, CLUSTERS)
    groups = tl.cdiv(texts, TEXTS)
    program = tl.program_id(0)
    sweep = program // (SWEEP * tiles)
    inside = program - sweep * SWEEP * tiles
    width = tl.minimum(groups - sweep * SWEEP, SWEEP)
    place = (sweep * SWEEP + inside % width) * TEXTS + tl.arange(0, TEXTS)
    cluster = (inside // width) * CLUSTERS + tl.arange(0, CLUSTERS)

    text = tl.load(order + place, mask=place < texts, other=0).to(tl.int64)
    start = tl.maximum(tl.load(starts + text), 0)
    end = tl.minimum(tl.load(ends + text), total)
    length = tl.where(place < texts, tl.maximum(end - start, 0), 0)
    # Nothing is masked that can be repeated: beyond the last cluster the last one, beyond a text's end its last row,
    # which alters no maximum and never comes before the row itself.
    weight_row = tl.minimum(cluster, clusters - 1).to(tl.int64) * weight_stride
    last = tl.minimum(tl.maximum(end - 1, 0), total - 1)
    slot = tl.arange(0, SLOTS)
    pooled = tl.full((CLUSTERS, TEXTS), 0.0 if SUM else -float("inf"), dtype=tl.float32)
    winner = tl.zeros((CLUSTERS, TEXTS), dtype=tl.int32)
    if HAS_BIAS:
        shift = tl.load(bias + tl.minimum(cluster, clusters - 1)).to(tl.float32)

    for first in range(0, tl.max(length, 0), SLOTS):
        row = tl.minimum(start[:, None] + first + slot[None, :], last[:, None])  # (TEXTS, SLOTS)
        row = tl.reshape(row, (COLUMNS,)).to(tl.int64) * row_stride
        logits = _logits(weight, weight_row, rows, row, WIDTH, CLUSTERS, COLUMNS, DEPTH, PRECISION)
        if SUM:
            if HAS_BIAS:
                logits += shift[:, None]
            there = tl.reshape(first + slot[None, :] < length[:, None], (COLUMNS,))
            activated = tl.log(1.0 + tl.where(logits <= 0.0, 0.0, logits))  # NaN stays NaN
            activated = tl.where(there[None, :], activated, 0.0)
            pooled += tl.sum(tl.reshape(activated, (CLUSTERS, TEXTS, SLOTS)), 2)
        else:
            logits = tl.where(logits != logits, float("inf"), logits)  # a maximum would pass over NaN in silence
            logits = tl.reshape(logits, (CLUSTERS, TEXTS, SLOTS))
            if ARGMAX:
                greatest, which = tl.max(logits, 2, return_indices=True)
                row_of = start[None, :] + tl.minimum(first + which, length[None, :] - 1)
                winner = tl.where(greatest > pooled, row_of, winner)
                pooled = tl.maximum(pooled, greatest)
            else:
                pooled = tl.maximum(pooled, tl.max(logits, 2))

    stored = (cluster < clusters)[:, None] & (place < texts)[None, :]
    target = text[None, :] * clusters + cluster[:, None]
    if not SUM:
        pooled = tl.where(length[None, :] > 0, pooled, -float("inf"))
    tl.store(values + target, pooled, mask=stored)
    if ARGMAX:
        tl.store(argmax + target, tl.where(length[None, :] > 0, winner, -1), mask=stored)


@triton.jit
def add_chosen(
    out, source, chosen, factor, starts, ends, out_stride, source_stride,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[r] = sum over e in starts[r] .. ends[r] of factor[e] * source[chosen[e]], in float32 and in e's order.

    One program per row and tile of the width; rows of `source` whose factor is 0 are not read.
    """
    row = tl.program_id(0).to(tl.int64)
    depth = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    inside = depth < WIDTH
    end = tl.load(ends + row)
    total = tl.zeros((DEPTH,), dtype=tl.float32)
    for first in range(tl.load(starts + row), end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        factors = tl.load(factor + entry, mask=entry < end, other=0.0)
        used = factors != 0.0
        at = tl.load(chosen + entry, mask=used, other=0).to(tl.int64) * source_stride
        rows = tl.load(source + at[:, None] + depth[None, :], mask=used[:, None] & inside[None, :], other=0.0)
        total += tl.sum(factors[:, None] * rows.to(tl.float32), 0)
    tl.store(out + row * out_stride + depth, total, mask=inside)


@triton.autotune(configs=_TILES, key=["clusters", "WIDTH", "PRECISION"])
@triton.jit(do_not_specialize=["total"])
def sum_logit_gradient(
    out, gradient, rows, weight, bias, owner, total, clusters, row_stride, weight_stride,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    CLUSTERS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradient (T, K) of the sum over rows of log(1 + relu(logit)), the logits computed anew.

    gradient (B, K) of the sums, rows (T, D), weight (K, D), bias (K,), owner (T,) the text of each row or -1.
    """
    across = tl.cdiv(total, COLUMNS)
    row = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    cluster = (tl.program_id(0) // across) * CLUSTERS + tl.arange(0, CLUSTERS)
    row_at = tl.minimum(row, total - 1).to(tl.int64)
    cluster_at = tl.minimum(cluster, clusters - 1).to(tl.int64)
    text = tl.load(owner + row_at).to(tl.int64)
    logits = _logits(
        rows, row_at * row_stride, weight, cluster_at * weight_stride, WIDTH, COLUMNS, CLUSTERS, DEPTH, PRECISION
    )
    if HAS_BIAS:
        logits += tl.load(bias + cluster_at).to(tl.float32)[None, :]
    stored = (row < total)[:, None] & (cluster < clusters)[None, :]
    arriving = tl.load(
        gradient + text[:, None] * clusters + cluster[None, :], mask=stored & (text >= 0)[:, None], other=0.0
    )
    passed = tl.where(logits <= 0.0, 0.0, arriving / (1.0 + logits))  # NaN stays NaN
    tl.store(out + row.to(tl.int64)[:, None] * clusters + cluster[None, :], passed, mask=stored)
