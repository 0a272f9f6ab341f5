"""Entry points of the Triton path, with the signatures of :mod:`hedgelab.kernels.reference`.

Codes come back sparse wherever touching only the latents that fired is faster than dense products; where it is not, the
same numbers come from dense ones. Under autocast the encoder product runs in autocast's dtype and everything after it on
float32 weights, sums and reconstructions. The encoder product and the optimiser bound a step from below: at d_in 2304,
d_sae 65536, k 25 and batch 4096 on an H100 (3 TB/s, 750 TFLOP/s in bf16)

====================================  ==============  ====
what                                  moves or does   ms
====================================  ==============  ====
encoder weights to bf16               0.9 GB          0.3
encoder product                       1.24 TFLOP      1.65
pre-activations, written and read     1.1 GB          0.35
decode: rows of ``W_dec`` gathered    0.5–0.9 GB      0.2–0.3
``W_dec`` and value gradients         1.1 GB          0.4
``W_enc`` gradient                    0.6 GB          0.2
``b_dec`` gradient through encoder    0.3 GB          0.1
Adam on 302M float32 parameters       8.5 GB          2.8
====================================  ==============  ====

in all about 6 ms, of which every product of dense autograd would add another 1.65.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.kernels import reference
from hedgelab.kernels.agreement import Share, among_largest
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.jumprelu import JumpReLU, StepFunction
from hedgelab.kernels.layout import Layout, row_pointers
from hedgelab.kernels.reference import encode_columns
from hedgelab.kernels.triton import selection
from hedgelab.kernels.triton.autograd import AttachEncoder, SparseDecode
from hedgelab.kernels.triton.selection import Selected

__all__ = [
    "decode",
    "decode_levels",
    "encode_batch_topk",
    "encode_columns",
    "encode_jumprelu",
    "encode_relu",
    "encode_threshold",
    "encode_topk",
]

# Largest share of stored values at which gathering rows beats a dense product: matrix units multiply 16-bit numbers an
# order of magnitude faster than memory delivers scattered rows, float32 ones hardly faster.
DENSITY_16_BIT = 1 / 600
DENSITY_32_BIT = 1 / 50

_SAMPLE = 1 << 16  # entries that estimate where a selection over several ranks ends
_MARGIN = 1.3  # candidates sought, as a multiple of what is kept


def encode_relu(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Codes:
    """Codes of a ReLU SAE."""
    return encode_threshold(x, W_enc, b_enc, b_dec, b_enc.new_zeros(()))


def encode_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, threshold: Tensor) -> Codes:
    """Codes ``pre · 1[pre > threshold]`` for a given threshold (a scalar or ``[d_sae]``), no gradient to it."""
    product = _product(x, W_enc, b_enc, b_dec)
    kept = product.pre.detach() > threshold
    selected = _select(product.pre.detach(), kept)
    return Codes.from_dense(torch.where(kept, product.pre, 0.0)) if selected is None else product.attach(selected)


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, selection_scale: Tensor | None = None
) -> Codes:
    """Codes of the k largest pre-activations of each example, then ReLU; among equals the lowest latent is kept.

    Where the selection kernel does not reach (k above a quarter of a row's groups, float64, masses of equal
    pre-activations) ``torch.topk`` selects, and which of equals it keeps is its own choice.
    """
    product = _product(x, W_enc, b_enc, b_dec)
    pre = product.pre.detach()
    selected = selection.top_k(pre, k, selection_scale) if selection.fits(pre, k) else None
    if selected is None:
        latents = _ranked(pre, selection_scale).topk(k, dim=1, sorted=False).indices
        crow = torch.arange(len(x) + 1, device=x.device) * k
        selected = Selected(crow, latents.flatten(), pre.gather(1, latents).flatten())
    return _rectified(product.attach(selected))


def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    selection_scale: Tensor | None = None,
    weight: Tensor | None = None,
    share: Share | None = None,
) -> Codes:
    """Codes of the k · batch largest of ``relu(pre)`` over the batch; among equals the first in memory are kept.

    With ``weight`` (population mode, small batches) the dense reference does the work. With a ``share`` this is that part of
    a larger product.
    """
    if weight is not None:
        return reference.encode_batch_topk(x, W_enc, b_enc, b_dec, k, selection_scale, weight, share)
    product = _product(x, W_enc, b_enc, b_dec)
    pre = product.pre.detach()
    if share is not None:
        selected = _in_share(pre, k, selection_scale, share)
    elif selection.fits(pre, 1):
        selected = selection.batch_top_k(pre, k * len(x), selection_scale)
    else:
        width = pre.shape[1]
        positions = _ranked(pre.relu(), selection_scale).flatten().topk(k * len(x), sorted=False).indices.sort().values
        crow = torch.searchsorted(positions, torch.arange(len(x) + 1, device=x.device) * width)
        selected = Selected(crow, positions % width, pre.flatten()[positions])
    return _rectified(product.attach(selected))


def encode_jumprelu(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    log_threshold: Tensor,
    bandwidth: float,
    weight: Tensor | None = None,
) -> tuple[Codes, Tensor]:
    """Codes of a JumpReLU SAE, and how often each latent fires on average over the batch, ``[d_sae]``.

    Both carry straight-through gradients to ``log_threshold`` (Rajamanoharan et al. 2024, section 3). Entries within reach of
    the estimate are stored even below the threshold, with value 0, so that their gradient is computed.
    """
    product = _product(x, W_enc, b_enc, b_dec)
    threshold = log_threshold.exp()
    selected = _select(product.pre.detach(), product.pre.detach() > threshold.detach() - bandwidth / 2)
    share = x.new_full((len(x),), 1 / max(1, len(x)), dtype=threshold.dtype) if weight is None else weight
    if selected is None:
        activations: Tensor = JumpReLU.apply(product.pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
        fired: Tensor = StepFunction.apply(product.pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
        return Codes.from_dense(activations), share.to(fired.dtype) @ fired
    near = product.attach(selected)
    own = threshold.index_select(0, selected.latents)  # each stored value has a threshold of its own: a batch of one
    activations = JumpReLU.apply(near.values[None], own, bandwidth)[0]  # type: ignore[no-untyped-call]
    fired = StepFunction.apply(near.values[None], own, bandwidth)[0]  # type: ignore[no-untyped-call]
    layout = _layout(near)
    return Codes.from_layout(layout, activations), Codes.from_layout(layout, fired).sum_per_latent(share)


def decode(codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """``a W_dec + b_dec``, ``[batch, d_in]``."""
    if not _sparse_pays(codes, W_dec):
        return reference.decode(codes, W_dec, b_dec)
    return _decode(codes, W_dec, b_dec, [codes.d_sae], detach=False)[0]


def decode_levels(
    codes: Codes, W_dec: Tensor, b_dec: Tensor, levels: Sequence[int], detach: bool = False
) -> list[Tensor]:
    """Reconstructions from the first ``m`` latents for each ``m`` of ``levels``, each ``[batch, d_in]``, in one pass.

    With ``detach`` an inner level feels no gradient from outer ones, as in the reference.
    """
    if not _sparse_pays(codes, W_dec):
        return reference.decode_levels(codes, W_dec, b_dec, levels, detach)
    return list(_decode(codes, W_dec, b_dec, levels, detach))


class _Product(NamedTuple):
    """The encoder product, and what a sparse backward pass through it needs."""

    parameters: tuple[Tensor, Tensor, Tensor, Tensor]  # x, W_enc, b_enc, b_dec
    centred: Tensor  # x - b_dec, as multiplied
    encoder: Tensor  # W_enc, as multiplied
    pre: Tensor  # dense pre-activations, with the gradient of dense autograd

    def attach(self, selected: Selected) -> Codes:
        """Codes of the selected pre-activations, with their gradient; ``pre`` is not kept for it."""
        layout = Layout(selected.crow, selected.latents, self.pre.shape[1])
        sparse = len(selected.values) <= _density(self.encoder.dtype) * self.pre.numel()
        values: Tensor = AttachEncoder.apply(  # type: ignore[no-untyped-call]
            *self.parameters, layout, selected.values, self.centred.detach(), self.encoder.detach(), sparse
        )
        return Codes.from_layout(layout, values)


def _product(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> _Product:
    """The encoder product in the dtype of the computation.

    Casts are made here, not by autocast: its cache would hand stale weights to the second step taken in one context.
    """
    dtype = _compute_dtype(W_enc)
    with torch.autocast(x.device.type, enabled=False):
        centred, encoder = (x - b_dec).to(dtype), W_enc.to(dtype)
        pre = torch.addmm(b_enc.to(dtype), centred, encoder)
    return _Product((x, W_enc, b_enc, b_dec), centred, encoder, pre)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _sparse_pays(codes: Codes, weight: Tensor) -> bool:
    """Whether codes are sparse, and so few values are stored that gathering rows beats a dense product."""
    return (
        not codes.is_dense
        and codes.values.shape[0] <= _density(_compute_dtype(weight)) * codes.batch_size * codes.d_sae
    )


def _density(dtype: torch.dtype) -> float:
    return DENSITY_16_BIT if dtype.itemsize == 2 else DENSITY_32_BIT


def _select(pre: Tensor, kept: Tensor) -> Selected | None:
    """The kept entries as rows; None where they are so many that dense products are faster."""
    if int(kept.count_nonzero()) > _density(pre.dtype) * kept.numel():
        return None
    rows, latents = kept.nonzero(as_tuple=True)
    return Selected(row_pointers(rows, len(pre)), latents, pre[rows, latents])


def _in_share(pre: Tensor, k: int, scale: Tensor | None, share: Share) -> Selected:
    """Those of the k · batch largest positive entries of all parts that lie in this one."""
    batch, width = pre.shape
    ranked = _ranked(pre, scale).flatten()
    ranked = ranked.to(torch.promote_types(ranked.dtype, torch.float32))
    sample = ranked[:: max(1, ranked.numel() // _SAMPLE) | 1].sort(descending=True).values
    above = min(int(_MARGIN * k / share.d_sae * len(sample)) + 1, len(sample) - 1)
    threshold = share.ranks.min(sample[above].clamp_min(0.0))
    wanted = k * share.rows
    if int(share.ranks.sum((ranked > threshold).count_nonzero())) < wanted:
        threshold = torch.zeros_like(threshold)
    found = (ranked > threshold).nonzero().squeeze(1)
    kept = among_largest(ranked[found], share.positions(found // width, found % width), wanted, share.ranks)
    positions = found[kept]
    crow = torch.searchsorted(positions, torch.arange(batch + 1, device=pre.device) * width)
    return Selected(crow, positions % width, pre.flatten()[positions])


def _ranked(pre: Tensor, scale: Tensor | None) -> Tensor:
    return pre if scale is None else pre * scale


def _rectified(codes: Codes) -> Codes:
    """ReLU of sparse codes."""
    return Codes.from_layout(_layout(codes), codes.values.relu())


def _layout(codes: Codes) -> Layout:
    """The layout of sparse codes."""
    if codes.layout is None:
        raise TypeError("dense codes have no layout")
    return codes.layout


def _decode(codes: Codes, W_dec: Tensor, b_dec: Tensor, levels: Sequence[int], detach: bool) -> tuple[Tensor, ...]:
    decoded: tuple[Tensor, ...] = SparseDecode.apply(  # type: ignore[no-untyped-call]
        codes.values, W_dec, b_dec, _layout(codes), levels, detach, _compute_dtype(W_dec)
    )
    return decoded
