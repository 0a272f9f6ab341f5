import numpy as np
import pytest
import torch

from hedgelab.data.toy import ConditionalFiring, CorrelatedPair, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.protocols.phase import Axis, Cell, Target, closed_forms, features_as_x, train_and_measure
from hedgelab.protocols.study import Bench
from hedgelab.saes import Initialization, MatryoshkaSAE, VanillaSAE
from hedgelab.theory import Population, minima

STEPS = 600


def toy(given, otherwise):
    return ToyDataModule(ConditionalFiring([0.25, {"f0": given, "not f0": otherwise}]), d_in=2, sampling="population", seed=0)


def sae(data, seed, l1=1e-3, d_sae=1):
    init = Initialization(at_features=True, noise=0.1, seed=seed)
    adam = lambda parameters: torch.optim.Adam(parameters, lr=2e-2)  # noqa: E731
    decay = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)  # noqa: E731
    made = VanillaSAE(2, d_sae, l1_coefficient=l1, init=init, optimizer=adam, lr_scheduler=decay)
    made.initialize(data.batch("train", 0), data.feature_directions)
    return made


def test_a_diagram_agrees_with_its_theory():
    pairs = [(0.2, 0.0), (0.2, 0.1), (0.2, 0.2), (0.05, 0.2)]
    cells = [Cell(data, [sae(data, seed) for seed in range(2)]) for data in (toy(*pair) for pair in pairs)]
    bench = Bench()
    measured = train_and_measure(bench, cells, STEPS, ["hedging", "encoder", "loss_gap", "mcc", "absorption"], Target())
    assert bench.seconds > 0
    theory = closed_forms(cells, measured["hedging"], Target())
    assert np.nanmax(theory["distance_to_nearest_minimum"]) < 1e-3
    best = (np.arange(len(cells)), measured["loss"].argmin(1))
    hedging, encoder, gap, mcc = (measured[name][best] for name in ("hedging", "encoder", "loss_gap", "mcc"))
    assert hedging[0] == pytest.approx(0.2434, abs=1e-3)
    assert hedging[2] == pytest.approx(0, abs=1e-3)
    assert hedging[3] < -0.05
    assert (np.sign(encoder)[[0, 1, 3]] == [1, 1, -1]).all()
    assert gap[2] == pytest.approx(0, abs=1e-6)
    assert (gap[[0, 1, 3]] > 1e-4).all()
    np.testing.assert_allclose(mcc, np.sqrt(1 - hedging**2), atol=1e-4)


def test_absorption_of_the_papers_toy():
    data = toy(0.2, 0.0)
    cells = [Cell(data, [sae(data, 0, l1=0.1, d_sae=2)])]
    measured = train_and_measure(Bench(), cells, STEPS, ["absorption", "encoder"], Target())
    assert measured["absorption"][0, 0] == pytest.approx(1.0, abs=0.02)
    assert measured["encoder"][0, 0] < -0.1


def test_theory_names_the_minimum_that_each_sae_is_in():
    data = toy(0.05, 0.2)
    population = Population.from_batch(features_as_x(data.batch("train", 0)))
    found = minima(population, 1e-3)
    assert len(found) > 1
    components = np.array([one.direction[1] * np.sign(one.direction[0]) for one in found])
    cells = [Cell(data, [sae(data, 0)] * len(found))]
    theory = closed_forms(cells, components[None] + 1e-4, Target())
    np.testing.assert_allclose(theory["nearest_minimum"][0], components)
    np.testing.assert_allclose(theory["distance_to_nearest_minimum"][0], 1e-4)
    depth = theory["nearest_minimum_above_deepest"][0]
    assert depth[0] < 1e-6 < depth[1:].min()
    np.testing.assert_allclose(depth, [one.loss - found[0].loss for one in found])


def test_widths_side_by_side_measure_as_alone():
    data = toy(0.3, 0.1)
    both = [sae(data, 0), sae(data, 0, d_sae=2)]
    quantities = ["hedging", "impurity", "mcc"]
    together = train_and_measure(Bench(), [Cell(data, [one]) for one in both], 50, quantities, Target())
    for i, one in enumerate(both):
        alone = train_and_measure(Bench(), [Cell(data, [one])], 50, quantities, Target())
        for name in (*quantities, "loss"):
            assert together[name][i, 0] == pytest.approx(alone[name][0, 0], abs=1e-5)
    assert together["impurity"][0, 0] == pytest.approx(abs(together["hedging"][0, 0]), abs=1e-5)


def test_theory_refuses_what_it_does_not_know():
    data = toy(0.2, 0.1)
    wide = Cell(data, [sae(data, 0, d_sae=2)])
    with pytest.raises(UserError, match="d_sae: 1"):
        closed_forms([wide], np.zeros((1, 1)), Target())
    levels = MatryoshkaSAE(2, lambda d: VanillaSAE(d, 2, l1_coefficient=0.1), levels=[1, 2])
    with pytest.raises(UserError, match="VanillaSAE"):
        closed_forms([Cell(data, [levels])], np.zeros((1, 1)), Target())


def test_axes():
    np.testing.assert_allclose(Axis("data.a", 1e-3, 1e-1, 3, "λ", logarithmic=True).values(), [1e-3, 1e-2, 1e-1])
    for arguments, named in (((0, 1, 1), "points"), ((1, 0, 2), "high"), ((0, 1, 2), "low")):
        with pytest.raises(UserError, match=f"axes.{named}"):
            Axis("data.a", *arguments, "a", logarithmic=named == "low")


def test_correlated_pair_has_its_rates_and_correlation():
    for correlation in (-0.2, 0.0, 0.5):
        states, p = CorrelatedPair([0.25, 0.2], correlation).enumerate()
        z = states.double()
        mean = p @ z
        covariance = (z - mean).T @ ((z - mean) * p[:, None])
        torch.testing.assert_close(mean, torch.tensor([0.25, 0.2], dtype=torch.float64))
        found = covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()
        assert float(found) == pytest.approx(correlation, abs=1e-12)
    with pytest.raises(UserError, match=r"correlation: .* between -0.2887 and 0.866"):
        CorrelatedPair([0.25, 0.2], 0.95)
