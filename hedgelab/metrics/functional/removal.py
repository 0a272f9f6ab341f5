"""Two tests by ablation: do latents carry one concept each, and can a spurious concept be taken out?

Targeted probe perturbation (TPP) and spurious correlation removal (SCR, after SHIFT of Marks et al. 2024) as SAEBench
defines them (Karvonen et al. 2025). Probes read the mean activation of a text. Silencing latents subtracts their mean
activations times their decoder rows from it; the reconstruction's error stays.

The field advises against both: TPP falls as training goes on, and SCR with many latents goes against the truth on synthetic
SAEs (Chanin, *Are SAE Benchmarks Reliable?*, arXiv 2605.18229). Use them for comparison with published numbers.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from hedgelab.metrics.functional.probing import LinearProbe, known_classes, linear_probes


class PooledTexts(NamedTuple):
    """Texts by their mean activations and latents, and their classes."""

    x: Tensor  # as the SAE reads them, [texts, d_in]
    codes: Tensor  # [texts, d_sae]
    labels: Tensor  # bool, [texts, classes]


P = TypeVar("P", PooledTexts, LinearProbe)


class TPPScores(NamedTuple):
    """Accuracy that probes lose when the latents of a class are silenced, mean over classes, ``[len(counts)]`` each."""

    total: Tensor  # intended - unintended
    intended: Tensor  # loss of the class's own probe
    unintended: Tensor  # mean loss of the other classes' probes


class SCRScores(NamedTuple):
    """Spurious correlation removal."""

    score: Tensor  # (A_ablated - A_biased) / (A_clean - A_biased) where the bias hurts more, [len(counts)]
    both: Tensor  # the same for the label and for the spurious concept as the one to predict, [2, len(counts)]
    biased: Tensor  # accuracy of the biased probe on each concept, [2]
    clean: Tensor  # accuracy of each concept's own probe, [2]


def targeted_probe_perturbation(
    probe: LinearProbe, train: PooledTexts, test: PooledTexts, W_dec: Tensor, counts: Sequence[int]
) -> TPPScores:
    """TPP, ``loss of a class's own probe - mean loss of the others'``, for several numbers of silenced latents.

    From -.5 to .5: a blind probe loses half of its accuracy, in which class and others weigh alike. ``probe`` holds one
    classifier a class on mean activations. Latents are attributed to classes on ``train`` texts, accuracy is measured on
    ``test`` texts, of one class each; ``W_dec [d_sae, d_in]``, ``counts`` are how many latents are silenced.

    >>> labels, probe = torch.eye(2) > 0, LinearProbe(torch.eye(2), torch.tensor([-0.5, -0.5]))
    >>> texts = PooledTexts(torch.eye(2), torch.eye(2), labels)  # a latent a class, which alone carries it
    >>> targeted_probe_perturbation(probe, texts, texts, torch.eye(2), [1]).total
    tensor([0.5000], dtype=torch.float64)

    Logged as:
        tpp/n*: TPP (higher): targeted probe perturbation: what ablating a class's latents does to it alone
    """
    train, test, probe, W_dec = _on_cpu(train), _on_cpu(test), _on_cpu(probe), W_dec.detach().cpu()
    known_classes("targeted probe perturbation", train.labels, test.labels)
    effects = attribution(probe, train.codes, train.labels, W_dec, positive_only=True)

    def accuracies(x: Tensor) -> Tensor:  # of each class's classifier, the class and the rest weighing alike
        scores = probe.scores(x)
        right = (scores > 0) == test.labels
        members, others = ((right & kind).sum(0) / kind.sum(0) for kind in (test.labels, ~test.labels))
        return ((members + others).double() / 2).masked_fill(scores.isnan().any(0), torch.nan)

    clean, others = accuracies(test.x), ~torch.eye(len(effects), dtype=torch.bool)
    result = []
    for count in counts:
        lost = torch.stack([clean - accuracies(silence(test, W_dec, top(row, count))) for row in effects])
        intended, unintended = lost.diagonal().nanmean(), lost[others].nanmean()
        result.append(torch.stack([intended - unintended, intended, unintended]))
    return TPPScores(*torch.stack(result, dim=1))


def biased_probes(x: Tensor, label: Tensor, spurious: Tensor, C: float = 1.0) -> tuple[LinearProbe, LinearProbe]:
    """The probes of a removal task, from mean activations ``x [texts, d_in]`` of equally many texts of all four kinds.

    ``label [texts]`` (bool) is the concept to predict, ``spurious [texts]`` the one that goes along with it. The first probe,
    *biased*, is trained where both go together; the second has a classifier for each concept, with the other balanced.
    """
    together, concepts = label == spurious, torch.stack([label, spurious], dim=1)
    return linear_probes(x[together], label[together, None], C), linear_probes(x, concepts, C)


def spurious_correlation_removal(
    probes: tuple[LinearProbe, LinearProbe], train: PooledTexts, test: PooledTexts, W_dec: Tensor, counts: Sequence[int]
) -> SCRScores:
    """SCR, ``(A_ablated - A_biased) / (A_clean - A_biased)`` of accuracies A, for several numbers of silenced latents.

    1 where the bias is gone, 0 where it stays, below 0 where it grows. :func:`biased_probes` makes ``probes``; classes are the
    label and the spurious concept; texts are of all four kinds, in ``test`` equally many. The rest is as for TPP.

    >>> labels = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    >>> texts, zero = PooledTexts(2.0 * labels, 2.0 * labels, labels), torch.zeros(1)  # a latent a concept
    >>> biased = LinearProbe(torch.tensor([[1.0, 2.0]]), zero - 1)  # hears the spurious concept
    >>> probes = biased, LinearProbe(torch.eye(2), zero - 1)
    >>> spurious_correlation_removal(probes, texts, texts, torch.eye(2), [1]).score
    tensor([1.], dtype=torch.float64)

    Logged as:
        scr/n*: SCR (higher): spurious correlation removal: share of the bias that ablating latents removes
    """
    train, test, W_dec = _on_cpu(train), _on_cpu(test), W_dec.detach().cpu()
    biased_probe, concepts = map(_on_cpu, probes)
    effects = attribution(concepts, train.codes, train.labels, W_dec, positive_only=False)

    def accuracies(probe: LinearProbe, x: Tensor) -> Tensor:  # on both concepts
        scores = probe.scores(x)
        return ((scores > 0) == test.labels).double().mean(0).masked_fill(scores.isnan().any(0), torch.nan)

    clean, biased = accuracies(concepts, test.x), accuracies(biased_probe, test.x)
    both = torch.zeros(2, len(counts), dtype=torch.float64)
    for kept, removed in ((0, 1), (1, 0)):
        room = clean[kept] - biased[kept]
        for column, count in enumerate(counts):
            accuracy = accuracies(biased_probe, silence(test, W_dec, top(effects[removed], count)))[kept]
            both[kept, column] = (accuracy - biased[kept]) / room if room >= 1e-3 else torch.nan
    return SCRScores(both[int(biased.argmin())], both, biased, clean)


def _on_cpu(parts: P) -> P:
    """Texts or probes without a gradient on the CPU, where they are scored."""
    return type(parts)(*(part.detach().cpu() for part in parts))


def attribution(probe: LinearProbe, codes: Tensor, labels: Tensor, W_dec: Tensor, positive_only: bool) -> Tensor:
    """What each latent does to each class's probe: difference of its means times the probe along its row, ``[classes, d_sae]``.

    ``positive_only`` counts only latents more active in the class (TPP); else the size of either sign (SCR).
    """
    inside, outside = (kind.double() / kind.sum(0) for kind in (labels, ~labels))
    difference, along = (inside - outside).T @ codes.double(), probe.weight.double() @ W_dec.detach().double().T
    return difference.clamp_min(0) * along if positive_only else (difference * along).abs()


def top(effects: Tensor, count: int) -> Tensor:
    """The ``count`` latents of largest effect, those without any left out; ``effects``: ``[d_sae]``."""
    best = effects.sort(descending=True, stable=True).indices[:count]
    return best[effects[best] != 0]


def silence(texts: PooledTexts, W_dec: Tensor, latents: Tensor) -> Tensor:
    """Mean activations of texts once some latents are silent, ``[texts, d_in]`` float64."""
    return texts.x.double() - texts.codes[:, latents].double() @ W_dec.detach()[latents].double()
