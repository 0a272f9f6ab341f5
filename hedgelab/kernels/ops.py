"""The kernels an SAE calls; each runs on the fastest path that fits, and :func:`backend` forces one.

``auto`` takes the dense reference for few latents, where overhead rules and ``torch.func`` must work, and a sparse path for
many. ReLU and JumpReLU latents, whose number is not bounded, are compressed where a sample of rows says that few fire.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from hedgelab.kernels import dense, reference, sparse
from hedgelab.kernels.agreement import Share
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.errors import LevelErrors, squared_error
from hedgelab.kernels.ranks import ALONE, Ranks
from hedgelab.kernels.selection import sampled_density

P = ParamSpec("P")
R = TypeVar("R")
Backend = Literal["auto", "dense", "sparse"]
_backend: Backend = "auto"

MIN_D_SAE = 512  # below, the sparse path gains nothing
MAX_SHARE = 1 / 8  # share of latents kept, above which dense products win


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force every kernel onto one path: ``dense`` (the reference), ``sparse`` (the fast one) or ``auto`` (by size)."""
    global _backend
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def _of_whole_or_split_weights(kernel: Callable[P, R]) -> Callable[P, R]:
    """A kernel that leaves weights whose latents are split over processes (DTensors) to that of its name in ``sharded``."""

    @wraps(kernel)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if any(getattr(value, "device_mesh", None) is not None for value in args):
            sharded = import_module("hedgelab.kernels.sharded")  # late: DTensor is slow to import
            result: R = getattr(sharded, kernel.__name__)(*args, **kwargs)
            return result
        return kernel(*args, **kwargs)

    return run


@_of_whole_or_split_weights
def encode_relu(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, share: Share | None = None) -> Codes:
    """Codes of a ReLU SAE. A ``share`` here and below: of which latents the weights are a part; all parts take one path."""
    path = _path(W_enc, 0, share)
    if path is sparse and _many_above(x, W_enc, b_enc, b_dec, 0.0, share):
        path = _dense_path(x, W_enc)
    codes: Codes = path.encode_relu(x, W_enc, b_enc, b_dec)
    return codes


@_of_whole_or_split_weights
def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    selection_scale: Tensor | None = None,
    share: Share | None = None,
) -> Codes:
    """Codes of the k largest pre-activations (times ``selection_scale [d_sae]``) of each example, then ReLU."""
    codes: Codes = _path(W_enc, k, share).encode_topk(x, W_enc, b_enc, b_dec, k, selection_scale)
    return codes


@_of_whole_or_split_weights
def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    selection_scale: Tensor | None = None,
    weight: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Codes:
    """Codes of the k · batch largest of ``relu(pre)`` (times ``selection_scale [d_sae]``) over the batch.

    With ``weight`` (population mode) entries are kept, largest first, until their weight reaches k: L0 is k on average.
    With ``ranks`` the batch is that of all of them; ``x`` is this rank's part, and so are the codes.
    """
    share = Share.of_rows(ranks, x.shape[0], W_enc.shape[1]) if ranks.size > 1 else None
    return encode_share_of_batch_topk(x, W_enc, b_enc, b_dec, k, selection_scale, weight, share)


def encode_share_of_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    selection_scale: Tensor | None,
    weight: Tensor | None,
    share: Share | None,
) -> Codes:
    """The codes of :func:`encode_batch_topk` that lie in a part of a batch's pre-activations; weights are that part's."""
    codes: Codes = _path(W_enc, k, share).encode_batch_topk(x, W_enc, b_enc, b_dec, k, selection_scale, weight, share)
    return codes


@_of_whole_or_split_weights
def encode_columns(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    columns: Tensor,
    k: int,
    share: Share | None = None,
) -> Codes:
    """Codes of the k largest pre-activations of each example among the latents ``columns`` only, then ReLU."""
    codes: Codes = _path(W_enc, 0, share).encode_columns(x, W_enc, b_enc, b_dec, columns, k)
    return codes


@_of_whole_or_split_weights
def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    threshold: Tensor,
    share: Share | None = None,
) -> Codes:
    """Codes ``pre · 1[pre > threshold]`` for a given threshold (a scalar or ``[d_sae]``), no gradient to it."""
    path = _path(W_enc, 0, share)
    if path is sparse and _many_above(x, W_enc, b_enc, b_dec, threshold, share):
        path = reference
    codes: Codes = path.encode_threshold(x, W_enc, b_enc, b_dec, threshold)
    return codes


@_of_whole_or_split_weights
def encode_jumprelu(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    log_threshold: Tensor,
    bandwidth: float,
    weight: Tensor | None = None,
    share: Share | None = None,
) -> tuple[Codes, Tensor]:
    """Codes of a JumpReLU SAE, and how often each latent fires on average over the batch, ``[d_sae]``.

    Both carry straight-through gradients to ``log_threshold`` (Rajamanoharan et al. 2024, section 3).
    """
    path = _path(W_enc, 0, share)
    if path is sparse and _many_above(x, W_enc, b_enc, b_dec, log_threshold.detach().exp() - bandwidth / 2, share):
        path = _dense_path(x, W_enc)
    result: tuple[Codes, Tensor] = path.encode_jumprelu(x, W_enc, b_enc, b_dec, log_threshold, bandwidth, weight)
    return result


@_of_whole_or_split_weights
def decode(codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """``a W_dec + b_dec``, ``[batch, d_in]``."""
    x_hat: Tensor = decoder_path(codes, W_dec).decode(codes, W_dec, b_dec)
    return x_hat


def decode_levels(
    codes: Codes, W_dec: Tensor, b_dec: Tensor, levels: Sequence[int], detach: bool = False
) -> list[Tensor]:
    """Reconstructions from the first ``m`` latents for each ``m`` of ``levels``, each ``[batch, d_in]``.

    With ``detach`` an inner level feels no gradient from outer ones; ``b_dec`` then learns from the innermost level alone.
    """
    x_hats: list[Tensor] = decoder_path(codes, W_dec).decode_levels(codes, W_dec, b_dec, levels, detach)
    return x_hats


@_of_whole_or_split_weights
def level_errors(
    codes: Codes,
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    levels: Sequence[int],
    detach: bool = False,
    weight: Tensor | None = None,
) -> LevelErrors:
    """Squared error of each level's reconstruction of ``x [batch, d_in]``, and the errors; levels as :func:`decode_levels`'.

    The squared error is summed over ``d_in`` and averaged over the batch, or over ``weight [batch]`` (population mode).
    """
    path = decoder_path(codes, W_dec)
    if path is sparse:
        return sparse.level_errors(codes, x, W_dec, b_dec, levels, detach, weight)
    if path is reference:
        return reference.level_errors(codes, x, W_dec, b_dec, levels, detach, weight)
    pairs = [squared_error(x_hat, x, weight) for x_hat in path.decode_levels(codes, W_dec, b_dec, levels, detach)]
    return LevelErrors([loss for loss, _ in pairs], [error for _, error in pairs])


@_of_whole_or_split_weights
def total(values: Tensor, latents: slice = slice(None)) -> Tensor:
    """Sum of some latents' values ``[d_sae]``, a scalar."""
    return values[latents].sum()


def _path(W_enc: Tensor, k: int, share: Share | None = None) -> Any:
    """The module whose kernels run; parts of an SAE run those that the whole would, so that their rounding is the same."""
    d_sae = W_enc.shape[1] if share is None else share.d_sae
    if _backend == "dense" or (_backend == "auto" and (d_sae < MIN_D_SAE or k > MAX_SHARE * d_sae)):
        return reference
    return (_triton() or reference) if W_enc.is_cuda else sparse


def decoder_path(codes: Codes, W_dec: Tensor) -> Any:
    """The module that decodes: codes keep the layout of the path that made them."""
    if codes.is_dense or _backend == "dense":
        return reference
    return (_triton() or reference) if W_dec.is_cuda else sparse


def _dense_path(x: Tensor, W_enc: Tensor) -> Any:
    """The module for many active latents; mixed types and autocast are left to autograd."""
    plain = x.dtype == W_enc.dtype and not torch.is_autocast_enabled(x.device.type)
    return dense if plain else reference


@cache
def _triton() -> ModuleType | None:
    """The kernels for CUDA devices; None where they cannot run."""
    from hedgelab.kernels import triton

    if not triton.available():
        return None
    from hedgelab.kernels.triton import entry

    return entry


def _many_above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, threshold: Tensor | float, share: Share | None
) -> bool:
    """Whether ``auto`` expects too many entries above a threshold for the sparse path to pay; over all parts together."""
    if _backend == "sparse":
        return False
    with torch.no_grad():
        density = sampled_density(sparse.encoder(x, W_enc, b_enc, b_dec), threshold)
    if share is not None:
        density = float(share.ranks.mean(torch.tensor(density, dtype=torch.float64)))
    return density > MAX_SHARE
