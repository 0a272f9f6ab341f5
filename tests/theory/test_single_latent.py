"""The closed forms of the single latent against population training, and against each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgelab.batch import Batch
from hedgelab.data.toy import ConditionalFiring, IndependentFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.saes import Initialization, VanillaSAE
from hedgelab.theory import Population, hedging_pull, minima, minimise, minimum, pair_component, principal_component

PAIRS = {
    "independent": ((0.25, 0.2, 0.2), 0.0),
    "hierarchical": ((0.25, 0.2, 0.0), 0.2434),
    "correlated": ((0.25, 0.2, 0.1), 0.2219),
}


def active(population, *states):
    """The active set of the given states, such as (1, 0)."""
    return np.array([tuple(state) in states for state in population.states.astype(int).tolist() for state in [tuple(state)]])


def trained(pair, l1, start, d_in=2):
    rate, given, otherwise = pair
    firing = ConditionalFiring([rate, {"f0": given, "not f0": otherwise}])
    data = ToyDataModule(firing, d_in=d_in, sampling="population", dtype="float64", seed=0)
    sae = VanillaSAE(d_in, 1, l1_coefficient=l1, init=Initialization(at_features=True)).double()
    batch = data.batch("train", 0)
    sae.initialize(batch, data.feature_directions)
    with torch.no_grad():
        sae.W_enc += data.feature_directions.T @ torch.tensor(start, dtype=torch.float64)[:, None]
        sae.W_dec += torch.tensor(start, dtype=torch.float64) @ data.feature_directions
    return (
        minimise(sae, batch, descent_steps=300, learning_rate=3e-3),
        (sae.folded().W_dec @ data.feature_directions.T)[0].numpy(),
        sae,
        data,
    )


@pytest.mark.parametrize("name", PAIRS)
def test_principal_component_gives_the_papers_numbers(name):
    pair, component = PAIRS[name]
    direction, _ = principal_component(Population.of_pair(*pair))
    assert direction[1] == pytest.approx(component, abs=5e-5)
    assert pair_component(*pair) == pytest.approx(direction[1], abs=1e-12)


def test_correlated_toy_has_its_two_minima():
    population = Population.of_pair(0.25, 0.2, 0.1)
    linear = minimum(population, active(population, (1, 1), (1, 0), (0, 1)), 1e-3)
    gated = minimum(population, active(population, (1, 1), (1, 0)), 1e-3)
    assert (linear.direction[1], linear.loss) == (pytest.approx(0.2215, abs=1e-4), pytest.approx(0.10538, abs=1e-5))
    assert (gated.direction[1], gated.loss) == (pytest.approx(0.1257, abs=1e-4), pytest.approx(0.10725, abs=1e-5))
    assert minima(population, 1e-3)[0].loss == linear.loss


def test_anti_correlated_toy_has_its_two_minima():
    population = Population.of_pair(0.25, 0.1, 0.2)
    linear = minimum(population, active(population, (1, 1), (1, 0), (0, 0)), 2e-2)
    gated = minimum(population, active(population, (1, 1), (1, 0)), 2e-2)
    assert (linear.direction[1], linear.loss) == (pytest.approx(-0.2235, abs=1e-4), pytest.approx(0.14635, abs=1e-5))
    assert (gated.direction[1], gated.loss) == (pytest.approx(-0.1129, abs=1e-4), pytest.approx(0.14724, abs=1e-5))


@pytest.mark.parametrize(
    ("pair", "l1"),
    [
        ((0.25, 0.2, 0.2), 1e-3),
        ((0.25, 0.2, 0.0), 1e-3),
        ((0.25, 0.2, 0.1), 1e-1),
        ((0.25, 0.1, 0.2), 2e-2),
        ((0.4, 0.7, 0.3), 0.2),
    ],
)
@pytest.mark.parametrize("start", [(0.0, 0.0), (0.2, -0.5)])
def test_population_training_ends_in_a_closed_form(pair, l1, start):
    found, direction, sae, data = trained(pair, l1, start)
    nearest = min(minima(Population.of_pair(*pair), l1), key=lambda one: abs(one.loss - found.loss))
    assert found.loss == pytest.approx(nearest.loss, abs=1e-9)
    np.testing.assert_allclose(direction, nearest.direction, atol=1e-4)
    np.testing.assert_allclose((sae.b_dec @ data.feature_directions.T).detach(), nearest.b_dec, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(rate=st.floats(0.05, 0.6), given=st.floats(0.0, 1.0), otherwise=st.floats(0.0, 1.0), l1=st.floats(1e-3, 0.3))
def test_a_minimum_is_stationary_in_the_loss_itself(rate, given, otherwise, l1):
    """Independent check: write a closed form into the loss, wiggle everything, and nothing gets better."""
    population = Population.of_pair(rate, given, otherwise)
    x, p = population.states, population.probabilities
    rng = np.random.default_rng(0)
    for one in minima(population, l1)[:3]:

        def loss(direction, b, a, one=one):
            error = x - b - a[:, None] * direction
            return float(p @ (error**2).sum(1) + l1 * p @ a * np.linalg.norm(direction))

        assert loss(one.direction, one.b_dec, one.activations) == pytest.approx(one.loss, abs=1e-10)
        shift, split = x - p[one.active] @ x[one.active] / p[one.active].sum(), one.active
        for _ in range(20):
            wiggle = 1e-4 * rng.standard_normal((4, 2))
            a = np.where(split, one.activations + wiggle[3, 0] + shift @ wiggle[2], 0)
            if (a < 0).any():
                continue
            moved = one.direction + wiggle[0]
            assert loss(moved / np.linalg.norm(moved), one.b_dec + wiggle[1], a) >= one.loss - 1e-11


@settings(max_examples=40, deadline=None)
@given(rate=st.floats(0.05, 0.95), given=st.floats(0.0, 1.0), otherwise=st.floats(0.0, 1.0))
def test_no_latent_beats_the_principal_component(rate, given, otherwise):
    population = Population.of_pair(rate, given, otherwise)
    _, loss = principal_component(population)
    found = minima(population)
    assert all(one.loss >= loss - 1e-9 for one in found)
    if found:
        assert found[0].loss == pytest.approx(loss, abs=1e-9)


def test_more_features_than_two():
    data = ToyDataModule(IndependentFiring([0.3, 0.2, 0.1]), d_in=3, sampling="population", dtype="float64")
    batch = data.batch("train", 0)
    population = Population.from_batch(Batch(batch.features, None, batch.weight))
    direction, loss = principal_component(population)
    np.testing.assert_allclose(direction, [1, 0, 0], atol=1e-12)
    assert loss == pytest.approx(0.16 + 0.09)
    deepest = minima(population, 1e-4)[0]
    np.testing.assert_allclose(deepest.direction, [1, 0, 0], atol=1e-3)
    np.testing.assert_allclose(deepest.b_dec[1:], [0.2, 0.1], atol=1e-3)


def test_pull_has_the_sign_of_the_covariance_until_the_latent_dies():
    for with_f0, without_f0, sign in ((0.2, 0.1, 1), (0.1, 0.2, -1), (0.2, 0.2, 0)):
        population = Population.of_pair(0.25, with_f0, without_f0)
        gated = active(population, (1, 1), (1, 0))
        assert np.sign(round(hedging_pull(population, gated, 0, 1), 12)) == sign
        assert hedging_pull(population, gated, 0, 1, 2 * 0.75) == pytest.approx(0, abs=1e-12)
    population = Population.of_pair(0.25, 0.2, 0.1)
    linear = active(population, (1, 1), (1, 0), (0, 1))
    assert hedging_pull(population, linear, 0, 1, 0.1) == pytest.approx(2 * 0.01875 - 0.1 * 0.125)


def test_mistakes():
    with pytest.raises(UserError, match="rate: must be a probability"):
        Population.of_pair(1.2, 0.1, 0.1)
    with pytest.raises(UserError, match="population"):
        Population.from_batch(Batch(torch.zeros(2, 2)))
    with pytest.raises(UserError, match="at most 12"):
        minima(Population(np.eye(13), np.full(13, 1 / 13)))
