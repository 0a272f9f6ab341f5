"""Codes: the latents of a batch, whatever their layout in memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hedgelab.kernels.layout import Layout, row_pointers


@dataclass(frozen=True)
class Codes:
    """Latent activations of a batch: dense, or compressed sparse rows.

    Build one with :meth:`from_dense`, :meth:`from_csr` or :meth:`from_topk`, and ask the methods, never the fields, for
    anything but speed: they answer alike for both layouts. Gradients flow through ``values``.

    Attributes:
        values: ``[batch, d_sae]``, or in the sparse layout ``[nnz]``, stored row by row; a stored value may be 0.
        latents: The latent of each stored value, ``[nnz]`` int64; None in the dense layout.
        crow: Where each row starts in ``values``, ``[batch + 1]`` int64; None in the dense layout.
        layout: ``crow`` and ``latents`` with the index structures derived from them; made here unless given.
        rates: How often each latent fires on average, ``[d_sae]``, with a gradient; only JumpReLU selections make it.
        leading: The shape of the examples where they are no plain batch. Rows are the examples one after the other.
    """

    d_sae: int
    values: Tensor
    latents: Tensor | None = None
    crow: Tensor | None = None
    layout: Layout | None = field(default=None, compare=False, repr=False)
    rates: Tensor | None = field(default=None, compare=False, repr=False)
    leading: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layout is None and self.crow is not None and self.latents is not None:
            object.__setattr__(self, "layout", Layout(self.crow, self.latents, self.d_sae))

    @classmethod
    def from_dense(cls, activations: Tensor, rates: Tensor | None = None) -> Codes:
        """Wrap dense activations ``[..., d_sae]``."""
        *leading, d_sae = activations.shape
        shape = None if len(leading) == 1 else tuple(leading)
        return cls(d_sae, activations.reshape(-1, d_sae), rates=rates, leading=shape)

    @classmethod
    def from_csr(cls, crow: Tensor, latents: Tensor, values: Tensor, d_sae: int) -> Codes:
        """Wrap row pointers ``[batch + 1]``, latent indices ``[nnz]`` and values ``[nnz]``."""
        return cls(d_sae, values, latents, crow)

    @classmethod
    def from_layout(cls, layout: Layout, values: Tensor, rates: Tensor | None = None) -> Codes:
        """Wrap values ``[nnz]`` of a layout."""
        return cls(layout.d_sae, values, layout.latents, layout.crow, layout, rates)

    @classmethod
    def from_topk(cls, latents: Tensor, values: Tensor, d_sae: int) -> Codes:
        """Wrap k latents an example: ``latents`` and ``values`` are both ``[batch, k]``."""
        return cls.from_layout(Layout.equal_rows(latents, d_sae), values.flatten())

    @property
    def is_dense(self) -> bool:
        """Whether the values lie in a ``[batch, d_sae]`` tensor."""
        return self.crow is None

    @property
    def batch_size(self) -> int:
        """Number of examples."""
        return self.values.shape[0] if self.crow is None else self.crow.shape[0] - 1

    def csr(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row pointers, latents and values; a dense layout is compressed to its nonzero entries first."""
        if self.crow is not None and self.latents is not None:
            return self.crow, self.latents, self.values
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
        dense = self.rows_to_dense()
        return dense if self.leading is None else dense.view(*self.leading, self.d_sae)

    def rows_to_dense(self) -> Tensor:
        """Activations ``[batch, d_sae]``, whatever the shape of the examples."""
        if self.layout is None:
            return self.values
        flat = self.layout.rows * self.d_sae + self.layout.latents
        dense = self.values.new_zeros(self.batch_size * self.d_sae)
        return dense.index_add(0, flat, self.values).view(self.batch_size, self.d_sae)

    def detach(self) -> Codes:
        """The same codes without a gradient."""
        return replace(self, values=self.values.detach(), rates=None)

    def scale(self, factor: Tensor) -> Codes:
        """Codes with latent i multiplied by ``factor[i]`` (decoder norms, when folding); ``factor``: ``[d_sae]``."""
        return replace(self, values=self.values * (factor if self.latents is None else factor[self.latents]))

    def prefix(self, count: int) -> Codes:
        """Codes of the first ``count`` latents alone, the others silent."""
        if self.layout is None:
            kept = torch.arange(self.d_sae, device=self.values.device) < count
            return replace(self, values=torch.where(kept, self.values, 0.0))
        entries = (self.layout.latents < count).nonzero().squeeze(1)
        crow = row_pointers(self.layout.rows[entries], self.batch_size)
        return replace(self, values=self.values[entries], latents=self.layout.latents[entries], crow=crow, layout=None)

    def firing_counts(self) -> Tensor:
        """How many examples each latent fires on (activation > 0), ``[d_sae]`` int64."""
        if self.latents is None:
            return (self.values > 0).sum(0)
        return torch.bincount(self.latents[self.values > 0], minlength=self.d_sae)

    def fired(self) -> Tensor:
        """Whether each latent fires on any example, ``[d_sae]`` bool."""
        if self.latents is None:
            return (self.values > 0).any(0)
        fired = torch.zeros(self.d_sae, dtype=torch.int8, device=self.values.device)
        return fired.scatter_reduce_(0, self.latents, (self.values > 0).to(torch.int8), "amax").bool()

    def smallest_positive(self) -> Tensor:
        """The smallest activation above 0, a scalar; infinite without one."""
        if not self.values.numel():
            return torch.full((), torch.inf, dtype=self.values.dtype, device=self.values.device)
        return torch.where(self.values > 0, self.values, torch.inf).amin()

    def gathered(self) -> Codes:
        """Codes of all latents: these, where one process has them all."""
        return self

    def active_per_example(self) -> Tensor:
        """L0 of each example, ``[...]`` int64."""
        active = self.values > 0
        if self.layout is None:
            counts = active.sum(1)
        else:
            counts = self.layout.crow.new_zeros(self.batch_size).index_add_(0, self.layout.rows, active.long())
        return counts if self.leading is None else counts.view(self.leading)

    def sum_per_latent(self, weight: Tensor | None = None) -> Tensor:
        """Sum of each latent's activations over the batch, ``[d_sae]``, weighted by ``weight [batch]``; differentiable."""
        if self.layout is None:
            return self.values.sum(0) if weight is None else weight.to(self.values.dtype) @ self.values
        values = self.values if weight is None else self.values * weight.to(self.values.dtype)[self.layout.rows]
        return values.new_zeros(self.d_sae).index_add(0, self.layout.latents, values)
