"""The sparse products of a training step on the CPU: codes × weights, their gradient, and the weights' gradient."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from hedgelab.kernels.layout import Layout

with warnings.catch_warnings():  # PyTorch warns once a process that the layout is young; every product here is tested
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0), check_invariants=False)


class LatentGradients(NamedTuple):
    """What one pass over the latents yields."""

    weight: Tensor  # [d_sae, d]: for each latent the sum of value · source[row]
    bias: Tensor | None  # [d_sae]: for each latent the sum of its values; None unless asked for
    values: Tensor | None  # [nnz], row by row: source[row] · weight[latent]; None without a weight


def select(*_: Any) -> None:
    """The CPU has no kernel that selects: tiles do it."""


def decode_levels(layout: Layout, values: Tensor, weight: Tensor, levels: Sequence[int]) -> Tensor:
    """What the latents of each level alone add, ``[levels, rows, d]``, of ``values [nnz]`` and ``weight [d_sae, d]``."""
    shape = (len(levels), layout.row_count, weight.shape[1])
    if not values.numel() or not weight.shape[1]:
        return values.new_zeros(shape)
    split = layout.by_level(levels)
    ordered = values if split.order is None else values[split.order]
    # Faster than a CSR product, and it scales better with threads.
    added = embedding_bag(
        split.latents,
        weight.to(values.dtype),
        split.crow,
        mode="sum",
        per_sample_weights=ordered,
        include_last_offset=True,
    )
    return added.view(shape)


def latent_gradients(
    layout: Layout,
    values: Tensor,
    source: Tensor,
    levels: Sequence[int],
    dtype: torch.dtype,
    weight: Tensor | None = None,
    bias: bool = False,
) -> LatentGradients:
    """Gradients of weights and values from ``source [levels, rows, d]``: what each row hands its latents, by their level.

    That of the weights is of type ``dtype``. Entries are taken latent by latent: each row of ``weight [d_sae, d]`` is then read
    once, and the source, the smaller of the two, is gathered from; a third faster than row by row.
    """
    rows, shape, of_values = source.flatten(0, 1).contiguous(), (layout.d_sae, source.shape[2]), None
    sums = values.new_zeros(layout.d_sae).index_add_(0, layout.latents, values) if bias else None
    if not values.numel() or not shape[1]:
        none = None if weight is None else torch.zeros_like(values)
        return LatentGradients(rows.new_zeros(shape, dtype=dtype), sums, none)
    ccol, places, order = layout.by_level(levels).transposed

    def by_latent(stored: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(ccol, places, stored, (layout.d_sae, len(rows)), check_invariants=False)

    if weight is not None:
        pattern, left = by_latent(torch.zeros_like(values)), weight.to(rows.dtype).contiguous()
        dots = torch.sparse.sampled_addmm(pattern, left, rows.t(), beta=0.0).values()
        of_values = torch.empty_like(dots).index_copy_(0, order, dots)
    out = rows.new_empty(shape)  # beta = 0 ignores its content, and saves a pass over it
    torch.addmm(out, by_latent(values[order]), rows, beta=0, out=out)
    return LatentGradients(out.to(dtype), sums, of_values)
