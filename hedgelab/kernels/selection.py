"""Which latents are kept: exact selections from pre-activations that never exist whole.

The encoder's product runs in tiles of rows. A tile is reused, so its pages are touched once, and everything that a selection
does to it happens while it is in cache. Tile i of n takes rows i, i + n, i + 2n …: every tile is a fair sample of the batch,
whatever its order, and the first one tells what the others will look like.

Selections look at groups of eight latents first: only groups whose largest entry can matter are opened.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hedgelab.kernels.agreement import Share, among_largest
from hedgelab.kernels.allocator import scratch
from hedgelab.kernels.layout import Layout, row_pointers, stable_order
from hedgelab.kernels.ranks import ALONE
from hedgelab.kernels.values import BatchTopK, Encoder, JumpReLU, ReLU, Selection, Threshold, TopK, compute_dtype

# On the CPU a larger tile is mapped anew each step (see allocator), and a smaller one slows the product down.
TILE_BYTES = {"cpu": 32 * 2**20, "cuda": 2**31}
LEAST_ROWS = 512
GROUP_BITS = 3
GROUP = 1 << GROUP_BITS
SAMPLE_HITS = 256  # entries above the sought threshold in the sample that estimates it: 6 % standard error
MARGIN = 1.3  # candidates sought, as a multiple of what is kept


class Entries(NamedTuple):
    """Selected entries of the pre-activations: where they lie, and what they are, ``[nnz]``."""

    layout: Layout
    pre: Tensor


class Product(NamedTuple):
    """The encoder's product ``x W_enc + b_enc`` of centred activations ``[batch, d_in]``, without a gradient."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    dtype: torch.dtype  # of the pre-activations: at least single precision, whatever the product is computed in

    @classmethod
    def of(cls, x: Tensor, encoder: Encoder) -> "Product":
        """That of some activations, in the type that autocast asks for.

        Casts are made here, not by autocast: its cache would hand stale weights to the second step taken in one context.
        """
        dtype = compute_dtype(encoder.W_enc)
        with torch.autocast(x.device.type, enabled=False):
            centred = (x - encoder.b_dec).to(dtype)
            working = torch.promote_types(dtype, torch.float32)
            return cls(centred, encoder.W_enc.to(dtype), encoder.b_enc.to(dtype), working)

    def tiles(self, scale: Tensor | None = None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of each tile its rows (a strided slice), its pre-activations, and what ranks them: these, or times ``scale``.

        The next tile overwrites them. Columns of both from d_sae on, up to a multiple of ``GROUP``, are -inf.
        """
        batch, d_sae = self.x.shape[0], self.W_enc.shape[1]
        least = max(LEAST_ROWS, TILE_BYTES[self.x.device.type] // (self.dtype.itemsize * d_sae))
        count = max(1, -(-batch // least))
        shape = (-(-batch // count), -(-d_sae // GROUP) * GROUP)
        buffers = [scratch(*shape, self.dtype, self.x.device) for _ in range(1 if scale is None else 2)]
        for buffer in buffers:
            buffer[:, d_sae:] = -torch.inf
        for start in range(count):
            part = self.x[start::count]
            tile = ranked = buffers[0][: part.shape[0]]
            if part.dtype == self.dtype:
                torch.addmm(self.b_enc, part, self.W_enc, out=tile[:, :d_sae])
            else:
                tile[:, :d_sae] = torch.addmm(self.b_enc, part, self.W_enc)
            if scale is not None:
                ranked = buffers[1][: part.shape[0]]
                torch.mul(tile[:, :d_sae], scale, out=ranked[:, :d_sae])
            yield slice(start, None, count), tile, ranked


def select(product: Product, encoder: Encoder, selection: Selection, fast: Callable[..., Entries | None]) -> Entries:
    """The entries of the pre-activations that codes store; ``fast`` is a device's kernel, None where it does not reach."""
    match selection:
        case TopK(k, among):
            scale = encoder.scale if among is None else None
            return fast(product, k, scale, True) or select_topk(product, k, scale)
        case BatchTopK(k, _, ranks):
            share = encoder.share_of(len(product.x), ranks)
            found = fast(product, k, encoder.scale, False) if share.ranks.size == 1 else None
            return found or select_batch_topk(product, k, encoder.scale, share)
        case ReLU():
            return select_above(product, product.b_enc.new_zeros(()))
        case Threshold(threshold):
            return select_above(product, threshold)
        case JumpReLU(log_threshold, bandwidth):
            return select_above(product, log_threshold.exp() - bandwidth / 2)


def select_topk(product: Product, k: int, scale: Tensor | None) -> Entries:
    """The k largest of each row, ranked by pre-activation (times ``scale [d_sae]``)."""
    batch, d_sae = product.x.shape[0], product.W_enc.shape[1]
    latents = torch.empty(batch, k, dtype=torch.long, device=product.x.device)
    pre = torch.empty(batch, k, dtype=product.dtype, device=product.x.device)
    for rows, tile, ranked in product.tiles(scale):
        columns = largest_columns(ranked, k, d_sae)
        latents[rows] = columns
        pre[rows] = tile.gather(1, columns)
    return Entries(Layout.equal_rows(latents, d_sae), pre.view(-1))


def largest_columns(ranked: Tensor, k: int, d_sae: int) -> Tensor:
    """Columns of the k largest of each row of ``ranked [rows, padded]``, ``[rows, k]`` in no order; ties as ``topk``'s.

    The k largest entries lie in the k groups with the largest maxima. Where ties make "the k largest" ambiguous in a
    tile, ``topk`` decides for the tile.
    """
    rows, groups = ranked.shape[0], ranked.shape[1] // GROUP
    if k * 2 <= groups and ranked.numel() and not ranked.is_cuda:
        chosen = _largest_k_of_rows(ranked.view(rows, GROUP, groups).amax(1), k)
        if chosen is not None:
            columns = ((chosen % groups).unsqueeze(1) + torch.arange(0, GROUP * groups, groups)).view(-1, GROUP * k)
            inside = _largest_k_of_rows(ranked.gather(1, columns), k)
            if inside is not None:
                return columns.view(-1)[inside].view(-1, k)
    return ranked[:, :d_sae].topk(k, dim=1, sorted=False).indices


def select_batch_topk(product: Product, k: int, scale: Tensor | None, share: Share) -> Entries:
    """Of the k · batch largest positive entries of the global batch, ranked by ``pre`` (times ``scale``), those of this part.

    Entries from a threshold on, estimated from the first tile, are collected from all tiles; the largest are then picked among
    them. Should they turn out too few, all positive entries are candidates in a second and last pass. The result is that of a
    full sort; of equal entries those with the lowest row, then latent, are kept. Memory holds no more candidates than one tile
    has, and twice what is kept.
    """
    wanted = k * share.rows
    candidates, floor = _candidates(product, scale, wanted, k / share.d_sae, share)
    found = share.ranks.sum(torch.tensor(len(candidates.pre), device=product.x.device))
    if floor > 0 and int(found) < wanted:
        candidates, _ = _candidates(product, scale, wanted, None, share)
    return _in_row_order(candidates.largest(wanted, scale, share), product)


def select_above(product: Product, threshold: Tensor) -> Entries:
    """All entries above ``threshold`` (a scalar or ``[d_sae]``)."""
    d_sae, parts = product.W_enc.shape[1], []
    for rows, tile, _ in product.tiles():
        flat = _flatnonzero(tile[:, :d_sae] > threshold)
        parts.append(_Candidates.of(tile, flat // d_sae, flat % d_sae, rows))
    return _in_row_order(_Candidates.cat(parts), product)


class _Candidates(NamedTuple):
    """Entries in any order: rows, latents, pre-activations."""

    rows: Tensor
    latents: Tensor
    pre: Tensor

    @classmethod
    def of(cls, tile: Tensor, local: Tensor, columns: Tensor, rows: slice) -> "_Candidates":
        """Entries of a tile, by their rows in it and columns."""
        pre = tile.view(-1)[local * tile.shape[1] + columns]
        return cls(local * int(rows.step) + int(rows.start), columns, pre)

    @classmethod
    def cat(cls, parts: list["_Candidates"]) -> "_Candidates":
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def ranked(self, scale: Tensor | None) -> Tensor:
        return self.pre if scale is None else self.pre * scale[self.latents]

    def largest(self, wanted: int, scale: Tensor | None, share: Share) -> "_Candidates":
        """Those among the ``wanted`` largest of all parts; of equal ones those with the lowest row, then latent."""

        def positions(index: Tensor) -> Tensor:
            return share.positions(self.rows[index], self.latents[index])

        index = _flatnonzero(among_largest(self.ranked(scale), positions, wanted, share.ranks))
        return _Candidates(*(field[index] for field in self))


def _candidates(
    product: Product, scale: Tensor | None, wanted: int, density: float | None, share: Share
) -> tuple[_Candidates, float]:
    """Entries among which are the ``wanted`` largest, if as many lie above the floor; and the floor.

    The floor is the lowest of all parts' estimates, from their first tiles, of what a share ``density`` of all entries
    exceeds; without a density it is 0.
    """
    few = density is not None and MARGIN * density * GROUP < 1 / 2
    parts: list[_Candidates] = []
    found, floor, above = 0, 0.0, 0.0
    for rows, tile, ranked in product.tiles(scale):
        if density is not None and not parts:
            estimate = torch.tensor(_estimated_floor(ranked, density), dtype=torch.float64, device=tile.device)
            above = floor = float(share.ranks.min(estimate))
        parts.append(_Candidates.of(tile, *_entries_above(ranked, above, few), rows))
        found += len(parts[-1].pre)
        if found > 2 * wanted:  # more than can be kept: go on from the edge of the largest so far
            parts = [_Candidates.cat(parts).largest(wanted, scale, share._replace(ranks=ALONE))]
            found = wanted
            above = max(above, _just_below(parts[0].ranked(scale).min()))
    return _Candidates.cat(parts), floor


def _estimated_floor(ranked: Tensor, density: float) -> float:
    """A number that about ``MARGIN · density`` of the entries of a tile exceed, even if many are equal; never below 0."""
    stride = max(1, int(density * ranked.numel() / SAMPLE_HITS))
    sample = ranked.view(-1)[:: stride | 1]  # odd, so that it walks through all columns
    above = min(math.ceil(MARGIN * density * sample.numel()), sample.numel())
    return max(0.0, _just_below(sample.kthvalue(sample.numel() - above + 1).values)) if above else 0.0


def _just_below(value: Tensor) -> float:
    """The next smaller number of a type, so that entries equal to ``value`` exceed it."""
    return float(torch.nextafter(value, torch.full_like(value, -torch.inf)))


def _entries_above(ranked: Tensor, threshold: float, sparse: bool) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of a tile above a threshold; ``sparse``: few are expected, look at groups first."""
    width = ranked.shape[1]
    if not sparse:
        flat = _flatnonzero(ranked > threshold)
        return flat // width, flat % width
    groups = width // GROUP
    found = _flatnonzero(ranked.view(ranked.shape[0], GROUP, groups).amax(1) > threshold)
    rows = found // groups
    first = found - rows * groups
    inside = ((rows * width + first).unsqueeze(1) + torch.arange(0, width, groups, device=ranked.device)).view(-1)
    hits = _flatnonzero(ranked.view(-1)[inside] > threshold)
    group = hits >> GROUP_BITS  # shifts and masks: integer division is slow
    return rows[group], first[group] + (hits & (GROUP - 1)) * groups


def _in_row_order(candidates: _Candidates, product: Product) -> Entries:
    batch, d_sae = product.x.shape[0], product.W_enc.shape[1]
    order = stable_order(candidates.rows, batch)
    crow = row_pointers(candidates.rows, batch)
    return Entries(Layout(crow, candidates.latents[order], d_sae), candidates.pre[order])


def _largest_k_of_rows(values: Tensor, k: int) -> Tensor | None:
    """Flat positions of the k largest entries of each row, row by row, ``[rows · k]``; None where ties make them more."""
    rows, width = values.shape
    edge = np.partition(values.numpy(), width - k, axis=1)[:, width - k : width - k + 1]
    flat = _flatnonzero(values >= torch.from_numpy(edge))
    return flat if flat.shape[0] == rows * k else None


def _flatnonzero(mask: Tensor) -> Tensor:
    """Flat positions where a mask holds; NumPy's search is several times faster than PyTorch's."""
    return mask.flatten().nonzero().squeeze(1) if mask.is_cuda else torch.from_numpy(np.flatnonzero(mask.numpy()))
