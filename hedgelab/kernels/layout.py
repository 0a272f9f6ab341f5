"""Where the stored values of sparse codes lie: index structures computed once a step and shared by all its products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Transposed(NamedTuple):
    """Stored values ordered by latent, then by row; all int64."""

    ccol: Tensor  # where each latent starts, [d_sae + 1]
    rows: Tensor  # the row of each stored value, [nnz]
    order: Tensor  # its position in the row-by-row order, [nnz]: values[order] lie by latent


class Layout:
    """Row pointers ``crow [rows + 1]`` and latents ``[nnz]`` of sparse codes, and what follows from them, when asked.

    Codes that differ in their values only (detached, scaled) share one layout, and so do the forward and backward
    passes of encoder and decoder: nothing is sorted twice a step.
    """

    order: Tensor | None = None
    """Where the values of this layout lie in that of which it is a split by level, ``[nnz]``."""

    def __init__(self, crow: Tensor, latents: Tensor, d_sae: int) -> None:
        self.crow = crow
        self.latents = latents
        self.d_sae = d_sae
        self._levels: dict[tuple[int, ...], LevelLayout] = {}

    @classmethod
    def equal_rows(cls, latents: Tensor, d_sae: int) -> Layout:
        """The layout of as many latents in each row, ``[rows, k]``."""
        return cls(
            torch.arange(latents.shape[0] + 1, device=latents.device) * latents.shape[1], latents.flatten(), d_sae
        )

    @property
    def row_count(self) -> int:
        """Number of rows."""
        return self.crow.shape[0] - 1

    @cached_property
    def rows(self) -> Tensor:
        """The row of each stored value, ``[nnz]`` int64."""
        index = torch.arange(self.row_count, device=self.crow.device)
        return torch.repeat_interleave(index, self.crow.diff(), output_size=self.latents.shape[0])

    @cached_property
    def transposed(self) -> Transposed:
        """The same entries ordered by latent."""
        order = stable_order(self.latents, self.d_sae)
        return Transposed(row_pointers(self.latents, self.d_sae), self.rows[order], order)

    def by_level(self, levels: Sequence[int]) -> Layout:
        """The same entries with their rows split by level; level ℓ holds latents ``levels[ℓ - 1] … levels[ℓ] - 1``."""
        key = tuple(levels)
        if len(key) == 1:
            return self
        if key not in self._levels:
            self._levels[key] = LevelLayout(self, key)
        return self._levels[key]


class LevelLayout(Layout):
    """A layout of ``len(levels) · rows`` rows: row ``ℓ · rows + b`` holds example b's latents of level ℓ.

    One product with it, of the base layout's ``values[order]``, decodes every level. Its transpose needs no sorting: a latent's
    level is fixed, so entries keep the base layout's order by latent. All latents must lie below ``levels[-1]``.
    """

    def __init__(self, base: Layout, levels: tuple[int, ...]) -> None:
        batch = base.row_count
        boundaries = torch.tensor(levels, device=base.latents.device)
        level = torch.bucketize(base.latents, boundaries, right=True, out_int32=True)
        self.order = stable_order(level, len(levels))
        self._base = base
        self._rows_of_values = level.long() * batch + base.rows
        rows = self._rows_of_values[self.order]
        super().__init__(row_pointers(rows, len(levels) * batch), base.latents[self.order], base.d_sae)

    @cached_property
    def transposed(self) -> Transposed:
        """The same entries ordered by latent; ``order`` counts in the *base* layout's order of values."""
        ccol, _, order = self._base.transposed
        return Transposed(ccol, self._rows_of_values[order], order)


def row_pointers(rows: Tensor, row_count: int) -> Tensor:
    """Row pointers ``[row_count + 1]`` of row indices ``[nnz]``, in any order."""
    crow = torch.zeros(row_count + 1, dtype=torch.long, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=row_count), 0, out=crow[1:])
    return crow


def stable_order(keys: Tensor, bound: int) -> Tensor:
    """Stable sorting permutation of integer keys in ``[0, bound)``, ``[nnz]`` int64."""
    if keys.is_cuda or bound > 1 << 16:
        return torch.argsort(keys, stable=True)
    # NumPy radix-sorts 16-bit keys, several times faster than a comparison sort.
    return torch.from_numpy(np.argsort(keys.numpy().astype(np.uint16), kind="stable"))
