"""Firing of correlated Gaussians: rates, correlations and hierarchies against closed forms and a plain dense sampler."""

import math

import pytest
import torch
from scipy.stats import multivariate_normal, norm

from hedgelab.data.toy import CopulaFiring, Forest, GaussianFiring, Hierarchy, Linear, LowRankCorrelation, Zipf
from hedgelab.data.toy.firing import Magnitudes
from hedgelab.errors import UserError
from hedgelab.seeding import generator

COUNT = 200_000


def ones(n: int, std: float = 0.0) -> Magnitudes:
    return Magnitudes(torch.ones(n), torch.full((n,), std))


def frequencies(firing: GaussianFiring, count: int, seed: int) -> torch.Tensor:
    codes = firing._draw(count, generator(seed), ones(firing.n))
    return codes.firing_counts().double() / count


def assert_close(seen: torch.Tensor, expected: torch.Tensor, count: int, slack: float = 0.0) -> None:
    """Within 5.5 standard errors of a binomial share."""
    error = (seen - expected).abs()
    assert bool((error <= 5.5 * (expected * (1 - expected) / count).sqrt() + 2 / count + slack * expected).all())


def dense(firing: GaussianFiring, count: int, source: torch.Generator) -> torch.Tensor:
    """The law as it is written, in float64: every Gaussian of every example, then the hierarchy feature by feature."""
    eta = torch.randn(count, firing.loadings.shape[1], generator=source, dtype=torch.float64)
    eps = torch.randn(count, firing.n, generator=source, dtype=torch.float64)
    g = eta @ firing.loadings.T + eps * (1 - firing.loadings.square().sum(1)).sqrt()
    fires = g > -torch.special.ndtri(firing.candidates)
    if firing.hierarchy is None:
        return fires
    for level in firing.hierarchy.levels:
        for i in level.tolist():
            if (parent := int(firing.hierarchy.parent[i])) >= 0:
                fires[:, i] &= fires[:, parent]
        for group in set(firing.hierarchy.group[level].tolist()) - {-1}:
            members = level[firing.hierarchy.group[level] == group]
            lots = torch.rand(count, len(members), generator=source).masked_fill(~fires[:, members], -1)
            fires[:, members] &= torch.nn.functional.one_hot(lots.argmax(1), len(members)).bool()
    return fires


def test_rates_without_hierarchy_are_exact():
    firing = CopulaFiring(1000, Zipf(0.8, total=5.0), LowRankCorrelation(3, strength=0.5))
    assert len(firing._rare) > 100
    assert len(firing._frequent) > 100
    assert_close(frequencies(firing, 50_000, 0), firing.rates(), 50_000)
    assert float(firing.rates().sum()) == pytest.approx(5.0)


def test_joint_firing_is_the_bivariate_normal_tail():
    """P(both fire) = P(g0 > 0, g1 > 0) = 1/4 + asin(rho) / (2 pi) at rates of one half (Sheppard 1899)."""
    rho = 0.9 * 0.8
    for sign in (1, -1):
        firing = GaussianFiring(torch.tensor([0.5, 0.5]), torch.tensor([[0.9], [sign * 0.8]]))
        both = float(firing.sample(COUNT, generator(1)).all(1).double().mean())
        assert both == pytest.approx(0.25 + math.asin(sign * rho) / (2 * math.pi), abs=5 * math.sqrt(0.25 / COUNT))


@pytest.mark.parametrize("loading", [0.3, 0.9, -0.9])
def test_rare_features_fire_together_as_bivariate_normals_do(loading):
    """Rates of .3 % and .4 % are drawn by proposals; what few draws could miss is their firing together."""
    rates = torch.tensor([0.003, 0.004], dtype=torch.float64)
    firing = GaussianFiring(rates, torch.tensor([[0.9], [loading]]))
    assert len(firing._rare) == 2
    limits = norm.ppf(rates.numpy())
    joint = multivariate_normal([0, 0], [[1, 0.9 * loading], [0.9 * loading, 1]]).cdf(limits)
    count = 1_000_000
    both = firing.sample(count, generator(2)).all(1).double().mean()
    assert_close(both, torch.tensor(joint, dtype=torch.float64), count)


def test_sparse_draws_have_the_law_of_dense_ones():
    """All patterns of five rare, correlated features: a chi-square test of two samples, at one chance in 10^5."""
    loadings = torch.randn(5, 2, generator=generator(3)).div(1.8).clamp(-0.65, 0.65)
    firing = GaussianFiring(torch.tensor([0.0039, 0.0037, 0.0034, 0.003, 0.002]), loadings)
    assert len(firing._rare) == 5
    count = 1_000_000
    bits = 2 ** torch.arange(5)
    seen, expected = (
        torch.bincount((states * bits).sum(1), minlength=32).double()
        for states in (firing.sample(count, generator(4)), dense(firing, count, generator(5)))
    )
    often = seen + expected > 20
    assert int(often.sum()) > 7
    chi_square = ((seen - expected).square() / (seen + expected))[often].sum()
    degrees = int(often.sum()) - 1
    assert float(chi_square) < degrees + 6 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("correlated", [False, True])
def test_a_forest_has_the_rates_and_structure_of_its_law(correlated):
    correlation = LowRankCorrelation(2, scale=0.4) if correlated else None
    firing = CopulaFiring(50, Zipf(0.5, 0.4, 0.01), correlation, Forest(3, 3, 2))
    source = generator(6)
    states = firing.sample(COUNT, source)
    parent = firing.parents
    assert parent.tolist() == Forest(3, 3, 2).over(50).parent.tolist()
    for i in (parent >= 0).nonzero().flatten().tolist():
        assert not bool((states[:, i] & ~states[:, parent[i]]).any())
        siblings = parent == parent[i]
        assert int(states[:, siblings].sum(1).max()) == 1
    seen = states.double().mean(0)
    assert_close(seen, firing.rates(), COUNT, slack=0.06 if correlated else 0.0)
    again = dense(firing, COUNT, source).double().mean(0)
    assert_close(seen, again, COUNT // 2)


def test_compensation_brings_rates_near_those_asked_for():
    """Siblings whose rates leave their parent room: the formula takes 1 / (1 + E K) for E[1 / (1 + K)], a little less."""
    wanted = torch.tensor([0.4, 0.3, *[0.02] * 6, *[0.001] * 12], dtype=torch.float64)
    hierarchy = Forest(2, 3, 1).over(20)
    plain, raised = hierarchy.effective(wanted), hierarchy.effective(hierarchy.compensated(wanted))
    children = slice(2, 8)
    ratio = raised[children] / wanted[children]
    assert float(ratio.min()) > 1
    assert float(ratio.max()) < 1.06
    assert float((plain[children] / wanted[children]).max()) < 0.45


def test_a_child_is_scaled_by_its_parents_final_activation():
    """A chain 0 - 1 - 2 that always fires: activation = own draw times all ancestors' draws over their means."""
    hierarchy = Hierarchy(torch.tensor([-1, 0, 1]), torch.full((3,), -1), torch.tensor([False, True, True]))
    firing = GaussianFiring(torch.ones(3), None, hierarchy)
    mean, std = torch.tensor([2.0, 3.0, 5.0]), torch.tensor([0.2, 0.0, 0.5])
    x = firing.activations(100_000, generator(7), Magnitudes(mean, std)).double()
    assert torch.allclose(x[:, 1], 3 * x[:, 0] / 2)
    own = x[:, 2] / (x[:, 1] / 3)
    assert float(own.mean()) == pytest.approx(5.0, abs=0.01)
    assert float(own.std()) == pytest.approx(0.5, abs=0.01)
    assert abs(float(torch.corrcoef(torch.stack([own, x[:, 0]]))[0, 1])) < 0.02


def test_what_has_no_magnitude_does_not_fire():
    """A parent of magnitude relu(noise) is silent half of the time, and its child with it; rivals of magnitude 0 do not win."""
    hierarchy = Hierarchy(torch.tensor([-1, 0, 0]), torch.tensor([-1, 0, 0]), torch.zeros(3, dtype=torch.bool))
    firing = GaussianFiring(torch.ones(3), None, hierarchy)
    magnitudes = Magnitudes(torch.tensor([1e-9, 1.0, 1e-9]), torch.tensor([1.0, 0.0, 1.0]))
    x = firing.activations(COUNT, generator(8), magnitudes)
    fires = (x > 0).double().mean(0)
    assert_close(fires, torch.tensor([0.5, 0.5 * 0.75, 0.5 * 0.25]).double(), COUNT)
    assert bool(((x[:, 1:] > 0).sum(1) == (x[:, 0] > 0)).all())


def test_many_features_are_sparse_and_the_same_again():
    def draw(seed: int = 9, **options) -> torch.Tensor:
        firing = CopulaFiring(2000, Zipf(total=20.0), LowRankCorrelation(8, strength=0.2), Forest(100, 15), **options)
        codes = firing.activations(1500, generator(seed), ones(2000, 0.1))
        assert codes.batch_size == 1500
        assert bool((codes.values > 0).all())
        return codes.to_dense()

    first = draw()
    assert torch.equal(first, draw())
    assert not torch.equal(first, draw(seed=10))
    assert not torch.equal(first, draw(structure_seed=1))
    assert int((first[1024:] > 0).sum()) > 0


def test_laws_of_loadings():
    by_scale = LowRankCorrelation(25, scale=0.1).loadings(4000, 0)
    assert float(by_scale.std()) == pytest.approx(0.1, abs=0.002)
    assert float(LowRankCorrelation(25, scale=1.0).loadings(50, 0).square().sum(1).max()) == pytest.approx(0.99)
    by_strength = LowRankCorrelation(8, strength=0.2).loadings(50, 0).square().sum(1)
    assert by_strength.tolist() == pytest.approx([0.2] * 50)
    assert not bool(LowRankCorrelation(8, strength=0.0).loadings(50, 0).any())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CopulaFiring(0, Zipf()), r"n: expected a whole number of at least 1, got 0"),
        (lambda: CopulaFiring(True, Zipf()), r"n: expected a whole number of at least 1, got True"),
        (lambda: CopulaFiring(2, Zipf(), structure_seed=0.5), r"structure_seed: expected a whole number"),
        (lambda: CopulaFiring(2, Linear(0, 1)), r"rates: must be above 0 and at most 1 for every feature, got 0"),
        (lambda: CopulaFiring(2, Linear(2, 1)), r"rates: must be above 0 and at most 1 for every feature, got 2"),
        (lambda: CopulaFiring(14, Zipf(), hierarchy=Forest(5, 2)), r"hierarchy: the trees hold 15 features"),
        (lambda: LowRankCorrelation(True, scale=0.1), r"correlation\.rank: expected a whole number of at least 1"),
        (lambda: LowRankCorrelation(4), r"correlation\.scale: give either it or strength"),
        (lambda: LowRankCorrelation(4, 0.1, 0.1), r"correlation\.scale: give either it or strength"),
        (lambda: LowRankCorrelation(4, strength=1.0), r"correlation\.strength: must be at least 0 and below 1"),
        (lambda: LowRankCorrelation(4, scale=-1.0), r"correlation\.scale: must not be negative"),
        (lambda: GaussianFiring(torch.ones(2), torch.ones(2, 1)), r"correlation: rows of loadings must have norms below"),
        (lambda: GaussianFiring(torch.tensor([1.5])), r"rates: must be probabilities between 0 and 1"),
    ],
)
def test_impossible_values_are_refused(build, message):
    with pytest.raises(UserError, match=r"^data\.firing\." + message):
        build()
