"""What a language model loses when an SAE's reconstruction takes the place of its activations."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from hedgelab.metrics.functional.accumulate import float64

LOSSES = ("clean", "sae", "zero", "mean", "kl_sae", "kl_zero", "kl_mean")  # sums that recovered_loss takes


class RecoveredLoss(NamedTuple):
    """Mean losses in nats a token, float64 scalars."""

    cross_entropy: Tensor  # of the untouched model
    cross_entropy_sae: Tensor  # with the reconstruction spliced in
    cross_entropy_zero: Tensor  # with zeros spliced in
    cross_entropy_mean: Tensor  # with the mean activation spliced in
    kl_sae: Tensor  # KL divergence of the spliced model's next-token distribution from the untouched one's
    kl_zero: Tensor  # the same with zeros
    kl_mean: Tensor  # the same with the mean activation
    recovered: Tensor  # share of the cross-entropy lost to zero ablation that the SAE gives back
    recovered_mean: Tensor  # the same against mean ablation
    kl_recovered: Tensor  # 1 - kl_sae / kl_zero
    kl_recovered_mean: Tensor  # 1 - kl_sae / kl_mean


def spliced_sums(name: str, tokens: Tensor, keep: Tensor, clean: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """Sums over tokens of the cross-entropy, and of KL(clean ‖ spliced) as ``kl_…``, of a spliced model's next tokens, in nats.

    ``logits [n, length, vocabulary]``, ``tokens [n, length]``, ``keep [n, length]`` bool: which predictions count.
    """
    kept = keep[:, :-1]  # the last position predicts nothing
    p, q = (log_softmax(values[:, :-1][kept].float(), dim=-1) for values in (clean, logits))
    losses = -q.gather(1, tokens[:, 1:][kept].long()[:, None])
    return {name: float64(losses).sum(), f"kl_{name}": float64((p.exp() * (p - q)).sum(-1)).sum()}


def baseline_sums(tokens: Tensor, keep: Tensor, clean: Tensor, zero: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Those that do not depend on an SAE: of the untouched model, and with zeros and the mean activation in its place."""
    sums = {"count": float64(keep[:, :-1]).sum(), "clean": spliced_sums("clean", tokens, keep, clean, clean)["clean"]}
    return sums | spliced_sums("zero", tokens, keep, clean, zero) | spliced_sums("mean", tokens, keep, clean, mean)


def recovered_loss(sums: dict[str, Tensor], count: Tensor) -> RecoveredLoss:
    """Means and shares from sums over ``count`` tokens: ``recovered = (CE_zero - CE_sae) / (CE_zero - CE)``.

    1 is a perfect reconstruction, 0 no better than the ablation, below 0 worse; NaN where the ablation loses nothing. ``sums``
    are those of :data:`LOSSES`. Zero ablation breaks most models, which flatters any SAE: compare by KL, or against the mean.

    >>> losses = {"clean": 2.0, "sae": 3.0, "zero": 6.0, "mean": 4.0, "kl_sae": 1.0, "kl_zero": 4.0, "kl_mean": 2.0}
    >>> recovered_loss({name: torch.tensor(loss) for name, loss in losses.items()}, torch.tensor(1)).recovered.item()
    0.75

    Logged as:
        loss_recovered/recovered: loss recovered (higher): share of the model's loss kept with reconstructions put in
        loss_recovered/kl_recovered: KL recovered (higher): the same of the divergence from the model's predictions
    """
    clean, sae, zero, mean, kl_sae, kl_zero, kl_mean = means = [sums[name] / count for name in LOSSES]

    def share(part: Tensor, lost: Tensor) -> Tensor:
        return part / torch.where(lost == 0, torch.nan, lost)

    of_losses = [share(zero - sae, zero - clean), share(mean - sae, mean - clean)]
    return RecoveredLoss(*means + of_losses + [1 - share(kl_sae, lost) for lost in (kl_zero, kl_mean)])
