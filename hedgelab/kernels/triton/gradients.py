"""Weight gradients grouped by latent: each output row is summed in fast memory and written once, silent latents as zeros."""

# mypy: disallow-untyped-decorators=False

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hedgelab.kernels.layout import Layout
from hedgelab.kernels.triton.tiles import GRADIENT, Tile, accumulator


class LatentGradients(NamedTuple):
    """What one pass over the latents yields.

    Attributes:
        weight: ``[d_sae, width]``: for each latent the sum of ``value · source[row]``.
        bias: ``[d_sae]``: for each latent the sum of its values; None unless asked for.
        values: ``[nnz]`` in the order of the layout: ``source[row] · weight[latent]``; None without a weight.
    """

    weight: Tensor
    bias: Tensor | None
    values: Tensor | None


@triton.jit
def _latent_gradients(
    offsets_ptr: "Any",
    order_ptr: "Any",
    rows_ptr: "Any",
    values_ptr: "Any",
    source_ptr: "Any",
    stops_ptr: "Any",
    weight_ptr: "Any",
    gradient_ptr: "Any",
    bias_ptr: "Any",
    dots_ptr: "Any",
    batch: "Any",
    width: "Any",
    nnz: "Any",
    LEVELS: tl.constexpr,
    BIAS: tl.constexpr,
    DOTS: tl.constexpr,
    DOUBLE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One latent and one tile of columns; latents run fastest, so that a column slab of the source stays in L2."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    latent = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    start = tl.load(offsets_ptr + latent)
    stop = tl.load(offsets_ptr + latent + 1)
    level = tl.full([], 0, tl.int64)
    for outer in tl.static_range(LEVELS):
        level += (latent >= tl.load(stops_ptr + outer)).to(tl.int64)
    reconstructed = level < LEVELS  # latents beyond the last level take part in no reconstruction
    lanes = tl.arange(0, ENTRIES)
    total = tl.full([BLOCK], 0, ACC)
    bias = tl.full([ENTRIES], 0, ACC)
    if DOTS:
        weight = tl.load(weight_ptr + latent * width + columns, mask=inside & (start < stop), other=0.0).to(ACC)
    for entry in range(start, stop, ENTRIES):
        index = entry + lanes
        valid = index < stop
        order = tl.load(order_ptr + index, mask=valid, other=0)
        rows = tl.load(rows_ptr + index, mask=valid, other=0)
        values = tl.load(values_ptr + order, mask=valid, other=0.0).to(ACC)
        pointers = source_ptr + (level * batch + rows)[:, None] * width + columns[None, :]
        mask = (valid & reconstructed)[:, None] & inside[None, :]
        source = tl.load(pointers, mask=mask, other=0.0).to(ACC)
        total += tl.sum(values[:, None] * source, axis=0)
        if DOTS:
            tl.store(dots_ptr + tile * nnz + order, tl.sum(source * weight[None, :], axis=1), mask=valid)
        if BIAS:
            bias += values
    tl.store(gradient_ptr + latent * width + columns, total, mask=inside)
    if BIAS and tile == 0:
        tl.store(bias_ptr + latent, tl.sum(bias, axis=0))


def latent_gradients(
    layout: Layout,
    values: Tensor,
    source: Tensor,
    dtype: torch.dtype,
    stops: Tensor | None = None,
    weight: Tensor | None = None,
    bias: bool = False,
    tile: Tile = GRADIENT,
) -> LatentGradients:
    """Sum ``value · source[row]`` for each latent, and with it whatever else reads the same rows.

    Args:
        layout: Where the stored values lie.
        values: ``[nnz]``.
        source: ``[levels, batch, width]``: what each example hands its latents, by the level the latent belongs to.
        dtype: Of the results; sums are accumulated in at least float32.
        stops: Nested prefix sizes ``[levels]`` int64 on the device; latents beyond the last get zeros. None for one level.
        weight: ``[d_sae, width]``; with it the dot products ``source[row] · weight[latent]`` come along.
        bias: Whether to sum the values of each latent too.
        tile: Launch shape.
    """
    levels, batch, width = source.shape
    nnz, device = values.shape[0], source.device
    offsets, rows, order = layout.transposed
    if stops is None:
        stops = torch.full((1,), layout.d_sae, dtype=torch.long, device=device)
    tiles = triton.cdiv(width, tile.block)
    gradient = torch.empty(layout.d_sae, width, dtype=dtype, device=device)
    bias_sums = torch.empty(layout.d_sae, dtype=dtype, device=device) if bias else None
    dots = None if weight is None else torch.empty(tiles, nnz, dtype=accumulator(dtype), device=device)
    _latent_gradients[(layout.d_sae, tiles)](
        offsets,
        order,
        rows,
        values.contiguous(),
        source.contiguous(),
        stops,
        gradient if weight is None else weight.contiguous(),
        gradient,
        gradient if bias_sums is None else bias_sums,
        gradient if dots is None else dots,
        batch,
        width,
        nnz,
        LEVELS=levels,
        BIAS=bias,
        DOTS=weight is not None,
        DOUBLE=accumulator(dtype) == torch.float64,
        ENTRIES=tile.entries,
        BLOCK=tile.block,
        num_warps=tile.num_warps,
    )
    return LatentGradients(gradient, bias_sums, None if dots is None else dots.sum(0).to(dtype))
