"""Selection of the largest pre-activations without sorting them.

A row is cut into groups of latents. The k-th largest of the groups' maxima is a lower bound on the k-th largest
pre-activation, and a tight one, since large pre-activations rarely share a group. One pass over memory finds the maxima;
a second reads only the groups that reach the bound and hands on the few candidates above it, among which the exact set is
chosen: larger values first, among equals the lowest position, and never a value that ReLU would make 0.
"""

# mypy: disallow-untyped-decorators=False

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hedgelab.kernels.codes import Codes


class SelectionTile(NamedTuple):
    """How the kernels are cut; ``groups`` is a power of two."""

    groups: int  # of latents of a row; the k-th largest of their maxima bounds the threshold
    num_warps: int


SELECTION = SelectionTile(groups=2048, num_warps=8)

# Thresholds keep the sign, exponent and 7 bits of the mantissa; the bits below only shrink the candidates by a few percent.
LOW_BIT = 16
DIGITS = 4  # digits of 4 bits that make up bits 31 to 16
POSITION = 0xFFFFFFFF


@triton.jit
def _keys(row_ptr: "Any", scale_ptr: "Any", columns: "Any", mask: "Any", SCALED: tl.constexpr) -> "Any":
    """Integers that order like the positive values they stand for; values at or below 0 give integers at or below 0."""
    values = tl.load(row_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        values *= tl.load(scale_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return values.to(tl.int32, bitcast=True)


@triton.jit
def _group_maxima(
    pre_ptr: "Any", scale_ptr: "Any", maxima_ptr: "Any", thresholds_ptr: "Any", width: "Any", k: "Any", SCALED: tl.constexpr,
    PER_ROW: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr,
) -> None:  # fmt: skip
    """Maximum of each group of one row and, per row, the largest threshold that k groups reach, built bit by bit."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, GROUPS)
    maxima = tl.full([GROUPS], 0, tl.int32)
    for start in tl.range(0, width, GROUPS, loop_unroll_factor=4):
        columns = start + lanes
        maxima = tl.maximum(maxima, _keys(pre_ptr + row * width, scale_ptr, columns, columns < width, SCALED))
    tl.store(maxima_ptr + row * GROUPS + lanes, maxima)
    if PER_ROW:
        threshold = tl.full([], 0, tl.int32)
        for step in tl.static_range(STEPS):
            trial = threshold + (1 << (30 - step))
            reached = tl.sum((maxima >= trial).to(tl.int32), axis=0)
            threshold = tl.where(reached >= k, trial, threshold)
        tl.store(thresholds_ptr + row, tl.maximum(threshold, 1))


@triton.jit
def _threshold_of_digits(counts_ptr: "Any", wanted: "Any", DIGIT: tl.constexpr) -> "Any":
    """The threshold that the first ``DIGIT`` rounds of counting have settled."""
    threshold = tl.full([], 0, tl.int32)
    for digit in tl.static_range(DIGIT):
        counts = tl.load(counts_ptr + digit * 16 + tl.arange(0, 16))
        threshold += tl.sum((counts >= wanted).to(tl.int32), axis=0) << (28 - 4 * digit)
    return threshold


@triton.jit
def _count_digit(
    maxima_ptr: "Any", counts_ptr: "Any", size: "Any", wanted: "Any", DIGIT: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Count the maxima that reach each value of the next digit of the threshold."""
    threshold = _threshold_of_digits(counts_ptr, wanted, DIGIT)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keys = tl.load(maxima_ptr + index, mask=index < size, other=0)
    for value in tl.static_range(1, 8 if DIGIT == 0 else 16):
        reached = tl.sum((keys >= threshold + (value << (28 - 4 * DIGIT))).to(tl.int32), axis=0)
        tl.atomic_add(counts_ptr + DIGIT * 16 + value, reached)


@triton.jit
def _settle_threshold(counts_ptr: "Any", threshold_ptr: "Any", wanted: "Any", DIGIT: tl.constexpr) -> None:
    """Write the threshold that all rounds of counting have settled."""
    tl.store(threshold_ptr, tl.maximum(_threshold_of_digits(counts_ptr, wanted, DIGIT), 1))


@triton.jit
def _candidates(
    pre_ptr: "Any", scale_ptr: "Any", maxima_ptr: "Any", thresholds_ptr: "Any", threshold_stride: "Any", counts_ptr: "Any",
    offsets_ptr: "Any", out_ptr: "Any", width: "Any", capacity: "Any", SCALED: tl.constexpr, EMIT: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:  # fmt: skip
    """Count one row's entries at or above the threshold; with EMIT also write each as value and position in one integer."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, GROUPS)
    threshold = tl.load(thresholds_ptr + row * threshold_stride)
    live = tl.load(maxima_ptr + row * GROUPS + lanes) >= threshold
    found = tl.full([GROUPS], 0, tl.int32)
    counters = counts_ptr + row + tl.full([GROUPS], 0, tl.int32)
    if EMIT:
        offset = tl.load(offsets_ptr + row)
    for start in tl.range(0, width, GROUPS, loop_unroll_factor=4):
        columns = start + lanes
        mask = live & (columns < width)
        keys = _keys(pre_ptr + row * width, scale_ptr, columns, mask, SCALED)
        hit = mask & (keys >= threshold)
        if EMIT:
            slot = tl.atomic_add(counters, 1, mask=hit, sem="relaxed")
            packed = (keys.to(tl.int64) << 32) + (0xFFFFFFFF - (row * width + columns))
            tl.store(out_ptr + offset + slot, packed, mask=hit & (slot < capacity))
        else:
            found += hit.to(tl.int32)
    if not EMIT:
        tl.store(counts_ptr + row, tl.sum(found, axis=0))


def fits(batch: int, width: int, k: int) -> bool:
    """Whether the kernels can select k entries a row (TopK) or k a row on average (BatchTopK) of ``[batch, width]``."""
    return 0 < batch * width <= POSITION + 1 and k <= _groups(width, SELECTION) // 4


def top_k(pre: Tensor, k: int, scale: Tensor | None = None, tile: SelectionTile = SELECTION) -> Codes | None:
    """The k largest positive entries of each row of ``pre · scale``; None where ties make candidates too many.

    Rows with fewer are filled with zeros, at changing latents so that none collects them. ``pre`` is contiguous and of single
    precision or less, ``scale [d_sae]`` not negative.
    """
    batch, width = pre.shape
    maxima, thresholds = _maxima(pre, scale, k, tile, per_row=True)
    capacity = triton.next_power_of_2(2 * k + 32)
    counts = torch.zeros(batch, dtype=torch.int32, device=pre.device)
    offsets = torch.arange(0, batch * capacity, capacity, device=pre.device)
    packed = torch.zeros(batch, capacity, dtype=torch.long, device=pre.device)
    _launch_candidates(pre, scale, maxima, thresholds, counts, tile, offsets, packed, capacity)
    if bool((counts > capacity).any()):
        return None
    chosen = packed.topk(k, dim=1).values
    filled = chosen == 0
    filler = torch.arange(batch * k, device=pre.device).view(batch, k)
    positions = torch.where(filled, filler % width, POSITION - (chosen & POSITION))
    values = pre.view(-1)[positions].masked_fill_(filled, 0.0)
    return Codes.from_topk(positions % width, values.float(), width)


def batch_top_k(pre: Tensor, count: int, scale: Tensor | None = None, tile: SelectionTile = SELECTION) -> Codes:
    """The ``count`` largest positive entries of ``pre · scale``, fewer where there are fewer; latents rise within a row."""
    batch, width = pre.shape
    maxima, _ = _maxima(pre, scale, 1, tile, per_row=False)
    threshold = _batch_threshold(maxima, count)
    counts = torch.empty(batch, dtype=torch.int32, device=pre.device)
    _launch_candidates(pre, scale, maxima, threshold, counts, tile)
    ends = counts.cumsum(0)
    packed = torch.empty(int(ends[-1]), dtype=torch.long, device=pre.device)
    starts = ends - counts
    _launch_candidates(pre, scale, maxima, threshold, counts.zero_(), tile, starts, packed, width)
    if len(packed) > count:
        packed = packed.sort(descending=True).values[:count]
    positions = (POSITION - (packed & POSITION)).sort().values
    crow = torch.searchsorted(positions, torch.arange(batch + 1, device=pre.device) * width)
    return Codes.from_csr(crow, positions % width, pre.view(-1)[positions].float(), width)


def small_top_k(pre: Tensor, count: int, scale: Tensor | None, per_row: bool) -> Codes:
    """The ``count`` largest entries of ``pre · scale`` of each row, or of all, also such as ReLU makes 0.

    How many are stored depends on the shapes alone, so that nothing waits and a step can be captured.
    """
    width, working = pre.shape[1], torch.promote_types(pre.dtype, torch.float32)
    ranked = pre if scale is None else pre * scale
    if per_row:
        latents = ranked.topk(count, dim=1, sorted=False).indices
        return Codes.from_topk(latents, pre.gather(1, latents).to(working), width)
    positions = ranked.view(-1).topk(count, sorted=False).indices.sort().values
    crow = torch.searchsorted(positions, torch.arange(len(pre) + 1, device=pre.device) * width)
    return Codes.from_csr(crow, positions % width, pre.view(-1)[positions].to(working), width)


def _groups(width: int, tile: SelectionTile) -> int:
    """Groups of a row: at least 4 latents each, or fewer groups than the tile asks for."""
    return min(tile.groups, int(triton.next_power_of_2(triton.cdiv(width, 4))))


def _maxima(pre: Tensor, scale: Tensor | None, k: int, tile: SelectionTile, per_row: bool) -> tuple[Tensor, Tensor]:
    batch, width = pre.shape
    groups = _groups(width, tile)
    maxima = torch.empty(batch, groups, dtype=torch.int32, device=pre.device)
    thresholds = torch.empty(batch, dtype=torch.int32, device=pre.device)
    options = {"PER_ROW": per_row, "STEPS": 31 - LOW_BIT, "GROUPS": groups, "num_warps": tile.num_warps}
    scales = pre if scale is None else scale
    _group_maxima[(batch,)](pre, scales, maxima, thresholds, width, k, SCALED=scale is not None, **options)
    return maxima, thresholds


def _batch_threshold(maxima: Tensor, count: int) -> Tensor:
    """The largest threshold (to 16 bits) that ``count`` of the maxima reach, ``[1]`` int32."""
    block = 4096
    counts = torch.zeros(DIGITS, 16, dtype=torch.int32, device=maxima.device)
    for digit in range(DIGITS):
        _count_digit[(triton.cdiv(maxima.numel(), block),)](
            maxima, counts, maxima.numel(), count, DIGIT=digit, BLOCK=block, num_warps=4
        )
    threshold = torch.empty(1, dtype=torch.int32, device=maxima.device)
    _settle_threshold[(1,)](counts, threshold, count, DIGIT=DIGITS, num_warps=1)
    return threshold


def _launch_candidates(
    pre: Tensor, scale: Tensor | None, maxima: Tensor, thresholds: Tensor, counts: Tensor, tile: SelectionTile, *emit: Any
) -> None:
    """Count each row's candidates, or with offsets, an output and a row's capacity write them as well."""
    offsets, out, capacity = emit or (counts, counts, 0)
    pointers = pre, pre if scale is None else scale, maxima, thresholds, int(len(thresholds) > 1), counts, offsets, out
    options = {"SCALED": scale is not None, "EMIT": bool(emit), "GROUPS": maxima.shape[1], "num_warps": tile.num_warps}
    _candidates[(len(pre),)](*pointers, pre.shape[1], capacity, **options)
