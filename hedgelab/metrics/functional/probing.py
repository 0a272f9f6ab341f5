"""k-sparse probing: how well a concept can be read from the k latents that know most of it (SPEC section 6).

Latents are rescaled to a mean firing magnitude of 1 and ranked, for each class, by the absolute difference of their means
between the class and the rest; a class-balanced logistic regression reads the top k (Gurnee et al. 2023; Gao et al. 2024).

Probes are fitted in float64. Their objective is scikit-learn's, ``½‖w‖² + C Σ_i s_i log(1 + exp(-y_i (w·x_i + b)))`` with a
free intercept and ``s_i = n / (2 n_class)``, so that both classes weigh alike; any two exact solvers agree.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from hedgelab.errors import UserError, whole_number
from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.accumulate import as_codes, float64, on_cpu, picked
from hedgelab.seeding import generator

PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)  # for C: the one with the best AUC on a fifth of the training split is taken
_NEWTON_STEPS, _TOLERANCE = 100, 1e-9


class LinearProbe(NamedTuple):
    """Linear classifiers, one a class."""

    weight: Tensor  # [classes, d]
    bias: Tensor  # [classes]

    def scores(self, x: Tensor) -> Tensor:
        """Log odds of examples ``x [n, d]``, ``[n, classes]``, in the probe's precision."""
        return x.to(self.weight) @ self.weight.T + self.bias


def has_both(labels: Tensor) -> Tensor:
    """Whether members and others both occur, bool ``[...]`` of labels ``[n, ...]``: without either no score can be computed."""
    return labels.any(0) & ~labels.all(0)


def known_classes(what: str, *splits: Tensor) -> Tensor:
    """Classes with members and others in the labels ``[n, classes]`` of every split, bool; warns that the rest score NaN."""
    known = torch.stack([has_both(labels) for labels in splits]).all(0)
    if not bool(known.all()):
        empty = (~known).nonzero().flatten().tolist()
        warnings.warn(f"{what}: classes {empty} lack members or others: NaN", stacklevel=3)
    return known


def logistic_regression(x: Tensor, labels: Tensor, C: float = 1.0) -> LinearProbe:
    """One binary classifier (``labels [n]`` bool) on few columns ``x [n, d]``, by Newton's method on the CPU.

    >>> probe = logistic_regression(torch.tensor([[0.0], [1.0]]), torch.tensor([False, True]))
    >>> bool(probe.weight > 0), (probe.scores(torch.tensor([[0.5]])).abs() < 1e-9).item()
    (True, True)
    """
    x, labels = x.detach().cpu().double(), labels.cpu()
    if not bool(has_both(labels)):
        raise UserError(f"labels: need examples of both kinds, got {int(labels.sum())} positive of {len(labels)}")
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    target, sample = labels.double(), C * _example_weights(labels)
    ridge, w = x.new_ones(x.shape[1]), x.new_zeros(x.shape[1])
    ridge[-1] = 0

    def objective(w: Tensor) -> Tensor:
        return 0.5 * (ridge * w * w).sum() + (sample * softplus(-(target * 2 - 1) * (x @ w))).sum()

    value = objective(w)
    for _ in range(_NEWTON_STEPS):
        p = torch.sigmoid(x @ w)
        gradient = ridge * w + x.T @ (sample * (p - target))
        curvature = x.T @ (x * (sample * p * (1 - p))[:, None]) + torch.diag(ridge)
        curvature[-1, -1] += 1e-12 * (1 + curvature[-1, -1])
        step = torch.linalg.solve(curvature, gradient)
        decrease, size = gradient @ step, 1.0
        while (moved := objective(w - size * step)) > value - 1e-4 * size * decrease and size > 1e-10:
            size /= 2
        w, value = w - size * step, moved
        if decrease < _TOLERANCE * (1 + value.abs()):
            break
    return LinearProbe(w[None, :-1], w[-1:])


def linear_probes(x: Tensor, labels: Tensor, C: float = 1.0) -> LinearProbe:
    """Binary classifiers on many columns ``x [n, d]``, each class of ``labels [n, classes]`` against the rest, by L-BFGS.

    Columns are standardised for the fit, and C refers to that. NaN, with a warning, for classes that lack members or others.
    """
    x, labels = x.detach().cpu().double(), labels.cpu()
    known = known_classes("probes", labels)
    weight, bias = x.new_full((len(known), x.shape[1]), torch.nan), x.new_full(known.shape, torch.nan)
    mean, scale = x.mean(0), x.std(0, unbiased=False).clamp_min(1e-12)
    standard = (x - mean) / scale
    target, sample = labels[:, known].double(), C * _example_weights(labels[:, known])
    classes, d = target.shape[1], x.shape[1]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(flat).view(classes, d + 1)
        logits = standard @ w[:, :d].T + w[:, d]
        pull = sample * (torch.sigmoid(logits) - target)
        loss = (sample * (softplus(logits) - target * logits)).sum() + 0.5 * w[:, :d].square().sum()
        gradient = torch.cat([pull.T @ standard + w[:, :d], pull.sum(0)[:, None]], dim=1)
        return float(loss), gradient.flatten().numpy()

    from scipy.optimize import minimize  # slow to import, and needed by probes alone

    start = np.zeros(classes * (d + 1))
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000, "gtol": 1e-4 * C})
    w = torch.from_numpy(found.x).view(classes, d + 1)
    weight[known] = w[:, :d] / scale
    bias[known] = w[:, d] - weight[known] @ mean
    return LinearProbe(weight, bias)


def _example_weights(labels: Tensor) -> Tensor:
    """Weight of each example so that both classes weigh n / 2, float64 of the shape of ``labels [n, ...]``."""
    n, positive = labels.shape[0], labels.sum(0).double()
    return torch.where(labels, n / (2 * positive), n / (2 * (n - positive)))


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of scores ``[n]``: P(positive above negative), ties counting half; NaN with one class.

    >>> roc_auc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, True, False, True]))
    0.875
    """
    values, inverse = torch.unique(scores, return_inverse=True)
    labels = labels.to(scores.device)
    positive = torch.bincount(inverse[labels], minlength=len(values)).double()
    negative = torch.bincount(inverse[~labels], minlength=len(values)).double()
    below = negative.cumsum(0) - negative / 2
    return float((positive * below).sum() / (positive.sum() * negative.sum()))


def f1_score(predicted: Tensor, labels: Tensor) -> float:
    """F1 of predictions, both bool ``[n]``: 0 where nothing of the class is found, NaN where the class has no members.

    >>> f1_score(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
    0.6666666666666666
    """
    labels = labels.to(predicted.device)
    if not bool(labels.any()):
        return float("nan")
    return 2 * float((predicted & labels).sum()) / float(predicted.sum() + labels.sum())


class ProbingScores(NamedTuple):
    """What the probes reach on the test split, float64 on the CPU."""

    f1: Tensor  # [classes, len(ks)]
    auc: Tensor  # [classes, len(ks)]
    C: Tensor  # the penalties chosen, [classes, len(ks)]
    latents: Tensor  # of each class, best first, [classes, max(ks)] int64


def firing_magnitudes(codes: Tensor | Codes) -> Tensor:
    """Mean size of each latent's activations (they may have a sign), ``[d_sae]`` float64; 1 for latents that never fire."""
    wide = as_codes(codes).with_values(float64(as_codes(codes).values).abs())
    fired = wide.firing_counts()
    return torch.where(fired > 0, wide.sum_per_latent() / fired.clamp_min(1), 1.0)


def rank_latents(train: Tensor | Codes, labels: Tensor, k: int) -> Tensor:
    """The k latents of each class, best first, ``[classes, k]``; arguments as in :func:`k_sparse_probing`."""
    wide = as_codes(train).with_values(float64(as_codes(train).values))
    inside = torch.stack([wide.sum_per_latent(mask.double()) for mask in labels.T])
    count = labels.sum(0).double()[:, None]
    difference = inside / count - (wide.sum_per_latent() - inside) / (len(labels) - count)
    return (difference / firing_magnitudes(train)).abs().sort(dim=1, descending=True, stable=True).indices[:, :k]


def k_sparse_probing(
    train: Tensor | Codes,
    train_labels: Tensor,
    test: Tensor | Codes,
    test_labels: Tensor,
    ks: Sequence[int] = (1, 2, 5, 10),
    seed: int = 0,
) -> ProbingScores:
    """Probe every class, one against the rest, with k latents; scores from 0 to 1, an AUC of .5 is chance.

    Latents are codes or dense ``[n, d_sae]`` of any device, labels bool ``[n, classes]``; ``seed`` picks the fifth of the
    training split by which C is chosen. Classes that lack members or others in either split score NaN, with a warning. Small k
    tell whether *single* latents know a class; with many latents any SAE does well.

    >>> codes, labels = torch.eye(2).repeat(20, 1), torch.eye(2).repeat(20, 1) > 0
    >>> k_sparse_probing(codes, labels, codes, labels, ks=[1]).auc.tolist()
    [[1.0], [1.0]]

    Logged as:
        probing/f1_k*: probing F1 (higher): F1 of a logistic regression on the k latents that tell classes apart
        probing/auc_k*: probing AUC (higher): its area under the ROC curve
    """
    train, test, train_labels, test_labels = on_cpu(train), on_cpu(test), train_labels.cpu(), test_labels.cpu()
    ks = [min(whole_number("ks", k), train.d_sae) for k in ks]
    known = known_classes("k-sparse probing", train_labels, test_labels)
    latents = rank_latents(train, train_labels, max(ks))
    scale = firing_magnitudes(train)
    held = torch.randperm(train.batch_size, generator=generator(seed, "probing split")) < train.batch_size // 5
    f1, auc, chosen = (torch.full((len(latents), len(ks)), torch.nan, dtype=torch.float64) for _ in range(3))
    for row in known.nonzero().flatten().tolist():
        x, x_test = (picked(codes, 1, latents[row]) / scale[latents[row]] for codes in (train, test))
        y, y_test = train_labels[:, row], test_labels[:, row]
        for column, k in enumerate(ks):
            C = chosen[row, column] = _best_penalty(x[:, :k], y, held)
            scores = logistic_regression(x[:, :k], y, C).scores(x_test[:, :k])[:, 0]
            f1[row, column], auc[row, column] = f1_score(scores > 0, y_test), roc_auc(scores, y_test)
    return ProbingScores(f1, auc, chosen, latents)


def _best_penalty(x: Tensor, y: Tensor, held: Tensor) -> float:
    """The first of the penalties whose AUC on the held-out part is best."""

    def auc(C: float) -> float:
        return roc_auc(logistic_regression(x[~held], y[~held], C).scores(x[held])[:, 0], y[held])

    return max(PENALTIES, key=auc) if has_both(y[held]) and has_both(y[~held]) else 1.0
