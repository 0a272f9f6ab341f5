"""Hedging of an SAE that one has, of whatever library: of its decoder, or of anything with encode, decode and W_dec."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes
from hedgelab.metrics.classes import FeatureRegression, HedgingDegree, ResidualHedgingMetric
from hedgelab.metrics.functional import degree, true_hedging
from hedgelab.metrics.functional.accumulate import as_codes
from hedgelab.metrics.functional.degree import DRAWS, DegreeScores
from hedgelab.metrics.functional.error_spread import BLOCKS, ResidualHedging
from hedgelab.metrics.functional.recovery import decoder_cosines
from hedgelab.metrics.functional.true_hedging import HedgingScores, tracked_features

_ROWS_AT_ONCE = 4096


def hedging(
    W_dec: Any, features: Tensor, codes: Tensor | Codes | None = None, activations: Tensor | Codes | None = None
) -> HedgingScores:
    """True hedging of each latent: how much of the features that no latent tracks its decoder row holds.

    Formulas in :mod:`hedgelab.metrics.functional.true_hedging`. ``.norm [d_sae]`` is 0 for a clean latent and at most about 1;
    ``.largest`` has the sign: positive for features that fire together. ``W_dec [d_sae, d_in]`` is a decoder or an SAE,
    ``features [n, d_in]`` are true directions, of any norms. With ``codes [examples, d_sae]`` and the features' ``activations
    [examples, n]`` (in units of unit directions) hedging is read off the regression of one on the other, which is needed where
    ``n > d_in``; latents that never fire then track nothing. Trust it where ``features`` are all that there is.

    >>> W_dec = torch.tensor([[0.8, 0.6, 0.0]])  # one latent that mixes .6 of a second feature in
    >>> hedging(W_dec, torch.eye(3)).norm
    tensor([0.6000], dtype=torch.float64)
    """
    decoder = _decoder(W_dec)
    d_in = decoder.shape[1]
    if features.ndim != 2 or features.shape[1] != d_in:
        raise UserError(f"features: expected directions [n, {d_in}] (W_dec's width), got {list(features.shape)}")
    features = features.to(decoder.device)
    cosines = decoder_cosines(decoder, features)
    if codes is None and activations is None:
        return true_hedging.hedging(true_hedging.decoder_coordinates(decoder, features), cosines, tracked_features(cosines))
    if codes is None or activations is None:
        raise UserError("codes, activations: give both, or neither")
    codes, expected = as_codes(codes), [len(decoder), len(features)]
    given, true = ([one.batch_size, one.d_sae] for one in (codes, as_codes(activations)))
    if given[0] != true[0] or [given[1], true[1]] != expected:
        wanted = " and ".join(f"[examples, {width}]" for width in expected)
        raise UserError(f"codes, activations: expected {wanted}, got {given} and {true}")
    metric = FeatureRegression(*expected, sync_on_compute=False)
    metric.update(codes, activations)
    fired, sums = codes.firing_counts().to(cosines.device), metric.to(cosines.device).compute()
    tracked, often = tracked_features(cosines, fired > 0), fired >= true_hedging.FIRINGS
    return true_hedging.regressed_hedging(sums, decoder, features, cosines, tracked, often)


def residual_hedging(x: Tensor, sae: Any, blocks: int = BLOCKS) -> ResidualHedging:
    """Hedging of an SAE read off its errors on held-out activations; no ground truth is needed.

    Formulas, and when to trust it, in :mod:`hedgelab.metrics.functional.error_spread`. ``.hedging`` is about 0 where nothing
    hedges, of either sign; ``.std`` is its standard error. ``x [..., d_in]`` are activations as the SAE reads them: some
    thousands of independent ones, which it was not trained on, split into ``blocks`` parts.
    """
    x = x.reshape(-1, x.shape[-1])
    _run(sae, x[:1])
    metric = ResidualHedgingMetric(sae.W_dec, len(x), blocks, sync_on_compute=False).to(sae.W_dec.device)
    for rows in torch.split(x.to(sae.W_dec.device), _ROWS_AT_ONCE):
        metric.update(rows, *_run(sae, rows))
    return metric.compute()


def hedging_degree(
    control: Any,
    extended: Any,
    x: Tensor | None = None,
    *,
    reordered: Any = None,
    foreign: Sequence[Tensor] = (),
    draws: int = DRAWS,
    seed: int = 0,
) -> DegreeScores:
    """The hedging degree of an SAE from its two continuations: as it is, and with latents appended.

    Each continuation is an SAE or its decoder; the rest is as in :func:`hedgelab.metrics.functional.hedging_degree`.
    Activations ``x [..., d_in]`` show which latents live, and their covariance; control and extended must be SAEs then.
    """
    old, new = _decoder(control), _decoder(extended)
    if old.shape[1] != new.shape[1]:
        raise UserError(f"extended: expected decoder rows of width {old.shape[1]}, got {new.shape[1]}")
    other = None if reordered is None else _decoder(reordered)
    if x is None:
        return degree.hedging_degree(old, new, foreign=foreign, reordered=other, draws=draws, seed=seed)
    if isinstance(control, Tensor) or isinstance(extended, Tensor):
        raise UserError("x: activations need SAEs for control and extended, not decoders alone")
    metric = HedgingDegree(old, new, other, foreign, draws, seed, sync_on_compute=False).to(old.device)
    for rows in torch.split(x.reshape(-1, x.shape[-1]).to(old.device), _ROWS_AT_ONCE):
        metric.update(rows, _run(control, rows)[1], _run(extended, rows)[1])
    return metric.compute()


def _decoder(sae: Any) -> Tensor:
    """The decoder of an SAE, or the tensor that is one."""
    return sae if isinstance(sae, Tensor) else sae.W_dec


def _run(sae: Any, x: Tensor) -> tuple[Tensor, Codes]:
    """Reconstruction ``[batch, d_in]`` and codes of activations ``[batch, d_in]``, without a gradient."""
    for name in ("encode", "decode", "W_dec"):
        if not hasattr(sae, name):
            raise UserError(f"sae: {type(sae).__name__} has no {name}; an SAE needs encode, decode and W_dec")
    if not getattr(sae, "reconstructs", True):
        raise UserError("sae: a transcoder writes what another hook gives, and does not reconstruct x; give an SAE")
    if x.shape[-1] != sae.W_dec.shape[1]:
        raise UserError(f"x: expected activations of width {sae.W_dec.shape[1]} (W_dec's), got {list(x.shape)}")
    with torch.no_grad():
        latents = sae.encode(x)
        return sae.decode(latents), as_codes(latents).on_raw()
