"""What a language model loses when an SAE's reconstruction takes the place of its activations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from hedgelab.metrics.functional.accumulate import float64


class RecoveredLoss(NamedTuple):
    """Mean losses in nats a token, float64 scalars.

    Attributes:
        cross_entropy: Of the untouched model.
        cross_entropy_sae: With the reconstruction spliced in.
        cross_entropy_zero: With zeros spliced in.
        cross_entropy_mean: With the mean activation spliced in.
        kl_sae: KL divergence of the spliced model's next-token distribution from the untouched one's.
        kl_zero: The same with zeros.
        kl_mean: The same with the mean activation.
        recovered: Share of the cross-entropy lost to zero ablation that the SAE gives back: 1 for a perfect reconstruction.
        recovered_mean: The same against mean ablation.
        kl_recovered: ``1 - kl_sae / kl_zero``.
        kl_recovered_mean: ``1 - kl_sae / kl_mean``.
    """

    cross_entropy: Tensor
    cross_entropy_sae: Tensor
    cross_entropy_zero: Tensor
    cross_entropy_mean: Tensor
    kl_sae: Tensor
    kl_zero: Tensor
    kl_mean: Tensor
    recovered: Tensor
    recovered_mean: Tensor
    kl_recovered: Tensor
    kl_recovered_mean: Tensor


def next_token_losses(logits: Tensor, tokens: Tensor, keep: Tensor) -> Tensor:
    """Cross-entropy of the next token wherever ``keep`` says so, ``[kept]``, in nats.

    Args:
        logits: ``[n, length, vocabulary]``.
        tokens: ``[n, length]``.
        keep: Positions whose prediction counts, bool ``[n, length]``; the last position predicts nothing.
    """
    kept = keep[:, :-1]
    return cross_entropy(logits[:, :-1][kept].float(), tokens[:, 1:][kept].long(), reduction="none")


def next_token_divergences(clean: Tensor, logits: Tensor, keep: Tensor) -> Tensor:
    """KL(clean ‖ other) of the next-token distributions, ``[kept]``, in nats; arguments as in :func:`next_token_losses`."""
    kept = keep[:, :-1]
    p, q = (log_softmax(values[:, :-1][kept].float(), dim=-1) for values in (clean, logits))
    return (p.exp() * (p - q)).sum(-1)


def recovered_loss(sums: dict[str, Tensor], count: Tensor) -> RecoveredLoss:
    """Means and shares from sums over tokens.

    Args:
        sums: ``clean``, and ``sae``, ``zero``, ``mean`` with their divergences ``kl_sae``, ``kl_zero``, ``kl_mean``.
        count: Tokens.

    Logged as:
        loss_recovered/recovered: loss recovered (higher): share of the model's loss kept with reconstructions put in
        loss_recovered/kl_recovered: KL recovered (higher): the same of the divergence from the model's predictions
    """
    clean, sae, zero, mean = (sums[name] / count for name in ("clean", "sae", "zero", "mean"))
    kl_sae, kl_zero, kl_mean = (sums[f"kl_{name}"] / count for name in ("sae", "zero", "mean"))
    return RecoveredLoss(
        clean, sae, zero, mean, kl_sae, kl_zero, kl_mean,
        _share(zero - sae, zero - clean), _share(mean - sae, mean - clean),
        1 - _share(kl_sae, kl_zero), 1 - _share(kl_sae, kl_mean),
    )  # fmt: skip


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """A part of what an ablation loses; NaN where it loses nothing."""
    return part / torch.where(whole == 0, torch.nan, whole)


def sum64(values: Tensor) -> Tensor:
    """Sum in float64, on the CPU where the device has no such numbers."""
    return float64(values).sum()
