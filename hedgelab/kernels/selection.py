"""Which latents are kept: exact selections from pre-activations that never exist whole.

The encoder's product runs in tiles of rows; a tile is reused, and selected from while it is in cache. Tile i of n takes rows
i, i + n, i + 2n …: every tile is a fair sample of the batch, and the first one tells what the others will look like.
Selections open only those groups of eight latents whose largest entry can matter; they give codes of pre-activations.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hedgelab.kernels.allocator import scratch
from hedgelab.kernels.codes import Codes, Layout, row_pointers, stable_order
from hedgelab.kernels.ranks import ALONE, Share, among_largest
from hedgelab.kernels.values import BatchTopK, Encoder, Selection, TopK, computed_in, floor_of

# On the CPU a larger tile is mapped anew each step (see allocator), and a smaller one slows the product down.
TILE_BYTES = {"cpu": 32 * 2**20, "cuda": 2**31}
LEAST_ROWS = 512
GROUP_BITS = 3
GROUP = 1 << GROUP_BITS
SAMPLE_HITS = 256  # entries above the sought threshold in the sample that estimates it: 6 % standard error
LARGEST_FIXED_SELECTION = 1 << 25  # batch · d_sae up to which a GPU selects without waiting to learn how much it found
MARGIN = 1.3  # candidates sought, as a multiple of what is kept


class Product(NamedTuple):
    """The encoder's product ``x W_enc + b_enc`` of centred activations ``[batch, d_in]``, without a gradient."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    dtype: torch.dtype  # of the pre-activations: at least single precision, whatever the product is computed in

    @classmethod
    def of(cls, x: Tensor, encoder: Encoder) -> "Product":
        """That of some activations; cast here, since autocast's cache hands stale weights to a context's second step."""
        dtype = computed_in(encoder.W_enc)
        with torch.autocast(x.device.type, enabled=False):
            centred = (x - encoder.b_dec).to(dtype)
            return cls(centred, encoder.W_enc.to(dtype), encoder.b_enc.to(dtype), torch.promote_types(dtype, torch.float32))

    def tiles(self, scale: Tensor | None = None, signed: bool = False) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of each tile its rows (a slice), its pre-activations and what ranks them; overwritten by the next, padded by -inf."""
        batch, d_sae = self.x.shape[0], self.W_enc.shape[1]
        least = max(LEAST_ROWS, TILE_BYTES[self.x.device.type] // (self.dtype.itemsize * d_sae))
        count = max(1, -(-batch // least))
        shape = (-(-batch // count), -(-d_sae // GROUP) * GROUP)
        buffers = [scratch(*shape, self.dtype, self.x.device) for _ in range(1 if scale is None and not signed else 2)]
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
            if signed:
                scaled, ranked = ranked, buffers[1][: part.shape[0]]
                torch.abs(scaled[:, :d_sae], out=ranked[:, :d_sae])
            yield slice(start, None, count), tile, ranked


def select(product: Product, encoder: Encoder, selection: Selection, fast: Callable[..., Codes | None]) -> Codes:
    """The pre-activations that codes store; ``fast`` is a device's kernel, which gives None where it does not reach."""
    match selection:
        case TopK(k, _, signed):
            found = None if signed else fast(product, k, encoder.scale, True)
            return found or select_topk(product, k, encoder.scale, signed)
        case BatchTopK(k, _, ranks):
            share = encoder.share_of(len(product.x), ranks)
            found = fast(product, round(k * len(product.x)), encoder.scale, False) if share.ranks.size == 1 else None
            return found or select_batch_topk(product, k, encoder.scale, share)
    return select_above(product, floor_of(selection))


def select_topk(product: Product, k: int, scale: Tensor | None, signed: bool = False) -> Codes:
    """The k largest of each row, ranked by pre-activation (times ``scale [d_sae]``), or by its size where ``signed``."""
    batch, d_sae = product.x.shape[0], product.W_enc.shape[1]
    latents = torch.empty(batch, k, dtype=torch.long, device=product.x.device)
    pre = torch.empty(batch, k, dtype=product.dtype, device=product.x.device)
    for rows, tile, ranked in product.tiles(scale, signed):
        columns = largest_columns(ranked, k, d_sae)
        latents[rows] = columns
        pre[rows] = tile.gather(1, columns)
    return Codes.from_topk(latents, pre, d_sae)


def largest_columns(ranked: Tensor, k: int, d_sae: int) -> Tensor:
    """Columns of the k largest of each row, in no order; they lie in the k groups of largest maxima. ``topk`` decides ties."""
    rows, groups = ranked.shape[0], ranked.shape[1] // GROUP
    if k * 2 <= groups and ranked.numel() and not ranked.is_cuda:
        chosen = _largest_k_of_rows(ranked.view(rows, GROUP, groups).amax(1), k)
        if chosen is not None:
            columns = ((chosen % groups).unsqueeze(1) + torch.arange(0, GROUP * groups, groups)).view(-1, GROUP * k)
            if (inside := _largest_k_of_rows(ranked.gather(1, columns), k)) is not None:
                return columns.view(-1)[inside].view(-1, k)
    return ranked[:, :d_sae].topk(k, dim=1, sorted=False).indices


def select_batch_topk(product: Product, k: float, scale: Tensor | None, share: Share) -> Codes:
    """Of the k · batch largest positive entries of the global batch, ranked by ``pre`` (times ``scale``), those of this part.

    Entries above a floor, estimated from the first tile, are collected from all tiles, and the largest are picked among them:
    those of a full sort, of equal ones the lowest row, then latent. If these are too few, a second pass collects all above 0.
    """
    wanted = round(k * share.rows)
    candidates, floor = _candidates(product, scale, wanted, k / share.d_sae, share)
    found = share.ranks.sum(torch.tensor(len(candidates.pre), device=product.x.device))
    if floor > 0 and int(found) < wanted:
        candidates, _ = _candidates(product, scale, wanted, None, share)
    return candidates.largest(wanted, scale, share).in_row_order(product)


def select_above(product: Product, threshold: Tensor | float) -> Codes:
    """All entries above ``threshold`` (a scalar or ``[d_sae]``)."""
    d_sae = product.W_enc.shape[1]
    tiles = ((tile, _entries_above(tile[:, :d_sae], threshold), rows) for rows, tile, _ in product.tiles())
    return _Candidates.cat([_Candidates.of(tile, *entries, rows) for tile, entries, rows in tiles]).in_row_order(product)


class _Candidates(NamedTuple):
    """Entries in any order: rows, latents, pre-activations."""

    rows: Tensor
    latents: Tensor
    pre: Tensor

    @classmethod
    def of(cls, tile: Tensor, local: Tensor, columns: Tensor, rows: slice) -> "_Candidates":
        """Entries of a tile, by their rows in it and columns."""
        return cls(local * int(rows.step) + int(rows.start), columns, tile.view(-1)[local * tile.shape[1] + columns])

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

    def in_row_order(self, product: Product) -> Codes:
        batch, d_sae = product.x.shape[0], product.W_enc.shape[1]
        order = stable_order(self.rows, batch)
        return Codes(self.pre[order], Layout(row_pointers(self.rows, batch), self.latents[order], d_sae))


def _candidates(
    product: Product, scale: Tensor | None, wanted: int, density: float | None, share: Share
) -> tuple[_Candidates, float]:
    """Entries above a floor, the ``wanted`` largest among them, and that floor: a share ``density`` of all exceeds it."""
    few = density is not None and MARGIN * density * GROUP < 1 / 2
    parts: list[_Candidates] = []
    found, floor, above = 0, 0.0, 0.0
    for rows, tile, ranked in product.tiles(scale):
        if density is not None and not parts:
            estimate = torch.tensor(_estimated_floor(ranked, density), dtype=torch.float64, device=tile.device)
            above = floor = float(share.ranks.min(estimate))
        entries = _entries_in_groups(ranked, above) if few else _entries_above(ranked, above)
        parts.append(_Candidates.of(tile, *entries, rows))
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


def _entries_above(ranked: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of a tile above a threshold."""
    flat = _flatnonzero(ranked > threshold)
    return flat // ranked.shape[1], flat % ranked.shape[1]


def _entries_in_groups(ranked: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The same where few are expected: only groups with an entry above the threshold are opened."""
    width = ranked.shape[1]
    groups = width // GROUP
    found = _flatnonzero(ranked.view(ranked.shape[0], GROUP, groups).amax(1) > threshold)
    rows = found // groups
    first = found - rows * groups
    inside = ((rows * width + first).unsqueeze(1) + torch.arange(0, width, groups, device=ranked.device)).view(-1)
    hits = _flatnonzero(ranked.view(-1)[inside] > threshold)
    group = hits >> GROUP_BITS  # shifts and masks: integer division is slow
    return rows[group], first[group] + (hits & (GROUP - 1)) * groups


def _largest_k_of_rows(values: Tensor, k: int) -> Tensor | None:
    """Flat positions of the k largest entries of each row, row by row, ``[rows · k]``; None where ties make them more."""
    rows, width = values.shape
    edge = np.partition(values.numpy(), width - k, axis=1)[:, width - k : width - k + 1]
    flat = _flatnonzero(values >= torch.from_numpy(edge))
    return flat if flat.shape[0] == rows * k else None


def _flatnonzero(mask: Tensor) -> Tensor:
    """Flat positions where a mask holds; NumPy's search is several times faster than PyTorch's."""
    return mask.flatten().nonzero().squeeze(1) if mask.is_cuda else torch.from_numpy(np.flatnonzero(mask.numpy()))
