"""What every metric takes and adds up: codes of any layout, decoders of any norms, float64 sums on any device."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes

NO_FLOAT64 = frozenset({"mps"})  # device types without float64: sums of what lies there are kept on the CPU
SPARSE_BELOW = 1 / 16  # share of latents firing below which a sparse product beats a dense one (measured on CPU)
MOST_PAIRS_LISTED = 2**22  # pairs of a batch that are added one by one: 40 bytes each
PAIRS_LISTED_BELOW = 2**-10  # share of all products below which adding those of what fires one by one pays (measured on CPU)


class Ratio(NamedTuple):
    """Two sums whose ratio is a metric, such as a total and the weight of its examples, in float64."""

    numerator: Tensor
    denominator: Tensor

    def value(self) -> Tensor:
        """The metric."""
        return self.numerator / self.denominator


def as_codes(latents: Tensor | Codes) -> Codes:
    """Codes of whatever an SAE gives: codes as they are, a dense tensor ``[..., d_sae]`` as one row an example.

    >>> as_codes(torch.tensor([[[1.0, 0.0]], [[2.0, 3.0]]])).batch_size
    2
    """
    if isinstance(latents, Codes):
        return latents
    if not isinstance(latents, Tensor) or latents.ndim < 2:
        got = f"a tensor of shape {list(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise UserError(f"codes: expected Codes or a tensor [examples, d_sae], got {got}")
    return Codes.from_dense(latents.reshape(-1, latents.shape[-1]))


def on_cpu(latents: Tensor | Codes) -> Codes:
    """Codes without a gradient on the CPU, where probes are fitted."""
    return as_codes(latents).detach().to("cpu")


def picked(codes: Codes, dim: int, index: Tensor) -> Tensor:
    """Some rows (``dim`` 0) or some latents (1) of codes, dense and in float64."""
    values = codes.values.detach()
    if codes.layout is None:
        return values.index_select(dim, index).double()
    entries, shape = torch.stack([codes.rows(), codes.layout.latents]), (codes.batch_size, codes.d_sae)
    matrix = torch.sparse_coo_tensor(entries, values.double(), shape, check_invariants=False)
    return matrix.index_select(dim, index).to_dense()


def fold_decoder(W_dec: Tensor) -> tuple[Tensor, Tensor]:
    """Unit decoder rows, float64 ``[d_sae, d_in]`` (a zero row stays zero), and their norms before, ``[d_sae]``.

    Codes times the norms are in units of the reconstruction. A folded decoder comes back as it is, with norms of 1.

    >>> fold_decoder(torch.tensor([[3.0, 4.0]]))[1].tolist()
    [5.0]
    """
    rows = float64(W_dec)
    return normalize(rows, dim=1, eps=1e-30), rows.norm(dim=1)


def detached(tensor: Tensor) -> Tensor:
    """The tensor without a gradient, on the CPU where its device has no float64."""
    return tensor.detach().cpu() if tensor.device.type in NO_FLOAT64 else tensor.detach()


def float64(tensor: Tensor) -> Tensor:
    """The detached tensor in float64, on the CPU where its device has no such numbers."""
    return detached(tensor).double()


def sparse_product(codes: Codes, matrix: Tensor, weight: Tensor | None = None) -> Tensor:
    """``Σ_b w_b c_b m_bᵀ`` of codes and a ``matrix [batch, n]``, ``[d_sae, n]`` in the matrix' precision, autocast or not."""
    device, dtype = matrix.device, matrix.dtype
    stored = codes.values[codes.values != 0] if codes.layout is None else codes.values
    with torch.autocast(device.type, enabled=False):  # counts would come out rounded to 8 bits
        if stored.numel() > SPARSE_BELOW * codes.batch_size * codes.d_sae:
            left = codes.to_dense().to(device, dtype)
            return (left if weight is None else left * weight.to(dtype)[:, None]).t() @ matrix
        _, latents, values = codes.csr()
        index, values = torch.stack([latents, codes.rows()]).to(device), values.to(device, dtype)
        values = values if weight is None else values * weight.to(dtype)[index[1]]
        return torch.sparse_coo_tensor(index, values, (codes.d_sae, codes.batch_size), check_invariants=False) @ matrix


def pair_product(left: Codes, right: Codes, weight: Tensor | None = None) -> Tensor:
    """``Σ_b w_b l_b r_bᵀ`` of sparse codes of the same examples, ``[left.d_sae, right.d_sae]`` in the precision of ``left``.

    Where few pairs fire together, the result is a sparse tensor with an entry for each of them and example, which adds to
    dense sums (:func:`add_sum`) at the cost of these entries alone. Otherwise it is dense.

    >>> codes = as_codes(torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
    >>> pair_product(codes, codes).to_dense().tolist()
    [[5.0, 3.0], [3.0, 9.0]]
    """
    (_, latents, values), rows = left.csr(), left.rows()
    starts, others, amounts = (part.to(rows.device) for part in right.csr())
    if weight is not None:
        values = values * weight.to(values)[rows]
    partners = starts.diff()[rows]
    products = left.batch_size * left.d_sae * right.d_sae
    if (total := int(partners.sum())) > min(MOST_PAIRS_LISTED, PAIRS_LISTED_BELOW * products):
        return sparse_product(right, left.to_dense(), weight).t()
    one = torch.repeat_interleave(partners, output_size=total)
    first = (partners.cumsum(0) - partners - starts[rows])[one]
    other = torch.arange(total, device=rows.device) - first
    index = torch.stack([latents[one], others[other]])
    amounts = values[one] * amounts[other].to(values.dtype)
    return torch.sparse_coo_tensor(index, amounts, (left.d_sae, right.d_sae), check_invariants=False)


def add_sum(state: Tensor, amount: Tensor) -> None:
    """Add a batch's sum to a state in place: a dense one, or the entries of a sparse tensor, which may repeat."""
    if not amount.is_sparse:
        state.add_(amount)
        return
    index, values = amount._indices(), amount._values()  # those of a coalesced tensor would be sorted first
    strides = torch.tensor(state.stride(), device=index.device)[:, None]
    state.view(-1).index_add_(0, (index * strides).sum(0), values.to(state.dtype))


def total_weight(examples: Tensor, weight: Tensor | None) -> Tensor:
    """Weight of a batch, a float64 scalar: the sum of ``weight [batch]``, or the number of rows of ``examples``."""
    return float64(examples.new_ones(len(examples)) if weight is None else weight).sum()


def weighted_sum(per_example: Tensor, weight: Tensor | None) -> Tensor:
    """Sum over the first dimension of ``[batch, ...]`` in float64, weighted by ``weight [batch]`` where given."""
    if weight is None:
        return detached(per_example).sum(0, dtype=torch.float64)
    return torch.einsum("b,b...->...", float64(weight), float64(per_example))


def orthonormal_basis(rows: Tensor) -> Tensor:
    """Orthonormal basis of the span of ``rows [N, d_in]`` as columns, ``[d_in, rank]``.

    By QR where the rows are independent, by SVD where they are not: without pivots QR would lose what follows a dependent row.

    >>> orthonormal_basis(torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])).shape
    torch.Size([3, 2])
    """
    tolerance = max(rows.shape) * torch.finfo(rows.dtype).eps
    if rows.shape[0] <= rows.shape[1]:
        q: Tensor
        q, r = torch.linalg.qr(rows.t())
        sizes = r.diagonal().abs()
        if bool((sizes > tolerance * sizes.max()).all()):
            return q
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    spanned: Tensor = vectors[values > tolerance * values.max()].t()
    return spanned
