"""k-sparse probing: how well a concept can be read from the k latents that know most of it (SPEC section 6).

Latents are rescaled to a mean firing magnitude of 1 and ranked, for each class, by the absolute difference of their means
between the class and the rest; a class-balanced logistic regression reads the top k (Gurnee et al. 2023; Gao et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.errors import whole_number
from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.accumulate import as_codes, float64, on_cpu, picked
from hedgelab.metrics.functional.logistic import f1_score, has_both, logistic_regression, roc_auc, warn_of_empty
from hedgelab.seeding import generator

PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Candidates for C; the one with the best AUC on a fifth of the training split is taken."""


class ProbingScores(NamedTuple):
    """What the probes reach on the test split, float64 on the CPU; NaN for classes without members or others in a split."""

    f1: Tensor  # [classes, len(ks)]
    auc: Tensor  # [classes, len(ks)]
    C: Tensor  # the penalties chosen, [classes, len(ks)]
    latents: Tensor  # of each class, best first, [classes, max(ks)] int64


def firing_magnitudes(codes: Tensor | Codes) -> Tensor:
    """Mean activation of each latent where it fires, ``[d_sae]`` float64; 1 for latents that never do."""
    wide = _in_float64(codes)
    fired, total = wide.firing_counts(), wide.sum_per_latent()
    return torch.where(fired > 0, total / fired.clamp_min(1), 1.0)


def rank_latents(train: Tensor | Codes, labels: Tensor, k: int) -> Tensor:
    """The k latents of each class, best first, ``[classes, k]``; arguments as in :func:`k_sparse_probing`."""
    wide = _in_float64(train)
    inside = torch.stack([wide.sum_per_latent(mask.double()) for mask in labels.T])
    count = labels.sum(0).double()[:, None]
    difference = inside / count - (wide.sum_per_latent() - inside) / (len(labels) - count)
    ranked = (difference / firing_magnitudes(train)).abs().sort(dim=1, descending=True, stable=True)
    return ranked.indices[:, :k]


def _in_float64(latents: Tensor | Codes) -> Codes:
    codes = as_codes(latents)
    return Codes(codes.d_sae, float64(codes.values), codes.latents, codes.crow, codes.layout)


def k_sparse_probing(
    train: Tensor | Codes,
    train_labels: Tensor,
    test: Tensor | Codes,
    test_labels: Tensor,
    ks: Sequence[int] = (1, 2, 5, 10),
    seed: int = 0,
) -> ProbingScores:
    """Probe every class, one against the rest, with k latents; scores from 0 to 1, an AUC of .5 is chance.

    Latents are codes or dense ``[n, d_sae]`` of any device, labels bool ``[n, classes]``. ``seed`` picks the fifth of the
    training split by which C is chosen. Small k tell whether *single* latents know a class; with many latents any SAE does
    well. Classes without members, or without others, in either split score NaN, with a warning.

    >>> codes, labels = torch.eye(2).repeat(20, 1), torch.eye(2).repeat(20, 1) > 0
    >>> k_sparse_probing(codes, labels, codes, labels, ks=[1]).auc.tolist()
    [[1.0], [1.0]]

    Logged as:
        probing/f1_k*: probing F1 (higher): F1 of a logistic regression on the k latents that tell classes apart
        probing/auc_k*: probing AUC (higher): its area under the ROC curve
    """
    train, test, train_labels, test_labels = on_cpu(train), on_cpu(test), train_labels.cpu(), test_labels.cpu()
    ks = [min(whole_number("ks", k), train.d_sae) for k in ks]
    known = has_both(train_labels) & has_both(test_labels)
    warn_of_empty("k-sparse probing", known)
    latents = rank_latents(train, train_labels, max(ks))
    scale = firing_magnitudes(train)
    held = torch.randperm(train.batch_size, generator=generator(seed, "probing split")) < train.batch_size // 5
    f1, auc, chosen = (torch.full((len(latents), len(ks)), torch.nan, dtype=torch.float64) for _ in range(3))
    for row in known.nonzero().flatten().tolist():
        x, x_test = (picked(codes, 1, latents[row]) / scale[latents[row]] for codes in (train, test))
        y, y_test = train_labels[:, row], test_labels[:, row]
        for column, k in enumerate(ks):
            C = _best_penalty(x[:, :k], y, held)
            scores = logistic_regression(x[:, :k], y, C).scores(x_test[:, :k])[:, 0]
            f1[row, column], auc[row, column] = f1_score(scores > 0, y_test), roc_auc(scores, y_test)
            chosen[row, column] = C
    return ProbingScores(f1, auc, chosen, latents)


def _best_penalty(x: Tensor, y: Tensor, held: Tensor) -> float:
    """The first of the penalties whose AUC on the held-out part is best."""
    if not (has_both(y[held]) and has_both(y[~held])):
        return 1.0

    def auc(C: float) -> float:
        return roc_auc(logistic_regression(x[~held], y[~held], C).scores(x[held])[:, 0], y[held])

    return max(PENALTIES, key=auc)
