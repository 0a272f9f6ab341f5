"""What the sparse path takes from a device, here the CPU: latents times weights, their gradient, and the weights' gradient."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from hedgelab.kernels.codes import Layout

with warnings.catch_warnings():  # PyTorch warns once a process that the layout is young; every product here is tested
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0), check_invariants=False)


def select(*_: Any) -> None:
    """The CPU has no kernel that selects: tiles do it."""


def decode_levels(layout: Layout, values: Tensor, weight: Tensor, levels: Sequence[int]) -> Tensor:
    """What the latents of each level alone add, ``[levels, rows, d]``, of ``values [nnz]`` and ``weight [d_sae, d]``."""
    shape = (len(levels), layout.row_count, weight.shape[1])
    if not values.numel() or not weight.shape[1]:
        return values.new_zeros(shape)
    split = layout.by_level(levels)
    ordered = values if split.order is None else values[split.order]
    options: dict[str, Any] = {"mode": "sum", "per_sample_weights": ordered, "include_last_offset": True}
    # Faster than a CSR product, and it scales better with threads.
    return embedding_bag(split.latents, weight.to(values.dtype), split.crow, **options).view(shape)


def dots(crow: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left[row] · right[column]`` of each stored place, ``[nnz]``, for ``left [rows, d]`` and ``right [columns, d]``.

    >>> dots(torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
    tensor([3., 6.])
    """
    shape = (len(left), len(right))
    pattern = torch.sparse_csr_tensor(crow, columns, left.new_zeros(len(columns)), shape, check_invariants=False)
    products: Tensor = torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0).values()
    return products


def latent_gradients(
    layout: Layout,
    values: Tensor,
    source: Tensor,
    levels: Sequence[int],
    dtype: torch.dtype | None,
    weight: Tensor | None = None,
    bias: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients from ``source [levels, rows, d]``, which is what each row hands its latents, by their level.

    Of the weights, ``[d_sae, d]`` of type ``dtype`` (None: frozen): for each latent the sum of value · source[row]. Of a ``bias
    [d_sae]``: the sums of values. Of the values, ``[nnz]``, if there is a ``weight [d_sae, d]``: source[row] · weight[latent].

    Taken latent by latent, each row of the weights is read once, and the smaller source gathered from: a third faster.
    """
    rows, shape = source.flatten(0, 1).contiguous(), (layout.d_sae, source.shape[2])
    of_weights = of_values = None
    sums = values.new_zeros(layout.d_sae).index_add_(0, layout.latents, values) if bias else None
    if not values.numel() or not shape[1]:
        of_weights = None if dtype is None else rows.new_zeros(shape, dtype=dtype)
        return of_weights, sums, None if weight is None else torch.zeros_like(values)
    ccol, places, order = layout.by_level(levels).transposed

    def by_latent(stored: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(ccol, places, stored, (layout.d_sae, len(rows)), check_invariants=False)

    if weight is not None:
        found = dots(ccol, places, weight.to(rows.dtype).contiguous(), rows)
        of_values = torch.empty_like(found).index_copy_(0, order, found)
    if dtype is not None:
        out = rows.new_empty(shape)  # beta = 0 ignores its content, and saves a pass over it
        of_weights = torch.addmm(out, by_latent(values[order]), rows, beta=0, out=out).to(dtype)
    return of_weights, sums, of_values
