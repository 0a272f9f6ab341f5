"""Entry points of the Triton path, as :mod:`hedgelab.kernels.reference` has them.

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
from hedgelab.kernels.errors import LevelErrors, squared_error
from hedgelab.kernels.jumprelu import jump, step
from hedgelab.kernels.layout import Layout, row_pointers
from hedgelab.kernels.triton import selection as kernels
from hedgelab.kernels.triton.autograd import AttachEncoder, SparseDecode
from hedgelab.kernels.triton.selection import Selected
from hedgelab.kernels.values import BatchTopK, Decoder, Encoder, JumpReLU, ReLU, Selection, Target, Threshold, TopK

# Largest share of stored values at which gathering rows beats a dense product: matrix units multiply 16-bit numbers an
# order of magnitude faster than memory delivers scattered rows, float32 ones hardly faster.
DENSITY_16_BIT = 1 / 600
DENSITY_32_BIT = 1 / 50

_SAMPLE = 1 << 16  # entries that estimate where a selection over several ranks ends
_MARGIN = 1.3  # candidates sought, as a multiple of what is kept


def encode(x: Tensor, encoder: Encoder, selection: Selection) -> Codes:
    """As :func:`reference.encode`, which also serves populations and TopK among few latents.

    Among equal entries TopK keeps the lowest latent, BatchTopK the first in memory. Where TopK's kernel does not reach (k
    above a quarter of a row's groups, float64, masses of equal pre-activations) ``torch.topk`` selects, and which of equals it
    keeps is its own choice. Of JumpReLU, entries within reach of the estimate are stored even below the threshold, with value
    0, so that their gradient is computed.
    """
    match selection:
        case TopK(_, among) if among is not None:
            return reference.encode(x, encoder, selection)
        case BatchTopK(_, weight) if weight is not None:
            return reference.encode(x, encoder, selection)
    product = _product(x, encoder)
    match selection:
        case ReLU():
            return _above(product, encoder.b_enc.new_zeros(()))
        case Threshold(threshold):
            return _above(product, threshold)
        case TopK(k):
            selected = _top_k(product.pre.detach(), k, encoder.scale)
        case BatchTopK(k):
            selected = _batch_top_k(product.pre.detach(), k, encoder)
        case JumpReLU():
            return _jumprelu(product, selection)
    codes = product.attach(selected)
    return Codes.from_layout(_layout(codes), codes.values.relu())


def _above(product: "_Product", threshold: Tensor) -> Codes:
    kept = product.pre.detach() > threshold
    selected = _select(product.pre.detach(), kept)
    return Codes.from_dense(torch.where(kept, product.pre, 0.0)) if selected is None else product.attach(selected)


def _top_k(pre: Tensor, k: int, scale: Tensor | None) -> Selected:
    selected = kernels.top_k(pre, k, scale) if kernels.fits(pre, k) else None
    if selected is None:
        latents = _ranked(pre, scale).topk(k, dim=1, sorted=False).indices
        crow = torch.arange(len(pre) + 1, device=pre.device) * k
        selected = Selected(crow, latents.flatten(), pre.gather(1, latents).flatten())
    return selected


def _batch_top_k(pre: Tensor, k: int, encoder: Encoder) -> Selected:
    batch, width = pre.shape
    if encoder.share is not None:
        return _in_share(pre, k, encoder.scale, encoder.share)
    if kernels.fits(pre, 1):
        return kernels.batch_top_k(pre, k * batch, encoder.scale)
    positions = _ranked(pre.relu(), encoder.scale).flatten().topk(k * batch, sorted=False).indices.sort().values
    crow = torch.searchsorted(positions, torch.arange(batch + 1, device=pre.device) * width)
    return Selected(crow, positions % width, pre.flatten()[positions])


def _jumprelu(product: "_Product", selection: JumpReLU) -> Codes:
    log_threshold, bandwidth, weight = selection
    pre, threshold = product.pre, log_threshold.exp()
    share = threshold.new_full((len(pre),), 1 / max(1, len(pre))) if weight is None else weight
    selected = _select(pre.detach(), pre.detach() > threshold.detach() - bandwidth / 2)
    if selected is None:
        fired = step(pre, threshold, bandwidth)
        return Codes.from_dense(jump(pre, threshold, bandwidth), share.to(fired.dtype) @ fired)
    near = product.attach(selected)
    own = threshold.index_select(0, selected.latents)  # each stored value has a threshold of its own: a batch of one
    rates = Codes.from_layout(_layout(near), step(near.values[None], own, bandwidth)[0]).sum_per_latent(share)
    return Codes.from_layout(_layout(near), jump(near.values[None], own, bandwidth)[0], rates)


def decode(codes: Codes, decoder: Decoder) -> Tensor:
    """``a W_dec + b_dec``, ``[batch, d_in]``."""
    return decode_levels(codes, decoder, [codes.d_sae])[0]


def level_errors(codes: Codes, decoder: Decoder, target: Target) -> LevelErrors:
    """As :func:`reference.level_errors`."""
    x, levels, detach, weight = target
    x_hats = decode_levels(codes, decoder, levels, detach)
    return LevelErrors.of([squared_error(x_hat, x, weight) for x_hat in x_hats])


def decode_levels(codes: Codes, decoder: Decoder, levels: Sequence[int], detach: bool = False) -> list[Tensor]:
    """As :func:`reference.decode_levels`, in one pass."""
    if not _sparse_pays(codes, decoder.W_dec):
        if len(levels) == 1 and levels[0] == codes.d_sae:
            return [reference.decode(codes, decoder)]
        return reference.decode_levels(codes, decoder, levels, detach)
    return list(_decode(codes, decoder, levels, detach))


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


def _product(x: Tensor, encoder: Encoder) -> _Product:
    """The encoder product in the dtype of the computation.

    Casts are made here, not by autocast: its cache would hand stale weights to the second step taken in one context.
    """
    W_enc, b_enc, b_dec, *_ = encoder
    dtype = encoder.compute_dtype
    with torch.autocast(x.device.type, enabled=False):
        centred, weights = (x - b_dec).to(dtype), W_enc.to(dtype)
        pre = torch.addmm(b_enc.to(dtype), centred, weights)
    return _Product((x, W_enc, b_enc, b_dec), centred, weights, pre)


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


def _layout(codes: Codes) -> Layout:
    """The layout of sparse codes."""
    if codes.layout is None:
        raise TypeError("dense codes have no layout")
    return codes.layout


def _decode(codes: Codes, decoder: Decoder, levels: Sequence[int], detach: bool) -> tuple[Tensor, ...]:
    decoded: tuple[Tensor, ...] = SparseDecode.apply(  # type: ignore[no-untyped-call]
        codes.values, *decoder, _layout(codes), levels, detach, _compute_dtype(decoder.W_dec)
    )
    return decoded
