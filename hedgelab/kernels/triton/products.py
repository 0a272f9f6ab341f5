"""What the sparse path takes from CUDA: as :mod:`hedgelab.kernels.products`, and selections by a kernel where it reaches.

Sums are accumulated in at least single precision, whatever the type of weights and sources.
"""

# mypy: disallow-untyped-decorators=False

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hedgelab.kernels.codes import Codes, Layout
from hedgelab.kernels.selection import LARGEST_FIXED_SELECTION, Product
from hedgelab.kernels.triton import selection


class Tile(NamedTuple):
    """How a program of a kernel is cut; ``block`` and ``entries`` are powers of two."""

    block: int  # columns of d_in that a program handles
    entries: int  # stored values of a row, or of a latent, in flight at once
    num_warps: int


# Chosen by ``python -m tests.benchmarks.gpu_kernels`` on an H100.
DECODE = Tile(block=256, entries=8, num_warps=2)
GRADIENT = Tile(block=256, entries=4, num_warps=1)

# Values that a program sums; a latent that fires more often is split. In all there are at most so many further parts.
PART, MOST_PARTS = 256, 4096

# Largest share of stored values at which gathering rows beats a dense product: matrix units multiply 16-bit numbers an
# order of magnitude faster than memory delivers scattered rows, float32 ones hardly faster.
DENSITY_16_BIT = 1 / 600
DENSITY_32_BIT = 1 / 50


def max_share(dtype: torch.dtype) -> float:
    """Share of values stored above which dense products in a type are faster."""
    return DENSITY_16_BIT if dtype.itemsize == 2 else DENSITY_32_BIT


def select(product: Product, count: int, scale: Tensor | None, per_row: bool) -> Codes | None:
    """The ``count`` largest positive entries of each row, or of all; None where the kernels do not reach.

    Of equal entries the first in memory is kept. The kernels do not reach where count is above a quarter of a row's groups, in
    float64, or where masses of pre-activations of a row are equal. A small selection is PyTorch's, which chooses among equal
    entries as it likes, and stores ``count`` of them even where some are not positive.
    """
    batch, d_sae = product.x.shape[0], product.W_enc.shape[1]
    small = batch * d_sae <= LARGEST_FIXED_SELECTION and count <= (d_sae if per_row else batch * d_sae)
    if not small and (product.dtype == torch.float64 or not selection.fits(batch, d_sae, count if per_row else 1)):
        return None
    with torch.autocast(product.x.device.type, enabled=False):
        pre = torch.addmm(product.b_enc, product.x, product.W_enc)
    if small:
        return selection.small_top_k(pre, count, scale, per_row)
    return selection.top_k(pre, count, scale) if per_row else selection.batch_top_k(pre, count, scale)


@triton.jit
def _decode(
    crow_ptr: "Any", latents_ptr: "Any", values_ptr: "Any", weight_ptr: "Any", stops_ptr: "Any", out_ptr: "Any", batch: "Any",
    width: "Any", LEVELS: tl.constexpr, DOUBLE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One example and one tile of columns; rows run fastest, so that a column slab of the weights stays in L2."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    start = tl.load(crow_ptr + row)
    stop = tl.load(crow_ptr + row + 1)
    lanes = tl.arange(0, ENTRIES)
    low = tl.full([], 0, tl.int64)
    for level in tl.static_range(LEVELS):
        total = tl.full([BLOCK], 0, ACC)
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


def decode_levels(layout: Layout, values: Tensor, weight: Tensor, levels: Sequence[int], tile: Tile = DECODE) -> Tensor:
    """As :func:`hedgelab.kernels.products.decode_levels`, by gathering rows; no ``[batch, k, d]`` in memory."""
    batch, width = layout.row_count, weight.shape[1]
    out = torch.empty(len(levels), batch, width, dtype=values.dtype, device=weight.device)
    if batch:
        stops = _stops(tuple(levels), weight.device)
        pointers = layout.crow, layout.latents, values.contiguous(), weight.contiguous(), stops, out
        tiles = triton.cdiv(width, tile.block)
        _decode[(batch, tiles)](*pointers, batch, width, LEVELS=len(levels), **_shape(tile, values))
    return out


@triton.jit
def _latent_gradients(
    offsets_ptr: "Any", order_ptr: "Any", latents_ptr: "Any", rows_ptr: "Any", values_ptr: "Any", source_ptr: "Any",
    stops_ptr: "Any", weight_ptr: "Any", gradient_ptr: "Any", bias_ptr: "Any", dots_ptr: "Any", parts_ptr: "Any",
    bias_parts_ptr: "Any", batch: "Any", width: "Any", nnz: "Any", d_sae: "Any", part: "Any", LEVELS: tl.constexpr,
    WEIGHTS: tl.constexpr, BIAS: tl.constexpr, DOTS: tl.constexpr, DOUBLE: tl.constexpr, ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One latent and one tile of columns; latents run fastest, so that a column slab of the source stays in L2.

    A latent's program sums its values up to the next multiple of ``part`` in the order by latent. What is left of it behind a
    multiple has a program there, behind those of the latents, and :func:`_add_parts` adds it.
    """
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = tl.program_id(0).to(tl.int64)
    own = program < d_sae
    boundary = tl.where(own, 0, (program - d_sae + 1) * part)
    beside = tl.load(order_ptr + boundary, mask=program >= d_sae, other=0)
    latent = tl.where(own, program, tl.load(latents_ptr + beside, mask=program >= d_sae, other=0))
    tile = tl.program_id(1).to(tl.int64)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    first = tl.load(offsets_ptr + latent)
    start = tl.where(own, first, boundary)
    stop = tl.minimum(tl.load(offsets_ptr + latent + 1), (start // part + 1) * part)
    stop = tl.where(own | (first < boundary), stop, start)  # a latent that begins at the multiple has it already
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
        if WEIGHTS:
            total += tl.sum(values[:, None] * source, axis=0)
        if DOTS:
            tl.store(dots_ptr + tile * nnz + order, tl.sum(source * weight[None, :], axis=1), mask=valid)
        if BIAS:
            bias += values
    if WEIGHTS:
        tl.store(gradient_ptr + latent * width + columns, total, mask=inside & own)
        tl.store(parts_ptr + (program - d_sae) * width + columns, total, mask=inside & (program >= d_sae))
    if BIAS and tile == 0:
        tl.store(bias_ptr + latent, tl.sum(bias, axis=0), mask=own)
        tl.store(bias_parts_ptr + program - d_sae, tl.sum(bias, axis=0), mask=program >= d_sae)


@triton.jit
def _add_parts(
    offsets_ptr: "Any", order_ptr: "Any", latents_ptr: "Any", gradient_ptr: "Any", bias_ptr: "Any", parts_ptr: "Any",
    bias_parts_ptr: "Any", width: "Any", part: "Any", WEIGHTS: tl.constexpr, BIAS: tl.constexpr, DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Add the parts of a latent, at the first multiple of ``part`` inside it, to what its own program has summed."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = tl.program_id(0).to(tl.int64)
    boundary = (program + 1) * part
    latent = tl.load(latents_ptr + tl.load(order_ptr + boundary))
    first = tl.load(offsets_ptr + latent)
    leads = (first < boundary) & (first + part >= boundary)
    stop = tl.where(leads, (tl.load(offsets_ptr + latent + 1) - 1) // part, program)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (columns < width) & leads
    if WEIGHTS:
        total = tl.load(gradient_ptr + latent * width + columns, mask=inside, other=0.0).to(ACC)
        for one in range(program, stop):
            total += tl.load(parts_ptr + one * width + columns, mask=inside, other=0.0)
        tl.store(gradient_ptr + latent * width + columns, total, mask=inside)
    if BIAS and tl.program_id(1) == 0:
        bias = tl.load(bias_ptr + latent).to(ACC)
        for one in range(program, stop):
            bias += tl.load(bias_parts_ptr + one)
        tl.store(bias_ptr + latent, bias, mask=leads)


def latent_gradients(
    layout: Layout,
    values: Tensor,
    source: Tensor,
    levels: Sequence[int],
    dtype: torch.dtype | None,
    weight: Tensor | None = None,
    bias: bool = False,
    tile: Tile = GRADIENT,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`hedgelab.kernels.products.latent_gradients`: each row is summed in fast memory and written once.

    Latents beyond the last level get zeros. Weight gradients of many values are a dense product.
    """
    count, batch, width = source.shape
    if weight is None and count == 1 and len(values) > max_share(source.dtype) * batch * layout.d_sae:
        dense = Codes(values.to(source.dtype), layout).to_dense()
        sums = Codes(values, layout).sum_per_latent() if bias else None
        return None if dtype is None else (dense.t() @ source[0]).to(dtype), sums, None
    offsets, rows, order = layout.transposed
    tiles = triton.cdiv(width, tile.block)
    gradient = None if dtype is None else source.new_empty(layout.d_sae, width, dtype=dtype)
    sums = values.new_empty(layout.d_sae) if bias else None
    dots = None if weight is None else values.new_empty(tiles, len(values))
    part = max(PART, triton.next_power_of_2(triton.cdiv(len(values), MOST_PARTS)))
    parts = max(0, len(values) - 1) // part
    further = values.new_empty(parts, width), values.new_empty(parts)
    places = offsets, order, layout.latents
    inputs = rows, values.contiguous(), source.contiguous(), _stops(tuple(levels), source.device)
    # Kernels do not touch a pointer that they do not need.
    weights, *outputs = (source if given is None else given.contiguous() for given in (weight, gradient, sums, dots))
    wanted, shape = {"WEIGHTS": dtype is not None, "BIAS": bias}, _shape(tile, values)
    _latent_gradients[(layout.d_sae + parts, tiles)](
        *places, *inputs, weights, *outputs, *further, batch, width, len(values), layout.d_sae, part,
        LEVELS=count, DOTS=weight is not None, **wanted, **shape,
    )  # fmt: skip
    if parts:
        del shape["ENTRIES"]
        _add_parts[(parts, tiles)](*places, *outputs[:2], *further, width, part, **wanted, **shape)
    return gradient, sums, None if dots is None else dots.sum(0)


def _shape(tile: Tile, values: Tensor) -> dict[str, Any]:
    double = values.dtype == torch.float64
    return {"DOUBLE": double, "ENTRIES": tile.entries, "BLOCK": tile.block, "num_warps": tile.num_warps}


@lru_cache
def _stops(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """The levels on a device, kept: a copy would be waited for, and a captured step must find them where they were."""
    return torch.tensor(levels, dtype=torch.long, device=device)
