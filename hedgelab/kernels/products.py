"""The sparse products of a training step on the CPU: codes × weights, their gradient, and the weights' gradient."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from hedgelab.kernels.layout import Layout, Transposed

with warnings.catch_warnings():  # PyTorch warns once a process that the layout is young; every product here is tested
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0), check_invariants=False)


class LatentGradients(NamedTuple):
    """What one pass over the latents yields.

    Attributes:
        weight: ``[d_sae, d]``: for each latent the sum of ``value · source[row]``.
        bias: ``[d_sae]``: for each latent the sum of its values; None unless asked for.
        values: ``[nnz]``, row by row: ``source[row] · weight[latent]``; None without a weight.
    """

    weight: Tensor
    bias: Tensor | None
    values: Tensor | None


def decode_levels(layout: Layout, values: Tensor, weight: Tensor, levels: Sequence[int]) -> Tensor:
    """What the latents of each level alone add, ``[levels, rows, d]``, of ``values [nnz]`` and ``weight [d_sae, d]``."""
    split = layout.by_level(levels) if len(levels) > 1 else None
    ordered = values if split is None else values[split.order]
    added = gather_product(split or layout, ordered, weight.to(values.dtype))
    return added.view(len(levels), layout.row_count, weight.shape[1])


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

    That of the weights is of type ``dtype``.
    """
    transposed = (layout.by_level(levels) if len(levels) > 1 else layout).transposed
    rows, of_values = source.flatten(0, 1), None
    if weight is not None:
        by_latent = sampled_product(transposed, weight.to(rows.dtype), rows)
        of_values = torch.empty_like(by_latent).index_copy_(0, transposed.order, by_latent)
    sums = values.new_zeros(layout.d_sae).index_add_(0, layout.latents, values) if bias else None
    of_weight = scatter_product(transposed, values[transposed.order], rows).to(dtype)
    return LatentGradients(of_weight, sums, of_values)


def gather_product(layout: Layout, values: Tensor, dense: Tensor) -> Tensor:
    """``codes @ dense``, ``[rows, d]``, of values ``[nnz]`` and ``dense [d_sae, d]``."""
    if not values.numel() or not dense.shape[1]:
        return dense.new_zeros(layout.row_count, dense.shape[1])
    # Faster than a CSR product, and it scales better with threads.
    return embedding_bag(
        layout.latents, dense, layout.crow, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def scatter_product(transposed: Transposed, values: Tensor, dense: Tensor) -> Tensor:
    """``codesᵀ @ dense``, ``[d_sae, d]``, of values ``[nnz]`` ordered by latent and ``dense [rows, d]``."""
    shape = (transposed.ccol.shape[0] - 1, dense.shape[1])
    if not values.numel() or not dense.shape[1]:
        return dense.new_zeros(shape)
    codes = _csr(transposed, values, dense.shape[0])
    out = dense.new_empty(shape)  # beta = 0 ignores its content, and saves a pass over it
    return torch.addmm(out, codes, dense.contiguous(), beta=0, out=out)


def sampled_product(transposed: Transposed, left: Tensor, right: Tensor) -> Tensor:
    """``left[latent] · right[row]`` of every stored value, ``[nnz]`` ordered by latent.

    Latent by latent, each row of ``left [d_sae, d]`` is read once and ``right [rows, d]``, the smaller of the two, is
    gathered from: a third faster than row by row.
    """
    nnz = transposed.rows.shape[0]
    if not nnz or not left.shape[1]:
        return left.new_zeros(nnz)
    pattern = _csr(transposed, left.new_zeros(nnz), right.shape[0])
    product: Tensor = torch.sparse.sampled_addmm(pattern, left.contiguous(), right.contiguous().t(), beta=0.0)
    return product.values()


def _csr(transposed: Transposed, values: Tensor, rows: int) -> Tensor:
    ccol = transposed.ccol
    return torch.sparse_csr_tensor(ccol, transposed.rows, values, (ccol.shape[0] - 1, rows), check_invariants=False)
