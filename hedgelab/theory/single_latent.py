r"""The single-latent SAE on a finite population: every minimum in closed form.

Setting: one ReLU latent with unit decoder direction ``d``, decoder bias ``b`` and penalty ``λ · E[a]`` on states ``x_s`` of
probability ``p_s``. Call *active set* ``A`` the states on which the latent fires; ``P`` is its probability and
``Q = 1 - P`` that of the silent rest. With ``m_A, C_A`` the mean and covariance given ``A``, ``m_0, C_0`` those given
silence, ``C`` the covariance of everything, and ``Δ = m_A - m_0``, the loss is

    L = Σ_{silent} p_s ‖x_s - b‖² + Σ_A p_s (‖x_s - b - a_s d‖² + λ a_s).

*Shape.* On ``A`` the activation is affine in x: ``a_s = ā + w·(x_s - m_A)``, with ``ā`` (through ``b_enc``) and ``w`` free.
Only ``P (w·C_A w - 2 d·C_A w)`` depends on w, so ``w = d`` on the span of the active states: the encoder reads what the
decoder writes. (Off that span w is free, which can keep other states silent.) *Bias.* ``b`` serves silent and active states
alike: ``∂L/∂b = 0`` gives ``b = m - P ā d``. *Size.* With that b, the means cost ``P Q ‖Δ - ā d‖² + P λ ā``, least at ``ā =
d·Δ - λ / (2Q)``: the usual shrinkage, divided by the rate of silence. *Direction.* What is left of the loss is

    L = tr C - P [ d·M_A d - λ d·Δ + λ² / (4Q) ],    M_A = C_A + Q Δ Δᵀ,    P M_A = C - Q C_0,

so d is a maximum of ``d·M_A d - λ d·Δ`` on the unit sphere. For λ → 0 it is the top eigenvector of ``C - Q C_0``: *the latent
finds the principal component of the activations once the scatter among the states on which it is silent is taken out*. For
λ > 0 stationarity, ``(M_A - ν) d = (λ/2) Δ``, is one secular equation in the multiplier ν, whose root nearest the top
eigenvalue from below is the maximum with ``d·Δ > 0``. It is a minimum of the SAE's loss where ``a_s > 0`` on all of A and some
affine function equal to it there is at most 0 on every other state (a linear feasibility problem). Each such A is a minimum of
its own: the correlated toy has two, the linear regime below and the one that is silent unless feature 0 fires.

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

from itertools import combinations
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog, minimize_scalar

from hedgelab.batch import Batch
from hedgelab.errors import UserError

Array = NDArray[np.float64]
_MOST_STATES, _MOST_ITERATIONS, _TOLERANCE = 12, 200, 1e-9


class Population(NamedTuple):
    """A population: finitely many activations with their probabilities, on which every expectation is exact."""

    states: Array  # activations, [s, d_in]
    probabilities: Array  # theirs, [s], all positive, summing to 1

    @classmethod
    def from_batch(cls, batch: Batch) -> Self:
        """The population behind a weighted batch; states of probability 0 are left out."""
        if batch.weight is None:
            raise UserError("data.sampling: closed forms need the whole population, set it to 'population'")
        possible = batch.weight > 0
        weight = batch.weight[possible].double()
        return cls(batch.x[possible].double().numpy(), (weight / weight.sum()).numpy())

    @classmethod
    def of_pair(cls, rate: float, given: float, otherwise: float) -> Self:
        """Two orthonormal features of magnitude 1 in the plane, by ``P(f0)``, ``P(f1 | f0)`` and ``P(f1 | not f0)``.

        >>> Population.of_pair(0.25, 0.2, 0.0).probabilities  # both, f0 alone, neither
        array([0.05, 0.2 , 0.75])
        """
        for name, value in (("rate", rate), ("given", given), ("otherwise", otherwise)):
            if not 0 <= value <= 1:
                raise UserError(f"{name}: must be a probability between 0 and 1, got {value}")
        second = np.array([[given, 1 - given], [otherwise, 1 - otherwise]])
        probabilities = (np.array([[rate], [1 - rate]]) * second).ravel()
        states = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        return cls(states[probabilities > 0], probabilities[probabilities > 0])


def scatter(states: Array, probabilities: Array) -> Array:
    """Covariance of states whose probabilities need not sum to 1, times their sum, ``[d_in, d_in]``."""
    deviations = states - probabilities @ states / probabilities.sum()
    return np.asarray(deviations.T @ (probabilities[:, None] * deviations))


class SingleLatentMinimum(NamedTuple):
    """A minimum of the single-latent SAE's loss."""

    active: np.ndarray  # states on which the latent fires, [s] bool
    direction: Array  # unit decoder direction, [d_in]
    b_dec: Array  # decoder bias, [d_in]
    activations: Array  # activation of each state, [s]
    loss: float  # expected squared error plus penalty


def split_at(population: Population, active: np.ndarray) -> tuple[float, float, Array, Array, Array]:
    """``P``, ``Q``, ``m_A``, ``Δ`` and ``M_A`` of an active set ``[s]`` (bool) that is neither empty nor everything."""
    states, p = population
    rate, silence = float(p[active].sum()), float(p[~active].sum())
    mean = p[active] @ states[active] / rate
    shift = mean - p[~active] @ states[~active] / silence
    return rate, silence, mean, shift, scatter(states[active], p[active]) / rate + silence * np.outer(shift, shift)


def principal_component(population: Population) -> tuple[Array, float]:
    """The best unit direction of a latent in its linear regime, λ → 0, and the loss left: ``tr C`` less its top eigenvalue.

    >>> direction, loss = principal_component(Population.of_pair(0.25, 0.2, 0.0))
    >>> direction.round(4), round(loss, 4)
    (array([0.9699, 0.2434]), 0.0381)
    """
    values, vectors = np.linalg.eigh(scatter(*population))
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

    Active are neither none nor all of the states; λ = 0 stands for the limit λ → 0, in which a state may sit on the threshold.
    """
    rate, silence, mean, shift, matrix = split_at(population, active)
    direction = sphere_maximum(matrix, l1_coefficient / 2 * shift)
    if direction is None:
        return None
    size = float(direction @ shift) - l1_coefficient / (2 * silence)
    pre = size + (population.states - mean) @ direction
    if (pre[active] < -_TOLERANCE).any() or not _can_be_silenced(population.states, active, pre):
        return None
    gain = direction @ matrix @ direction - l1_coefficient * direction @ shift
    loss = np.trace(scatter(*population)) - rate * (gain + l1_coefficient**2 / (4 * silence))
    b_dec = population.probabilities @ population.states - rate * size * direction
    return SingleLatentMinimum(active, direction, b_dec, np.where(active, pre, 0.0), float(loss))


def minima(population: Population, l1_coefficient: float = 0.0) -> list[SingleLatentMinimum]:
    """All minima with a live latent, deepest first.

    >>> round(float(minima(Population.of_pair(0.25, 0.2, 0.1), 1e-3)[0].direction[1]), 4)
    0.2215
    """
    count = len(population.probabilities)
    if count > _MOST_STATES:
        raise UserError(f"population: {count} states have too many active sets, at most {_MOST_STATES} are possible")
    sets = (np.isin(range(count), some) for size in range(1, count) for some in combinations(range(count), size))
    found = (minimum(population, active, l1_coefficient) for active in sets)
    return sorted((one for one in found if one is not None), key=lambda one: one.loss)


def hedging_pull(population: Population, active: np.ndarray, own: int, other: int, l1_coefficient: float = 0.0) -> float:
    """How fast the loss falls as a clean latent of feature i = ``own`` tilts toward j = ``other``, per radian.

    ``P (2 M_ij - λ Δ_j)``: where it is positive, positive hedging lowers the loss. The coordinates of the population must be
    the features; the latent fires on the states ``active``, ``[s]`` bool.
    """
    rate, _, _, shift, matrix = split_at(population, active)
    return float(rate * (2 * matrix[own, other] - l1_coefficient * shift[other]))


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


def tied_loss(t: ArrayLike, p_first: float, p_both: float, l1_coefficient: float = 0.0, norm: float = 1.0) -> Array:
    """Expected loss of a *tied* latent without biases at mixtures t in [0, 1], of the shape of t (the paper's theory figure).

    It encodes and decodes along the unit vector ``(cos θ, sin θ)`` in the direction of ``(1 - t) f0 + t f1`` (orthonormal
    features), sees f0 alone with probability p (``p_first``) and both with q (``p_both``); its activation a costs ``λ a^r``
    (``norm`` r)::

        L(θ) = p (1 - cos²θ) + q (2 - (cos θ + sin θ)²) + λ (p cos^r θ + q (cos θ + sin θ)^r)

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
    """The t in [0, 1] of least :func:`tied_loss`: from ``tan 2θ = 2 q / p`` without a penalty, by search from a grid with one.

    For every ``q > 0`` the latent mixes f1 in, more the more often both fire: the squared error alone asks for hedging.

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
    """Whether :func:`tied_loss` falls as the latent at f0 tilts toward f1: ``dL/dθ(0) = q (λ r - 2)`` is below 0.

    No sensible penalty prevents it: at λ = 2 (r = 1) the activation on f0 alone, which saves an error of 1, costs twice that.
    """
    return p_both > 0 and l1_coefficient * norm < 2
