"""The three sparse products of a training step: codes × weights, their gradient, and the weights' gradient."""

import warnings

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from hedgelab.kernels.layout import Layout, Transposed

with warnings.catch_warnings():  # PyTorch warns once a process that the layout is young; every product here is tested
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0), check_invariants=False)


def gather_product(layout: Layout, values: Tensor, dense: Tensor, bias: Tensor | None = None) -> Tensor:
    """``codes @ dense (+ bias)``, ``[rows, d]``, of values ``[nnz]`` and ``dense [d_sae, d]``."""
    if not values.numel() or not dense.shape[1]:
        out = dense.new_zeros(layout.row_count, dense.shape[1])
    else:  # faster than a CSR product, and it scales better with threads
        out = embedding_bag(
            layout.latents, dense, layout.crow, mode="sum", per_sample_weights=values, include_last_offset=True
        )
    return out if bias is None else out.add_(bias)


def scatter_product(transposed: Transposed, values: Tensor, dense: Tensor) -> Tensor:
    """``codesᵀ @ dense``, ``[d_sae, d]``, of values ``[nnz]`` ordered by latent and ``dense [rows, d]``."""
    shape = (transposed.ccol.shape[0] - 1, dense.shape[1])
    if not values.numel() or not dense.shape[1]:
        return dense.new_zeros(shape)
    codes = _csr(transposed.ccol, transposed.rows, values, (shape[0], dense.shape[0]))
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
    pattern = _csr(transposed.ccol, transposed.rows, left.new_zeros(nnz), (left.shape[0], right.shape[0]))
    product: Tensor = torch.sparse.sampled_addmm(pattern, left.contiguous(), right.contiguous().t(), beta=0.0)
    return product.values()


def _csr(crow: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(crow, columns, values, shape, check_invariants=False)
