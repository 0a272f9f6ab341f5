r"""The single-latent SAE on a finite population: every minimum in closed form.

Setting: one ReLU latent with unit decoder direction ``d``, decoder bias ``b`` and penalty ``λ · E[a]`` on states ``x_s`` of
probability ``p_s``. Call *active set* ``A`` the states on which the latent fires; ``P`` is its probability and
``Q = 1 - P`` that of the silent rest. With ``m_A, C_A`` the mean and covariance given ``A``, ``m_0, C_0`` those given
silence, ``C`` the covariance of everything, and ``Δ = m_A - m_0``, the loss is

    L = Σ_{silent} p_s ‖x_s - b‖² + Σ_A p_s (‖x_s - b - a_s d‖² + λ a_s).

*Shape.* On ``A`` the activation is affine in x: ``a_s = ā + w·(x_s - m_A)``, with ``ā`` (through ``b_enc``) and ``w`` free.
Only ``P (w·C_A w - 2 d·C_A w)`` depends on w, so ``w = d`` on the span of the active states: the encoder reads what the
decoder writes. (Off that span w is free; that freedom is what can keep other states silent.)

*Bias.* ``b`` serves silent and active states alike: ``∂L/∂b = 0`` gives ``b = m - P ā d``.

*Size.* With that b, the means cost ``P Q ‖Δ - ā d‖² + P λ ā``, least at ``ā = d·Δ - λ / (2Q)``: the usual shrinkage,
divided by the rate of silence.

*Direction.* What is left of the loss is

    L = tr C - P [ d·M_A d - λ d·Δ + λ² / (4Q) ],    M_A = C_A + Q Δ Δᵀ,    P M_A = C - Q C_0,

so d is a maximum of ``d·M_A d - λ d·Δ`` on the unit sphere. For λ → 0 it is the top eigenvector of ``C - Q C_0``: *the latent
finds the principal component of the activations once the scatter among the states on which it is silent is
taken out*. For λ > 0 stationarity, ``(M_A - ν) d = (λ/2) Δ``, is one secular equation in the multiplier ν, whose root nearest
the top eigenvalue from below is the maximum with ``d·Δ > 0``.

*Validity.* The solution is a minimum of the SAE's loss where ``a_s > 0`` on all of A and some affine function equal to it
there is at most 0 on every other state (a linear feasibility problem). Each such A is a minimum of its own: the SAEs on
the correlated toy have two, the linear regime below and the one that is silent unless feature 0 fires.

*Linear regime.* If one state x* alone is silent then ``C_0 = 0`` and ``P M_A = C``: at λ → 0 the direction is the principal
component of *all* activations, with ``b`` taking the offset. No single latent can do better, whatever its active set:
``L ≥ Σ p_s ‖(1 - ddᵀ)(x_s - b)‖²``, which principal components minimise. So in the limit λ → 0 the global minimum of the
single-latent SAE with bias is PCA; it is reached when x* is the state of least ``d·x``.

*Hedging lowers the loss.* Tilt d from feature 0 (orthonormal features) by an angle toward feature j. At angle 0
``dL = -P (2 M_0j - λ Δ_j)``: positive hedging pays if and only if ``2 M_0j > λ Δ_j``, negative if ``<``; see
:func:`hedging_pull`. On two features both minima above give the *sign of the covariance* for small λ: in the linear regime
the pull is ``2 Cov(f0, f1) - λ P(f1)``; where the latent is silent unless f0 fires it is ``P Δ_1 (2Q - λ)``, zero exactly where
the activation ``ā = 1 - λ/(2Q)`` of a clean latent is zero too: there no L1 penalty cures hedging before it kills the latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.optimize import linprog

from hedgelab.errors import UserError
from hedgelab.theory.population import Array, Population, scatter

_MOST_STATES = 12
_MOST_ITERATIONS = 200
_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class SingleLatentMinimum:
    """A minimum of the single-latent SAE's loss.

    Attributes:
        active: States on which the latent fires, ``[s]`` bool.
        direction: Unit decoder direction, ``[d_in]``.
        b_dec: Decoder bias, ``[d_in]``.
        activations: Activation of each state, ``[s]``.
        loss: Expected squared error plus penalty.
    """

    active: np.ndarray
    direction: Array
    b_dec: Array
    activations: Array
    loss: float


@dataclass(frozen=True, eq=False)
class Split:
    """What the module's derivation needs of an active set A: ``P``, ``Q``, ``m_A``, ``Δ`` and ``M_A``."""

    rate: float
    silence: float
    mean: Array
    shift: Array
    matrix: Array

    @classmethod
    def of(cls, population: Population, active: np.ndarray) -> Split:
        """Split a population; neither part may be empty."""
        states, p = population.states, population.probabilities
        rate, silence = float(p[active].sum()), float(p[~active].sum())
        mean = p[active] @ states[active] / rate
        shift = mean - p[~active] @ states[~active] / silence
        matrix = scatter(states[active], p[active]) / rate + silence * np.outer(shift, shift)
        return cls(rate, silence, mean, shift, matrix)


def principal_component(population: Population) -> tuple[Array, float]:
    """The best direction of a latent in its linear regime as λ → 0, and the loss it leaves: ``tr C`` less the top eigenvalue.

    The unit direction ``[d_in]`` is signed so that its largest coordinate is positive.

    >>> direction, loss = principal_component(Population.of_pair(0.25, 0.2, 0.0))
    >>> direction.round(4), round(loss, 4)
    (array([0.9699, 0.2434]), 0.0381)
    """
    values, vectors = np.linalg.eigh(population.covariance)
    return _toward_its_largest(vectors[:, -1]), float(values[:-1].sum())


def pair_component(rate: float, given: float, otherwise: float) -> float:
    """Feature 1's part in the top principal component of two features: the hedging component in the linear regime, λ → 0.

    With variances ``v0, v1`` and covariance ``c`` the component is ``sin θ``, ``tan 2θ = 2c / (v0 - v1)``. Feature 1 is what
    the latent tracks where ``v1 > v0``. Arguments as in :meth:`Population.of_pair`.

    >>> round(pair_component(0.25, 0.2, 0.0), 4), round(pair_component(0.25, 0.2, 0.1), 4), pair_component(0.25, 0.2, 0.2)
    (0.2434, 0.2219, 0.0)
    """
    second = rate * given + (1 - rate) * otherwise
    covariance, difference = rate * (given - second), rate * (1 - rate) - second * (1 - second)
    if abs(covariance) < 1e-15:
        return float(difference < 0)
    return float(np.sin(np.arctan2(2 * covariance, difference) / 2))


def minimum(population: Population, active: np.ndarray, l1_coefficient: float = 0.0) -> SingleLatentMinimum | None:
    """The minimum whose latent fires exactly on the states ``active``, ``[s]`` bool (see the module); None without one.

    Active are neither none nor all of the states. λ = 0 stands for the limit λ → 0, in which a state may sit on the threshold.
    """
    split = Split.of(population, active)
    direction = sphere_maximum(split.matrix, l1_coefficient / 2 * split.shift)
    if direction is None:
        return None
    size = float(direction @ split.shift) - l1_coefficient / (2 * split.silence)
    pre = size + (population.states - split.mean) @ direction
    if (pre[active] < -_TOLERANCE).any() or not _can_be_silenced(population.states, active, pre):
        return None
    gain = direction @ split.matrix @ direction - l1_coefficient * direction @ split.shift
    loss = np.trace(population.covariance) - split.rate * (gain + l1_coefficient**2 / (4 * split.silence))
    b_dec = population.mean - split.rate * size * direction
    return SingleLatentMinimum(active, direction, b_dec, np.where(active, pre, 0.0), float(loss))


def minima(population: Population, l1_coefficient: float = 0.0) -> list[SingleLatentMinimum]:
    """All minima with a live latent, deepest first.

    >>> round(float(minima(Population.of_pair(0.25, 0.2, 0.1), 1e-3)[0].direction[1]), 4)
    0.2215

    Raises:
        UserError: More states than can be tried (12).
    """
    count = len(population.probabilities)
    if count > _MOST_STATES:
        raise UserError(
            f"population: {count} states have too many active sets, at most {_MOST_STATES} states are possible"
        )
    sets = (np.isin(range(count), some) for size in range(1, count) for some in combinations(range(count), size))
    found = (minimum(population, active, l1_coefficient) for active in sets)
    return sorted((one for one in found if one is not None), key=lambda one: one.loss)


def hedging_pull(
    population: Population, active: np.ndarray, own: int, other: int, l1_coefficient: float = 0.0
) -> float:
    """How fast the loss falls as a clean latent of feature i = ``own`` tilts toward j = ``other``, per radian.

    ``P (2 M_ij - λ Δ_j)``: where it is positive, positive hedging lowers the loss. The coordinates of the population must be
    the features; the latent fires on the states ``active``, ``[s]`` bool.
    """
    split = Split.of(population, active)
    return float(split.rate * (2 * split.matrix[own, other] - l1_coefficient * split.shift[other]))


def sphere_maximum(matrix: Array, pull: Array) -> Array | None:
    """The local maximum ``[d]`` of ``d·M d - 2 g·d`` over unit d with ``g·d > 0``; the top eigenvector for g = 0; None if gone.

    In the eigenbasis of the symmetric M, ``d_i = g_i / (μ_i - ν)`` with ``Σ d_i² = 1``. Of the secular equation's roots the
    maximum on the side of ``g·d > 0`` is the largest one between the two top eigenvalues. ``Σ d_i²`` is convex there and at
    least 1 at ``ν = μ_top - g_top``, so Newton's iteration descends from there to that root, or shows that there is none.
    """
    values, vectors = np.linalg.eigh(matrix)
    if np.linalg.norm(pull) < 1e-14:
        return _toward_its_largest(vectors[:, -1])
    vectors[:, -1] *= 1.0 if vectors[:, -1] @ pull >= 0 else -1.0
    g = vectors.T @ pull
    if g[-1] <= 1e-12 * np.linalg.norm(g):
        return None
    multiplier = values[-1] - g[-1]
    for _ in range(_MOST_ITERATIONS):
        if len(values) > 1 and multiplier <= values[-2]:
            return None
        coordinates = g / (values - multiplier)
        excess = float(coordinates @ coordinates) - 1
        if excess < _TOLERANCE / 100:
            break
        slope = 2 * float(coordinates @ (coordinates / (values - multiplier)))
        if slope <= 0:
            return None
        multiplier -= excess / slope
    return np.asarray(vectors @ coordinates / np.linalg.norm(coordinates))


def _toward_its_largest(direction: Array) -> Array:
    return np.asarray(direction * np.sign(direction[np.abs(direction).argmax()]))


def _can_be_silenced(states: Array, active: np.ndarray, pre: Array) -> bool:
    """Whether an affine function that equals ``pre`` on the active states can be at most 0 on the others."""
    offsets = states - states[active][0]
    _, sizes, rows = np.linalg.svd(offsets[active])
    free = rows[int((sizes > 1e-10).sum()) :]
    rest, wanted = offsets[~active] @ free.T, -pre[~active] + _TOLERANCE
    if not rest.any():
        return bool((wanted >= 0).all())
    if (rest @ -rest.mean(0) < 0).all():  # strictly separated: far enough along this direction all are silent
        return True
    result = linprog(np.zeros(free.shape[0]), A_ub=rest, b_ub=wanted, bounds=(None, None))
    return bool(result.status == 0)
