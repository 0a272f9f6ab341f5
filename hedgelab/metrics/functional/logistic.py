"""Logistic regression and its scores, in float64 and without chance: what every probe here is made of.

The objective is scikit-learn's: ``½‖w‖² + C Σ_i s_i log(1 + exp(-y_i (w·x_i + b)))`` with a free intercept; class-balanced
means ``s_i = n / (2 n_class)``. It is strictly convex in w, so any two exact solvers agree.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import softplus

_NEWTON_STEPS = 100
_TOLERANCE = 1e-9


class LinearProbe(NamedTuple):
    """Linear classifiers, one a class.

    Attributes:
        weight: ``[classes, d]``.
        bias: ``[classes]``.
    """

    weight: Tensor
    bias: Tensor

    def scores(self, x: Tensor) -> Tensor:
        """Log odds of examples ``x [n, d]``, ``[n, classes]``, in the probe's precision."""
        return x.to(self.weight) @ self.weight.T + self.bias


def balanced_weights(labels: Tensor) -> Tensor:
    """Weight of each example so that both classes weigh n / 2; ``labels``: bool ``[n, ...]``, float64 of that shape."""
    n, positive = labels.shape[0], labels.sum(0).double()
    return torch.where(labels, n / (2 * positive), n / (2 * (n - positive)))


def logistic_regression(x: Tensor, labels: Tensor, C: float = 1.0, balanced: bool = True) -> LinearProbe:
    """One binary classifier on few columns, by Newton's method.

    Args:
        x: Examples, ``[n, d]``.
        labels: Which are positive, bool ``[n]``; both kinds must occur.
        C: Inverse strength of the L2 penalty.
        balanced: Let both classes weigh alike.

    Returns:
        A probe of one class.
    """
    x = torch.cat([x.double(), x.new_ones(x.shape[0], 1, dtype=torch.float64)], dim=1)
    sample = C * (balanced_weights(labels) if balanced else torch.ones_like(labels, dtype=torch.float64))
    ridge = torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
    ridge[-1] = 0
    sign = labels.double() * 2 - 1
    w = torch.zeros_like(ridge)

    def objective(w: Tensor) -> Tensor:
        return 0.5 * (ridge * w * w).sum() + (sample * softplus(-sign * (x @ w))).sum()

    value = objective(w)
    for _ in range(_NEWTON_STEPS):
        p = torch.sigmoid(x @ w)
        gradient = ridge * w + x.T @ (sample * (p - labels.double()))
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


def linear_probes(x: Tensor, labels: Tensor, C: float = 1.0, balanced: bool = True) -> LinearProbe:
    """Binary classifiers on many columns (raw activations), one against the rest each, by L-BFGS.

    Columns are centred and scaled to a mean square of 1 for the fit alone; C refers to that scale.

    Args:
        x: Examples, ``[n, d]``.
        labels: Class memberships, bool ``[n, classes]``.
        C: Inverse strength of the L2 penalty.
        balanced: Let both sides of each classifier weigh alike.
    """
    x = x.double()
    mean, scale = x.mean(0), x.std(0, unbiased=False).clamp_min(1e-12)
    standard = (x - mean) / scale
    sample = C * (balanced_weights(labels) if balanced else torch.ones_like(labels, dtype=torch.float64))
    target = labels.double()
    classes, d = labels.shape[1], x.shape[1]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(flat).view(classes, d + 1)
        logits = standard @ w[:, :d].T + w[:, d]
        pull = sample * (torch.sigmoid(logits) - target)
        loss = (sample * (softplus(logits) - target * logits)).sum() + 0.5 * w[:, :d].square().sum()
        gradient = torch.cat([pull.T @ standard + w[:, :d], pull.sum(0)[:, None]], dim=1)
        return float(loss), gradient.flatten().numpy()

    start = np.zeros(classes * (d + 1))
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000, "gtol": 1e-4 * C})
    w = torch.from_numpy(found.x).view(classes, d + 1)
    weight = w[:, :d] / scale
    return LinearProbe(weight, w[:, d] - weight @ mean)


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of scores ``[n]``: P(positive above negative), ties counting half; NaN with one class."""
    values, inverse = torch.unique(scores, return_inverse=True)
    positive = torch.bincount(inverse[labels], minlength=len(values)).double()
    negative = torch.bincount(inverse[~labels], minlength=len(values)).double()
    below = negative.cumsum(0) - negative / 2
    return float((positive * below).sum() / (positive.sum() * negative.sum()))


def f1_score(predicted: Tensor, labels: Tensor) -> float:
    """F1 of predictions, both bool ``[n]``; 0 where nothing is found."""
    hits = float((predicted & labels).sum())
    total = float(predicted.sum() + labels.sum())
    return 2 * hits / total if total else 0.0
