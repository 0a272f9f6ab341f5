"""Two tests by ablation: do latents carry one concept each, and can a spurious concept be taken out?

Targeted probe perturbation (TPP) and spurious correlation removal (SCR, after SHIFT of Marks et al. 2024) as SAEBench
defines them (Karvonen et al. 2025). Probes read the mean activation of a text. Silencing latents subtracts their mean
activations times their decoder rows from it; the reconstruction's error stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.metrics.functional.logistic import LinearProbe, has_both, linear_probes, warn_of_empty


class PooledTexts(NamedTuple):
    """Texts by their mean activations and latents.

    Attributes:
        x: Mean activations as the SAE reads them, ``[texts, d_in]``.
        codes: Mean latents, ``[texts, d_sae]``.
    """

    x: Tensor
    codes: Tensor

    def cpu(self) -> PooledTexts:
        """The same on the CPU, where probes are."""
        return PooledTexts(self.x.detach().cpu(), self.codes.detach().cpu())


class TPPScores(NamedTuple):
    """Accuracy that probes lose when the latents of a class are silenced, mean over classes, ``[len(counts)]`` each.

    Attributes:
        total: ``intended - unintended``: 0 for latents that know nothing, high for latents that know one class each.
        intended: Loss of the class's own probe.
        unintended: Mean loss of the other classes' probes.
    """

    total: Tensor
    intended: Tensor
    unintended: Tensor


class BiasedProbes(NamedTuple):
    """The probes of one removal task, which no SAE enters.

    Attributes:
        biased: Trained where both concepts go together; scores of one class.
        concepts: Trained on each concept with the other balanced: two classes, ``label`` and ``spurious``.
    """

    biased: LinearProbe
    concepts: LinearProbe


class SCRScores(NamedTuple):
    """Spurious correlation removal.

    Attributes:
        score: ``(A_ablated - A_biased) / (A_clean - A_biased)`` where the bias hurts more, ``[len(counts)]``.
        both: The same for the label and for the spurious concept as the one to predict, ``[2, len(counts)]``.
        biased: Accuracy of the biased probe on each concept, ``[2]``.
        clean: Accuracy of each concept's own probe, ``[2]``.
    """

    score: Tensor
    both: Tensor
    biased: Tensor
    clean: Tensor


def targeted_probe_perturbation(
    probe: LinearProbe,
    train: PooledTexts,
    train_labels: Tensor,
    test: PooledTexts,
    test_labels: Tensor,
    W_dec: Tensor,
    counts: Sequence[int],
) -> TPPScores:
    """TPP for several numbers of silenced latents.

    Args:
        probe: One classifier a class, against the rest, on mean activations.
        train: Texts by which latents are attributed to classes.
        train_labels: Their classes, bool ``[texts, classes]``, one each.
        test: Texts on which accuracy is measured, class against equally many others.
        test_labels: Their classes.
        W_dec: Decoder, ``[d_sae, d_in]``.
        counts: How many latents are silenced.

    Logged as:
        tpp/n*: TPP (higher): targeted probe perturbation: what ablating a class's latents does to it alone
    """
    train, test, train_labels, test_labels = train.cpu(), test.cpu(), train_labels.cpu(), test_labels.cpu()
    W_dec = W_dec.detach().cpu()
    warn_of_empty("targeted probe perturbation", has_both(train_labels) & has_both(test_labels))
    effects = attribution(probe, train.codes, train_labels, W_dec, positive_only=True)
    clean = _balanced_accuracies(probe, test.x, test_labels)
    classes = test_labels.shape[1]
    others = ~torch.eye(classes, dtype=torch.bool)
    result = torch.zeros(3, len(counts), dtype=torch.float64)
    for column, count in enumerate(counts):
        lost = torch.stack(
            [clean - _balanced_accuracies(probe, silence(test, W_dec, top(row, count)), test_labels) for row in effects]
        )
        intended, unintended = lost.diagonal().nanmean(), lost[others].nanmean()
        result[:, column] = torch.stack([intended - unintended, intended, unintended])
    return TPPScores(*result)


def biased_probes(x: Tensor, label: Tensor, spurious: Tensor, C: float = 1.0) -> BiasedProbes:
    """Train the probes of a removal task on equally many texts of all four kinds.

    Args:
        x: Mean activations, ``[texts, d_in]``.
        label: The concept that should be predicted, bool ``[texts]``.
        spurious: The concept that goes along with it, bool ``[texts]``.
        C: Inverse strength of the L2 penalty.
    """
    together = label == spurious
    return BiasedProbes(
        linear_probes(x[together], label[together, None], C), linear_probes(x, torch.stack([label, spurious], dim=1), C)
    )


def spurious_correlation_removal(
    probes: BiasedProbes,
    train: PooledTexts,
    train_labels: Tensor,
    test: PooledTexts,
    test_labels: Tensor,
    W_dec: Tensor,
    counts: Sequence[int],
) -> SCRScores:
    """SCR for several numbers of silenced latents.

    Args:
        probes: Made by :func:`biased_probes`.
        train: Texts of all four kinds, by which latents are attributed.
        train_labels: Label and spurious concept, bool ``[texts, 2]``.
        test: Texts of all four kinds, equally many.
        test_labels: The same of them.
        W_dec: Decoder, ``[d_sae, d_in]``.
        counts: How many latents are silenced.

    Logged as:
        scr/n*: SCR (higher): spurious correlation removal: share of the bias that ablating latents removes
    """
    train, test, train_labels, test_labels = train.cpu(), test.cpu(), train_labels.cpu(), test_labels.cpu()
    W_dec = W_dec.detach().cpu()
    effects = attribution(probes.concepts, train.codes, train_labels, W_dec, positive_only=False)
    clean = _accuracies(probes.concepts.scores(test.x), test_labels)
    biased = _accuracies(probes.biased.scores(test.x).expand(-1, 2), test_labels)
    both = torch.zeros(2, len(counts), dtype=torch.float64)
    for kept, removed in ((0, 1), (1, 0)):
        room = clean[kept] - biased[kept]
        for column, count in enumerate(counts):
            x = silence(test, W_dec, top(effects[removed], count))
            accuracy = _accuracies(probes.biased.scores(x), test_labels[:, kept : kept + 1])[0]
            both[kept, column] = (accuracy - biased[kept]) / room if room >= 1e-3 else torch.nan
    return SCRScores(both[int(biased.argmin())], both, biased, clean)


def attribution(probe: LinearProbe, codes: Tensor, labels: Tensor, W_dec: Tensor, positive_only: bool) -> Tensor:
    """What each latent does to each class's probe: difference of its means times the probe along its row, ``[classes, d_sae]``.

    Args:
        probe: The classifiers.
        codes: Mean latents of texts, ``[texts, d_sae]``.
        labels: Classes, bool ``[texts, classes]``.
        W_dec: Decoder, ``[d_sae, d_in]``.
        positive_only: Count only latents more active in the class (TPP); else the size of either sign (SCR).
    """
    inside = labels.double() / labels.sum(0)
    outside = (~labels).double() / (~labels).sum(0)
    difference = (inside - outside).T @ codes.double()
    along = probe.weight.double() @ W_dec.detach().double().T
    return difference.clamp_min(0) * along if positive_only else (difference * along).abs()


def top(effects: Tensor, count: int) -> Tensor:
    """The ``count`` latents of largest effect, those without any left out; ``effects``: ``[d_sae]``."""
    best = effects.sort(descending=True, stable=True).indices[:count]
    return best[effects[best] != 0]


def silence(texts: PooledTexts, W_dec: Tensor, latents: Tensor) -> Tensor:
    """Mean activations of texts once some latents are silent, ``[texts, d_in]`` float64."""
    return texts.x.double() - texts.codes[:, latents].double() @ W_dec.detach()[latents].double()


def _accuracies(scores: Tensor, labels: Tensor) -> Tensor:
    """Share of right decisions of each class's classifier, ``[classes]`` float64."""
    return ((scores > 0) == labels).double().mean(0).masked_fill(scores.isnan().any(0), torch.nan)


def _balanced_accuracies(probe: LinearProbe, x: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of each class's classifier where the class and the rest weigh alike, ``[classes]``."""
    scores = probe.scores(x)
    found = scores > 0
    right = (found & labels).sum(0) / labels.sum(0) + (~found & ~labels).sum(0) / (~labels).sum(0)
    return (right.double() / 2).masked_fill(scores.isnan().any(0), torch.nan)
