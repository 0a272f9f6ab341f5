"""Codes: the latents of a batch, dense or as compressed sparse rows, and where the stored values of sparse ones lie."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from torch import Tensor


class Layout:
    """Row pointers ``crow [rows + 1]`` and latents ``[nnz]`` of sparse codes, and what follows from them, when asked.

    Codes that differ in values only share one, as do the passes of encoder and decoder: nothing is sorted twice a step.
    """

    order: Tensor | None = None  # where this layout's values lie in that of which it is a split by level, [nnz]

    def __init__(self, crow: Tensor, latents: Tensor, d_sae: int) -> None:
        self.crow, self.latents, self.d_sae, self.row_count = crow, latents, d_sae, len(crow) - 1
        self._levels: dict[tuple[int, ...], Layout] = {}

    @cached_property
    def rows(self) -> Tensor:
        """The row of each stored value, ``[nnz]`` int64."""
        index = torch.arange(self.row_count, device=self.crow.device)
        return torch.repeat_interleave(index, self.crow.diff(), output_size=self.latents.shape[0])

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """By latent, then row: where each latent starts ``[d_sae + 1]``, rows, and positions in the order by row, int64."""
        order = stable_order(self.latents, self.d_sae)
        return row_pointers(self.latents, self.d_sae), self.rows[order], order

    def by_level(self, levels: Sequence[int]) -> "Layout":
        """The same entries with their rows split by level; level ℓ holds latents ``levels[ℓ - 1] … levels[ℓ] - 1``."""
        key = tuple(levels)
        if len(key) == 1:
            return self
        if key not in self._levels:
            self._levels[key] = _LevelLayout(self, key)
        return self._levels[key]


class _LevelLayout(Layout):
    """Row ``ℓ · rows + b`` holds example b's latents of level ℓ; all latents must lie below ``levels[-1]``.

    One product with it, of the base layout's ``values[order]``, decodes every level. Entries by latent keep the base's order.
    """

    def __init__(self, base: Layout, levels: tuple[int, ...]) -> None:
        boundaries = torch.tensor(levels, device=base.latents.device)
        level = torch.bucketize(base.latents, boundaries, right=True, out_int32=True)
        self._base, self.order = base, stable_order(level, len(levels))
        self._rows_of_values = level.long() * base.row_count + base.rows
        crow = row_pointers(self._rows_of_values, len(levels) * base.row_count)
        super().__init__(crow, base.latents[self.order], base.d_sae)

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same, but positions count in the *base* layout's order of values."""
        ccol, _, order = self._base.transposed
        return ccol, self._rows_of_values[order], order


def row_pointers(rows: Tensor, row_count: int) -> Tensor:
    """Row pointers ``[row_count + 1]`` of row indices ``[nnz]``, in any order."""
    crow = torch.zeros(row_count + 1, dtype=torch.long, device=rows.device)
    if rows.is_cuda:  # bincount waits for the device
        return crow.index_add_(0, rows + 1, torch.ones_like(rows)).cumsum(0)
    torch.cumsum(torch.bincount(rows, minlength=row_count), 0, out=crow[1:])
    return crow


def stable_order(keys: Tensor, bound: int) -> Tensor:
    """Stable sorting permutation of integer keys in ``[0, bound)``, ``[nnz]`` int64."""
    if keys.is_cuda or bound > 1 << 16:
        return torch.argsort(keys, stable=True)
    # NumPy radix-sorts 16-bit keys, several times faster than a comparison sort.
    return torch.from_numpy(np.argsort(keys.numpy().astype(np.uint16), kind="stable"))


@dataclass(frozen=True)
class Codes:
    """Latent activations of a batch: dense, or compressed sparse rows.

    Build one with :meth:`from_dense`, :meth:`from_csr` or :meth:`from_topk`, and ask the methods, never the fields, for
    anything but speed: they answer alike for both layouts. Gradients flow through ``values``.

    Attributes:
        values: ``[batch, d_sae]``, or in the sparse layout ``[nnz]``, stored row by row. A latent fires where its value is
            not 0, positive or negative; a stored value may be 0.
        layout: Row pointers ``crow`` and ``latents`` of sparse values; None in the dense layout.
        rates: How often each latent fires on average, ``[d_sae]``, with a gradient; only JumpReLU selections make it.
        leading: The shape of the examples where they are no plain batch. Rows are the examples one after the other.
    """

    values: Tensor
    layout: Layout | None = None
    rates: Tensor | None = field(default=None, repr=False)
    leading: tuple[int, ...] | None = None

    @classmethod
    def from_dense(cls, activations: Tensor, rates: Tensor | None = None) -> Self:
        """Wrap dense activations ``[..., d_sae]``."""
        *leading, d_sae = activations.shape
        return cls(activations.reshape(-1, d_sae), None, rates, None if len(leading) == 1 else tuple(leading))

    @classmethod
    def from_csr(cls, crow: Tensor, latents: Tensor, values: Tensor, d_sae: int) -> Self:
        """Wrap row pointers ``[batch + 1]``, latent indices ``[nnz]`` and values ``[nnz]``."""
        return cls(values, Layout(crow, latents, d_sae))

    @classmethod
    def from_topk(cls, latents: Tensor, values: Tensor, d_sae: int) -> Self:
        """Wrap k latents an example: ``latents`` and ``values`` are both ``[batch, k]``."""
        crow = torch.arange(latents.shape[0] + 1, device=latents.device) * latents.shape[1]
        return cls(values.flatten(), Layout(crow, latents.flatten(), d_sae))

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.values.shape[1] if self.layout is None else self.layout.d_sae

    @property
    def batch_size(self) -> int:
        """Number of examples."""
        return self.values.shape[0] if self.layout is None else self.layout.row_count

    @property
    def examples(self) -> tuple[int, ...]:
        """The shape of the examples: ``(batch,)`` where they are a plain batch."""
        return (self.batch_size,) if self.leading is None else self.leading

    def csr(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row pointers, latents and values; a dense layout is compressed to its nonzero entries first."""
        if self.layout is not None:
            return self.layout.crow, self.layout.latents, self.values
        rows, latents = self.values.nonzero(as_tuple=True)
        return row_pointers(rows, self.batch_size), latents, self.values[rows, latents]

    def rows(self) -> Tensor:
        """The example of each value that :meth:`csr` returns, ``[nnz]`` int64."""
        return self.values.nonzero(as_tuple=True)[0] if self.layout is None else self.layout.rows

    def to_dense(self) -> Tensor:
        """Activations ``[..., d_sae]``; differentiable. Repeated indices add up.

        >>> Codes.from_csr(torch.tensor([0, 1, 2]), torch.tensor([2, 0]), torch.tensor([5.0, 7.0]), 3).to_dense().tolist()
        [[0.0, 0.0, 5.0], [7.0, 0.0, 0.0]]
        """
        dense = self.values
        if self.layout is not None:
            flat = self.layout.rows * self.d_sae + self.layout.latents
            dense = dense.new_zeros(self.batch_size * self.d_sae).index_add(0, flat, dense)
        return dense.view(*self.examples, self.d_sae)

    def with_values(self, values: Tensor) -> Self:
        """Codes of other values in the same places, without rates."""
        return replace(self, values=values, rates=None)

    def to(self, device: torch.device | str) -> Self:
        """The same codes on another device."""
        layout = self.layout
        if layout is not None:
            layout = Layout(layout.crow.to(device), layout.latents.to(device), layout.d_sae)
        rates = None if self.rates is None else self.rates.to(device)
        return replace(self, values=self.values.to(device), layout=layout, rates=rates)

    def part(self, rows: slice, stored: slice | None = None) -> Self:
        """Codes of consecutive examples, without rates; values are views. ``stored`` is where they lie, if that is known.

        >>> codes = Codes.from_csr(torch.tensor([0, 1, 2]), torch.tensor([2, 0]), torch.tensor([5.0, 7.0]), 3)
        >>> codes.part(slice(1, 2)).to_dense().tolist()
        [[7.0, 0.0, 0.0]]
        """
        start, stop, step = rows.indices(self.batch_size)
        if step != 1:
            raise ValueError(f"rows must be consecutive, got {rows}")
        stop = max(start, stop)
        if self.layout is None:
            return replace(self, values=self.values[start:stop], rates=None, leading=None)
        crow = self.layout.crow[start : stop + 1]
        stored = stored or slice(int(crow[0]), int(crow[-1]))
        layout = Layout(crow - crow[0], self.layout.latents[stored], self.d_sae)
        return replace(self, values=self.values[stored], layout=layout, rates=None, leading=None)

    def split(self, size: int) -> list[Self]:
        """Codes of the first ``size`` examples, of the next, and so on, without rates; as parts, looked up at once."""
        if self.layout is None:
            return [self.part(slice(start, start + size)) for start in range(0, self.batch_size, size)]
        bounds, crow = [*range(0, self.batch_size, size), self.batch_size], self.layout.crow
        stored = crow[torch.tensor(bounds, device=crow.device)].tolist()
        return [self.part(slice(*rows), slice(*at)) for rows, at in zip(pairwise(bounds), pairwise(stored), strict=True)]

    def on_raw(self) -> "Codes":
        """Codes in units of the activations, of which decoder rows add up to reconstructions: these, unless said otherwise."""
        return self

    def detach(self) -> Self:
        """The same codes without a gradient."""
        return self.with_values(self.values.detach())

    def scale(self, factor: Tensor) -> Self:
        """Codes with latent i multiplied by ``factor[i]`` (decoder norms, when folding); ``factor``: ``[d_sae]``."""
        return replace(self, values=self.values * (factor if self.layout is None else factor[self.layout.latents]))

    def stored(self, index: Tensor) -> Self:
        """Sparse codes of some of the stored values alone, by their rising positions."""
        assert self.layout is not None
        crow = row_pointers(self.layout.rows[index], self.batch_size)
        return replace(self, values=self.values[index], layout=Layout(crow, self.layout.latents[index], self.d_sae))

    def relabelled(self, place: Tensor) -> Self:
        """Codes in which latent i goes by the number ``place[i]``, a permutation ``[d_sae]``; differentiable.

        >>> Codes.from_dense(torch.tensor([[5.0, 6.0, 7.0]])).relabelled(torch.tensor([2, 0, 1])).to_dense().tolist()
        [[6.0, 7.0, 5.0]]
        """
        latent_at = place.argsort()
        rates = None if self.rates is None else self.rates[latent_at]
        if self.layout is None:
            return replace(self, values=self.values[:, latent_at], rates=rates)
        return replace(self, layout=Layout(self.layout.crow, place[self.layout.latents], self.d_sae), rates=rates)

    def prefix(self, count: int) -> Self:
        """Codes of the first ``count`` latents alone, the others silent."""
        if self.layout is None:
            kept = torch.arange(self.d_sae, device=self.values.device) < count
            return replace(self, values=torch.where(kept, self.values, 0.0))
        return self.stored((self.layout.latents < count).nonzero().squeeze(1))

    def firing_counts(self) -> Tensor:
        """How many examples each latent fires on (activation not 0), ``[d_sae]`` int64."""
        if self.layout is None:
            return (self.values != 0).sum(0)
        return torch.bincount(self.layout.latents[self.values != 0], minlength=self.d_sae)

    def fired(self) -> Tensor:
        """Whether each latent fires on any example, ``[d_sae]`` bool."""
        if self.layout is None:
            return (self.values != 0).any(0)
        fired = torch.zeros(self.d_sae, dtype=torch.int8, device=self.values.device)
        return fired.scatter_reduce_(0, self.layout.latents, (self.values != 0).to(torch.int8), "amax").bool()

    def smallest_positive(self) -> Tensor:
        """The smallest activation above 0, a scalar; infinite without one."""
        if not self.values.numel():
            return torch.full((), torch.inf, dtype=self.values.dtype, device=self.values.device)
        return torch.where(self.values > 0, self.values, torch.inf).amin()

    def gathered(self) -> "Codes":
        """Codes of all latents: these, where one process has them all."""
        return self

    def active_per_example(self) -> Tensor:
        """L0 of each example, ``[...]`` int64."""
        active = self.values != 0
        if self.layout is None:
            counts = active.sum(1)
        else:
            counts = self.layout.crow.new_zeros(self.batch_size).index_add_(0, self.layout.rows, active.long())
        return counts.view(self.examples)

    def sum_per_latent(self, weight: Tensor | None = None) -> Tensor:
        """Sum of each latent's activations over the batch, ``[d_sae]``, weighted by ``weight [batch]``; differentiable."""
        if self.layout is None:
            return self.values.sum(0) if weight is None else weight.to(self.values.dtype) @ self.values
        values = self.values if weight is None else self.values * weight.to(self.values.dtype)[self.layout.rows]
        return values.new_zeros(self.d_sae).index_add(0, self.layout.latents, values)
