"""Which latents are kept: exact selections from pre-activations that never exist whole.

The encoder's product runs in tiles of rows. A tile is reused, so its pages are touched once, and everything that a selection
does to it happens while it is in cache. Tile i of n takes rows i, i + n, i + 2n …: every tile is a fair sample of the batch,
whatever its order, and the first one tells what the others will look like.

Selections look at groups of eight latents first: only groups whose largest entry can matter are opened.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hedgelab.kernels.agreement import Share, among_largest
from hedgelab.kernels.allocator import scratch
from hedgelab.kernels.layout import Layout, row_pointers, stable_order
from hedgelab.kernels.values import Encoder

TILE_BYTES = 32 * 2**20  # a larger tile is mapped anew each step (see allocator), a smaller one slows the product down
LEAST_ROWS = 512
GROUP_BITS = 3
GROUP = 1 << GROUP_BITS
SAMPLE_HITS = 256  # entries above the sought threshold in the sample that estimates it: 6 % standard error
MARGIN = 1.3  # candidates sought, as a multiple of what is kept


class Entries(NamedTuple):
    """Selected entries of the pre-activations.

    Attributes:
        layout: Where they lie.
        pre: Their pre-activations, ``[nnz]``.
    """

    layout: Layout
    pre: Tensor


class Product(NamedTuple):
    """The encoder's product, without a gradient.

    Attributes:
        x: Centred activations, ``[batch, d_in]``.
        W_enc: ``[d_in, d_sae]``.
        b_enc: ``[d_sae]``.
        dtype: Of the pre-activations; at least single precision, whatever the product is computed in.
    """

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, encoder: Encoder) -> "Product":
        """That of some activations, in the type that autocast asks for."""
        dtype = encoder.compute_dtype
        centred = (x - encoder.b_dec).to(dtype)
        working = torch.promote_types(dtype, torch.float32)
        return cls(centred, encoder.W_enc.to(dtype), encoder.b_enc.to(dtype), working)

    def tiles(self, rows: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Rows (as a strided slice) and pre-activations ``[rows, padded]`` of each tile, overwritten by the next.

        Columns from d_sae on, up to a multiple of ``GROUP``, are -inf.
        """
        batch, d_sae = self.x.shape[0], self.W_enc.shape[1]
        count = -(-batch // (rows or max(LEAST_ROWS, TILE_BYTES // (self.dtype.itemsize * d_sae))))
        buffer = scratch(-(-batch // count) if count else 0, -(-d_sae // GROUP) * GROUP, self.dtype)
        buffer[:, d_sae:] = -torch.inf
        for start in range(count):
            part = self.x[start::count]
            tile = buffer[: part.shape[0]]
            if part.dtype == self.dtype:
                torch.addmm(self.b_enc, part, self.W_enc, out=tile[:, :d_sae])
            else:
                tile[:, :d_sae] = torch.addmm(self.b_enc, part, self.W_enc)
            yield slice(start, None, count), tile


def select_topk(product: Product, k: int, scale: Tensor | None) -> Entries:
    """The k largest of each row, ranked by pre-activation (times ``scale [d_sae]``)."""
    batch, d_sae = product.x.shape[0], product.W_enc.shape[1]
    latents = torch.empty(batch, k, dtype=torch.long)
    pre = torch.empty(batch, k, dtype=product.dtype)
    ranking = _Ranking(scale, d_sae)
    for rows, tile in product.tiles():
        columns = largest_columns(ranking(tile), k, d_sae)
        latents[rows] = columns
        pre[rows] = tile.gather(1, columns)
    crow = torch.arange(0, (batch + 1) * k, k) if k else torch.zeros(batch + 1, dtype=torch.long)
    return Entries(Layout(crow, latents.view(-1), d_sae), pre.view(-1))


def largest_columns(ranked: Tensor, k: int, d_sae: int) -> Tensor:
    """Columns of the k largest of each row of ``ranked [rows, padded]``, ``[rows, k]`` in no order; ties as ``topk``'s.

    The k largest entries lie in the k groups with the largest maxima. Where ties make "the k largest" ambiguous in a
    tile, ``topk`` decides for the tile.
    """
    groups = ranked.shape[1] // GROUP
    if k * 2 > groups or not ranked.numel():
        return ranked[:, :d_sae].topk(k, dim=1, sorted=False).indices
    maxima = ranked.view(-1, GROUP, groups).amax(1)
    chosen = _largest_k_of_rows(maxima, k)
    if chosen is not None:
        columns = ((chosen % groups).unsqueeze(1) + torch.arange(0, GROUP * groups, groups)).view(-1, GROUP * k)
        inside = _largest_k_of_rows(ranked.gather(1, columns), k)
        if inside is not None:
            return columns.view(-1)[inside].view(-1, k)
    return ranked[:, :d_sae].topk(k, dim=1, sorted=False).indices


def select_batch_topk(product: Product, k: int, scale: Tensor | None, share: Share | None = None) -> Entries:
    """The k · batch largest positive entries of the batch (all, if there are fewer), ranked by ``pre`` (times ``scale``).

    With a ``share`` the product is that part of a larger one, of whose batch the largest entries are kept; returned are those
    that lie in the part.

    Entries from a threshold on, estimated from the first tile, are collected from all tiles; the largest are then picked among
    them. Should they turn out too few, all positive entries are candidates in a second and last pass. The result is that of a
    full sort; of equal entries those with the lowest row, then latent, are kept. Memory holds no more candidates than one tile
    has, and twice what is kept.
    """
    wanted = k * (product.x.shape[0] if share is None else share.rows)
    density = k / (product.W_enc.shape[1] if share is None else share.d_sae)
    candidates, floor = _candidates(product, scale, wanted, density, share)
    found = candidates.ranked.shape[0]
    if share is not None:
        found = int(share.ranks.sum(torch.tensor(found)))
    if found < wanted and floor > 0:
        candidates, _ = _candidates(product, scale, wanted, None, share)
    if share is not None:
        positions = share.positions(candidates.rows, candidates.latents)
        kept = _flatnonzero(among_largest(candidates.ranked, positions, wanted, share.ranks))
        candidates = candidates.at(kept)
    else:
        candidates = _largest(candidates, wanted, product.W_enc.shape[1])
    return _in_row_order(candidates, product.x.shape[0], product.W_enc.shape[1])


def select_above(product: Product, threshold: Tensor) -> Entries:
    """All entries above ``threshold`` (a scalar or ``[d_sae]``)."""
    batch, d_sae = product.x.shape[0], product.W_enc.shape[1]
    parts = []
    for rows, tile in product.tiles():
        flat = _flatnonzero(tile[:, :d_sae] > threshold)
        columns = flat % d_sae
        parts.append(_Candidates(_global_rows(flat // d_sae, rows), columns, _take(tile, flat // d_sae, columns), None))
    found = _Candidates.cat(parts) if parts else _Candidates.none(product.dtype)
    return _in_row_order(found, batch, d_sae)


def sampled_density(product: Product, threshold: Tensor | float, rows: int = 32) -> float:
    """Share of entries above a threshold, estimated from a few rows."""
    batch = product.x.shape[0]
    if not batch:
        return 0.0
    sample = product._replace(x=product.x[:: -(-batch // rows)])
    _, tile = next(sample.tiles())
    return float((tile[:, : product.W_enc.shape[1]] > threshold).float().mean())


class _Candidates(NamedTuple):
    """Entries in any order: rows, latents, pre-activations and what ranks them (None: the pre-activations)."""

    rows: Tensor
    latents: Tensor
    pre: Tensor
    scaled: Tensor | None

    @property
    def ranked(self) -> Tensor:
        return self.pre if self.scaled is None else self.scaled

    def at(self, index: Tensor) -> "_Candidates":
        scaled = None if self.scaled is None else self.scaled[index]
        return _Candidates(self.rows[index], self.latents[index], self.pre[index], scaled)

    @classmethod
    def none(cls, dtype: torch.dtype) -> "_Candidates":
        empty = torch.empty(0, dtype=torch.long)
        return cls(empty, empty, torch.empty(0, dtype=dtype), None)

    @classmethod
    def cat(cls, parts: list["_Candidates"]) -> "_Candidates":
        scaled = None if parts[0].scaled is None else torch.cat([part.ranked for part in parts])
        rows, latents, pre = (torch.cat([part[field] for part in parts]) for field in range(3))  # type: ignore[misc]
        return cls(rows, latents, pre, scaled)


class _Ranking:
    """What entries are ranked by: the tile itself, or a reused copy times a scale."""

    def __init__(self, scale: Tensor | None, d_sae: int) -> None:
        self.scale = scale
        self.d_sae = d_sae
        self.buffer: Tensor | None = None

    def __call__(self, tile: Tensor) -> Tensor:
        if self.scale is None:
            return tile
        if self.buffer is None:
            self.buffer = torch.full_like(tile, -torch.inf)
        ranked = self.buffer[: tile.shape[0]]
        torch.mul(tile[:, : self.d_sae], self.scale, out=ranked[:, : self.d_sae])
        return ranked


def _candidates(
    product: Product, scale: Tensor | None, wanted: int, density: float | None, share: Share | None
) -> tuple[_Candidates, float]:
    """Entries among which are the ``wanted`` largest, if as many lie above the floor; and the floor.

    Args:
        product: Its product is looked at tile by tile.
        scale: What pre-activations are multiplied by for the ranking.
        wanted: How many are sought over all parts.
        density: Share of all entries that is sought, by which a floor is estimated from the first tile (the lowest of all
            parts' estimates); None takes 0.
        share: Which part of a larger product this is.
    """
    d_sae = product.W_enc.shape[1]
    ranking, floor = _Ranking(scale, d_sae), 0.0 if density is None else None
    few = density is not None and MARGIN * density * GROUP < 1 / 2
    parts: list[_Candidates] = []
    found, above = 0, 0.0
    for rows, tile in product.tiles():
        ranked = ranking(tile)
        if floor is None:
            assert density is not None
            floor = _estimated_floor(ranked, density)
            if share is not None:
                floor = float(share.ranks.min(torch.tensor(floor, dtype=torch.float64)))
            above = floor
        local, columns = _entries_above(ranked, above, sparse=few)
        scaled = None if scale is None else _take(ranked, local, columns)
        parts.append(_Candidates(_global_rows(local, rows), columns, _take(tile, local, columns), scaled))
        found += local.shape[0]
        if found > 2 * wanted:  # more than can be kept: go on from the edge of the largest so far
            parts = [_largest(_Candidates.cat(parts), wanted, d_sae)]
            found = wanted
            above = max(above, _just_below(float(parts[0].ranked.min()), product.dtype))
    return _Candidates.cat(parts) if parts else _Candidates.none(product.dtype), floor or 0.0


def _estimated_floor(ranked: Tensor, density: float) -> float:
    """A number that about ``MARGIN · density`` of the entries of a tile exceed, even if many are equal; never below 0."""
    stride = max(1, int(density * ranked.numel() / SAMPLE_HITS))
    sample = ranked.view(-1)[:: stride | 1].numpy()  # odd, so that it walks through all columns
    above = min(int(np.ceil(MARGIN * density * sample.size)), sample.size)
    edge = float(np.partition(sample, sample.size - above)[sample.size - above])
    return max(0.0, _just_below(edge, ranked.dtype))


def _just_below(value: float, dtype: torch.dtype) -> float:
    """The next smaller number of a type, so that entries equal to ``value`` exceed it."""
    return float(torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(-torch.inf, dtype=dtype)))


def _entries_above(ranked: Tensor, threshold: float, sparse: bool) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of a tile above a threshold; ``sparse``: few are expected, look at groups first."""
    width = ranked.shape[1]
    if not sparse:
        flat = _flatnonzero(ranked > threshold)
        return flat // width, flat % width
    groups = width // GROUP
    found = _flatnonzero(ranked.view(-1, GROUP, groups).amax(1) > threshold)
    rows = found // groups
    first = found - rows * groups
    inside = ((rows * width + first).unsqueeze(1) + torch.arange(0, width, groups)).view(-1)
    hits = _flatnonzero(ranked.view(-1)[inside] > threshold)
    group = hits >> GROUP_BITS  # shifts and masks: integer division is slow
    return rows[group], first[group] + (hits & (GROUP - 1)) * groups


def _largest(candidates: _Candidates, wanted: int, d_sae: int) -> _Candidates:
    """The ``wanted`` largest candidates, of equal ones those with the lowest row, then latent; all, if there are fewer."""
    ranked = candidates.ranked
    excess = ranked.shape[0] - wanted
    if excess <= 0:
        return candidates
    edge = float(np.partition(ranked.numpy(), excess)[excess])
    keep = ranked >= edge
    surplus = int(keep.sum()) - wanted
    if surplus > 0:
        tied = _flatnonzero(ranked == edge)
        position = candidates.rows[tied] * d_sae + candidates.latents[tied]
        keep[tied[position.argsort(descending=True)[:surplus]]] = False
    return candidates.at(_flatnonzero(keep))


def _in_row_order(candidates: _Candidates, batch: int, d_sae: int) -> Entries:
    order = stable_order(candidates.rows, batch)
    crow = row_pointers(candidates.rows, batch)
    return Entries(Layout(crow, candidates.latents[order], d_sae), candidates.pre[order])


def _largest_k_of_rows(values: Tensor, k: int) -> Tensor | None:
    """Flat positions of the k largest entries of each row, row by row, ``[rows · k]``; None where ties make them more."""
    rows, width = values.shape
    edge = np.partition(values.numpy(), width - k, axis=1)[:, width - k : width - k + 1]
    flat = _flatnonzero(values >= torch.from_numpy(edge))
    return flat if flat.shape[0] == rows * k else None


def _take(tile: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return tile.view(-1).index_select(0, rows * tile.shape[1] + columns)


def _global_rows(local: Tensor, rows: slice) -> Tensor:
    first, count = rows.start, rows.step
    return local * int(count) + int(first)


def _flatnonzero(mask: Tensor) -> Tensor:
    """Flat positions where a mask holds; NumPy's search is several times faster than PyTorch's."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))
