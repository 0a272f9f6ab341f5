r"""Loss landscapes of a tied latent between two features (SPEC section 4; the paper's theory figure).

A latent without biases encodes and decodes along the unit vector ``d(t)`` in the direction of ``(1 - t) f0 + t f1``
(orthonormal features), ``d = (cos θ, sin θ)`` with ``tan θ = t / (1 - t)``. It sees f0 alone with probability ``p`` and both
features with probability ``q``; its activation ``a = d·x`` costs ``λ a^r``. The squared error of a unit tied latent is
``‖x‖² - a²``:

    L(θ) = p (1 - cos²θ) + q (2 - (cos θ + sin θ)²) + λ (p cos^r θ + q (cos θ + sin θ)^r).

*Minimum without penalty.* ``L = const - (p/2) cos 2θ - q sin 2θ``, so ``tan 2θ* = 2 q / p``: for every ``q > 0`` the latent
mixes f1 in, more the more often they fire together. That is hedging: the squared error alone asks for it.

*Condition.* ``dL/dθ(0) = q (λ r - 2)`` (cos changes at second order, ``cos + sin`` at first): hedging lowers the loss
for every ``q > 0`` if and only if ``λ r < 2``. No sensible penalty prevents it: at λ = 2 (r = 1) the activation on f0
alone, which saves an error of ``a² = 1``, already costs twice that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from hedgelab.errors import UserError
from hedgelab.theory.single_latent import Array


def tied_loss(t: ArrayLike, p_first: float, p_both: float, l1_coefficient: float = 0.0, norm: float = 1.0) -> Array:
    """Expected loss of the tied latent at mixtures t in [0, 1], of the shape of t.

    It sees f0 alone with probability ``p_first`` and both features with ``p_both``; ``norm`` is the exponent r of ``λ a^r``.

    >>> tied_loss([0.0, 0.5], 0.3, 0.1)
    array([0.1 , 0.15])
    """
    if min(p_first, p_both) < 0 or p_first + p_both > 1:
        raise UserError(f"p_first, p_both: must be probabilities with a sum of at most 1, got {p_first}, {p_both}")
    if norm <= 0:
        raise UserError(f"norm: must be above 0, got {norm}")
    mixture = np.asarray(t, dtype=np.float64)
    length = np.hypot(1 - mixture, mixture)
    alone, both = (1 - mixture) / length, 1 / length
    error = p_first * (1 - alone**2) + p_both * (2 - both**2)
    return np.asarray(error + l1_coefficient * (p_first * alone**norm + p_both * both**norm))


def best_mixture(p_first: float, p_both: float, l1_coefficient: float = 0.0, norm: float = 1.0) -> float:
    """The t in [0, 1] of least loss: from ``tan 2θ = 2 q / p`` without a penalty, by search from a grid with one.

    >>> round(best_mixture(0.3, 0.1), 4), best_mixture(0.3, 0.0)
    (0.2324, 0.0)
    """
    if l1_coefficient == 0:
        angle = np.arctan2(2 * p_both, p_first) / 2
        return float(np.sin(angle) / (np.sin(angle) + np.cos(angle)))

    def loss(t: float) -> float:
        return float(tied_loss(t, p_first, p_both, l1_coefficient, norm))

    grid = np.linspace(0, 1, 201)
    start = int(tied_loss(grid, p_first, p_both, l1_coefficient, norm).argmin())
    low, high = float(grid[max(0, start - 1)]), float(grid[min(200, start + 1)])
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-10})
    return min((low, high, float(found.x)), key=loss)


def hedging_lowers_loss(p_both: float, l1_coefficient: float = 0.0, norm: float = 1.0) -> bool:
    """Whether the loss falls as the latent at f0 tilts toward f1: ``p_both > 0`` and ``λ r < 2`` (see the module)."""
    return p_both > 0 and l1_coefficient * norm < 2
