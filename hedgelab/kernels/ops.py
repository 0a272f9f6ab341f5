"""The kernels an SAE calls; each runs on the fastest path that fits, and :func:`backend` forces one.

``auto`` takes the dense reference for few latents, where overhead rules and ``torch.func`` must work, and the sparse path for
many, or for large batches. ReLU and JumpReLU latents, whose number is not bounded, are compressed where a sample of rows says
that few fire. A path is a module with ``encode``, ``decode``, ``level_errors`` and ``decoder_gradient``:
:mod:`~hedgelab.kernels.reference` or :mod:`~hedgelab.kernels.sparse`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.kernels import reference, sparse
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import BatchTopK, Decoder, Encoder, Errors, Selection, Target, TopK, computed_in, floor_of

Backend = Literal["auto", "fixed", "dense", "sparse"]
_backend: Backend = "auto"

PLUGGED_IN: dict[type, Any] = {}
"""Paths of weights of other tensor classes, as those have whose latents are split over processes; with a :func:`total`."""

MIN_D_SAE = 512  # below, the sparse path gains nothing but for large batches on the CPU, where few latents are kept
MIN_ENTRIES, MAX_SHARE_OF_FEW = 1 << 17, 1 / 16  # of these: batch · d_sae pre-activations; share of latents kept
MAX_SHARE = 1 / 8  # share of latents kept, above which dense products win
SAMPLED_ROWS = 32


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force every kernel onto one path: ``dense`` (the reference), ``sparse`` (the fast one) or ``auto`` (by size).

    ``fixed`` is ``auto`` for steps to be captured: ReLU and JumpReLU stay dense, since shapes must not depend on what fires.
    """
    global _backend
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def as_rows(x: Tensor, like: Tensor) -> Tensor:
    """Activations ``[..., d_in]`` as rows ``[batch, d_in]``, in the type of a weight ``[d_in]`` if that is narrower."""
    if x.shape[-1:] != like.shape:
        raise UserError(f"x: activations of shape {tuple(x.shape)} do not fit an SAE with d_in = {like.shape[0]}")
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows.to(like.dtype) if rows.itemsize > like.itemsize or not rows.is_floating_point() else rows


def encode(x: Tensor, encoder: Encoder, selection: Selection) -> Codes:
    """Codes of activations ``[..., d_in]``.

    >>> from hedgelab.kernels.values import ReLU
    >>> encoder = Encoder(torch.eye(2), torch.zeros(2), torch.zeros(2))
    >>> encode(torch.tensor([[1.0, -2.0]]), encoder, ReLU()).to_dense().tolist()
    [[1.0, 0.0]]
    """
    rows, path = as_rows(x, encoder.b_dec), PLUGGED_IN.get(type(encoder.W_enc))
    codes = encode_part(rows, encoder, selection) if path is None else path.encode(rows, encoder, selection)
    return codes if x.dim() == 2 else replace(codes, leading=tuple(x.shape[:-1]))


def encode_part(x: Tensor, encoder: Encoder, selection: Selection) -> Codes:
    """Codes of rows ``[batch, d_in]``; parts of an SAE take the path of the SAE, so that their rounding is the same."""
    bounded = isinstance(selection, TopK | BatchTopK)
    among_few = isinstance(selection, TopK) and selection.among is not None
    k = selection.k if isinstance(selection, TopK | BatchTopK) and not among_few else 0
    large_batch = len(x) * encoder.d_sae >= MIN_ENTRIES and 0 < k <= MAX_SHARE_OF_FEW * encoder.d_sae and not x.is_cuda
    small = (encoder.d_sae < MIN_D_SAE and not large_batch) or k > MAX_SHARE * encoder.d_sae
    if _backend == "dense" or (_backend != "sparse" and small) or not sparse.products_on(x):
        return reference.encode(x, encoder, selection)
    if _backend != "sparse" and not bounded and _many_fire(x, encoder, floor_of(selection)):
        plain = x.dtype == encoder.W_enc.dtype and not torch.is_autocast_enabled(x.device.type)
        return reference.encode(x, encoder, selection, lean=plain)
    return sparse.encode(x, encoder, selection)


def decode(codes: Codes, decoder: Decoder) -> Tensor:
    """``a W_dec + b_dec``, ``[..., d_in]``."""
    x_hat: Tensor = decoder_path(codes, decoder.W_dec).decode(codes, decoder)
    return x_hat.view(*codes.examples, x_hat.shape[-1])


def level_errors(codes: Codes, decoder: Decoder, target: Target) -> Errors:
    """Squared error of the reconstruction from each of the target's levels, and the errors ``x_hat - x``."""
    return cast(Errors, decoder_path(codes, decoder.W_dec).level_errors(codes, decoder, target))


@torch.no_grad()
def decoder_gradient(codes: Codes, upstream: Tensor, levels: Sequence[int]) -> Tensor:
    """What the gradient of ``W_dec`` is made of: for each latent the sum over examples of its value times its level's upstream.

    ``upstream [levels, batch, d_in]`` is the gradient of what each level adds; the result is ``[d_sae, d_in]``, 0 beyond the
    last level, without a gradient. Of codes split over processes each has the rows of its own latents, in a DTensor.

    >>> codes = Codes.from_dense(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    >>> decoder_gradient(codes, torch.tensor([[[1.0], [1.0]], [[10.0], [20.0]]]), (1, 2)).tolist()
    [[1.0], [80.0]]
    """
    path = PLUGGED_IN.get(type(codes), decoder_path(codes, upstream))
    return cast(Tensor, path.decoder_gradient(codes, upstream, levels))


def total(values: Tensor, latents: slice = slice(None)) -> Tensor:
    """Sum of some latents' values ``[d_sae]``, a scalar."""
    path = PLUGGED_IN.get(type(values))
    return values[latents].sum() if path is None else cast(Tensor, path.total(values, latents))


def decoder_path(codes: Codes, weight: Tensor) -> Any:
    """The module that decodes: codes keep the layout of the path that made them, unless dense products are faster."""
    if path := PLUGGED_IN.get(type(weight)):
        return path
    if codes.layout is None or _backend == "dense" or not sparse.products_on(weight):
        return reference
    many = weight.is_cuda and len(codes.values) > _max_share(weight) * codes.batch_size * codes.d_sae
    return reference if many else sparse


def _max_share(weight: Tensor) -> float:
    """Share of values stored above which dense products with a weight are faster."""
    return MAX_SHARE if not weight.is_cuda else float(sparse.products_on(weight).max_share(computed_in(weight)))


@torch.no_grad()
def _many_fire(x: Tensor, encoder: Encoder, floor: Tensor | float) -> bool:
    """Whether too many entries of some rows fire for the sparse path to pay; over all parts of an SAE together."""
    if _backend == "fixed":
        return True
    sample = x[:: max(1, -(-len(x) // SAMPLED_ROWS))]
    # Autocast's cache would keep casts of the weights that have no gradient.
    with torch.autocast(x.device.type, enabled=False):
        fired = reference.pre_activations(sample, encoder) > floor
    density = fired.double().mean() if len(sample) else torch.zeros((), dtype=torch.float64)
    if encoder.share is not None:
        density = encoder.share.ranks.mean(density)
    return float(density) > _max_share(encoder.W_enc)
