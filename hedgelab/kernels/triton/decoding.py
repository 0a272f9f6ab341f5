"""Decode: gather the decoder rows of each example's latents and add them up; no ``[batch, k, d_in]`` in memory."""

# mypy: disallow-untyped-decorators=False

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hedgelab.kernels.layout import Layout
from hedgelab.kernels.triton.tiles import DECODE, Tile, accumulator


@triton.jit
def _decode(
    crow_ptr: "Any",
    latents_ptr: "Any",
    values_ptr: "Any",
    weight_ptr: "Any",
    bias_ptr: "Any",
    stops_ptr: "Any",
    out_ptr: "Any",
    batch: "Any",
    width: "Any",
    LEVELS: tl.constexpr,
    BIAS: tl.constexpr,
    DOUBLE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One example and one tile of columns; rows run fastest, so that a column slab of the weights stays in L2."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    start = tl.load(crow_ptr + row)
    stop = tl.load(crow_ptr + row + 1)
    lanes = tl.arange(0, ENTRIES)
    total = tl.full([BLOCK], 0, ACC)
    if BIAS:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(ACC)
    low = tl.full([], 0, tl.int64)
    for level in tl.static_range(LEVELS):
        high = tl.load(stops_ptr + level)
        for entry in range(start, stop, ENTRIES):
            index = entry + lanes
            latents = tl.load(latents_ptr + index, mask=index < stop, other=-1)
            used = (latents >= low) & (latents < high)
            values = tl.load(values_ptr + index, mask=used, other=0.0).to(ACC)
            pointers = weight_ptr + latents[:, None] * width + columns[None, :]
            weights = tl.load(pointers, mask=used[:, None] & inside[None, :], other=0.0).to(ACC)
            total += tl.sum(values[:, None] * weights, axis=0)
        tl.store(out_ptr + (level * batch + row) * width + columns, total, mask=inside)
        low = high


def decode_rows(
    layout: Layout,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stops: Tensor | None = None,
    tile: Tile = DECODE,
) -> Tensor:
    """Sum the weight rows of each example's latents, ``[levels, batch, width]`` in the weight's dtype.

    Args:
        layout: Where the stored values lie.
        values: ``[nnz]``.
        weight: ``[d_sae, width]``, row-major.
        bias: ``[width]``, added once; None for none.
        stops: Nested prefix sizes ``[levels]`` int64 on the device; level ℓ sums the latents below ``stops[ℓ]``. None for one
            level of all latents.
        tile: Launch shape.
    """
    batch, width = layout.row_count, weight.shape[1]
    if stops is None:
        stops = torch.full((1,), layout.d_sae, dtype=torch.long, device=weight.device)
    out = torch.empty(len(stops), batch, width, dtype=weight.dtype, device=weight.device)
    if batch:
        _decode[(batch, triton.cdiv(width, tile.block))](
            layout.crow,
            layout.latents,
            values.contiguous(),
            weight.contiguous(),
            weight if bias is None else bias.contiguous(),
            stops,
            out,
            batch,
            width,
            LEVELS=len(stops),
            BIAS=bias is not None,
            DOUBLE=accumulator(weight.dtype) == torch.float64,
            ENTRIES=tile.entries,
            BLOCK=tile.block,
            num_warps=tile.num_warps,
        )
    return out
