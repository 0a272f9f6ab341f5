import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgelab.data.toy import (
    ConditionalFiring,
    Cooccurrence,
    CopulaFiring,
    Firing,
    IndependentFiring,
    ModifiedFiring,
    MutualExclusion,
    ParentChild,
    Suppression,
    TreeFiring,
    Zipf,
)
from hedgelab.data.toy.firing import all_patterns, pattern_numbers
from hedgelab.errors import UserError
from hedgelab.seeding import generator

COUNT = 40_000
probability = st.floats(0, 1).filter(lambda p: p == 0 or p > 1e-6)


def assert_samples_match_enumeration(firing: Firing) -> None:
    """Frequencies of all patterns lie within 6 binomial standard deviations of the enumerated probabilities."""
    states, probabilities = firing.enumerate()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)
    assert bool((probabilities > 0).all())
    samples = firing.sample(COUNT, generator(0, "samples"))
    assert samples.dtype == torch.bool
    assert samples.shape == (COUNT, firing.n)
    frequency = torch.bincount(pattern_numbers(samples), minlength=2**firing.n).double() / COUNT
    expected = torch.zeros(2**firing.n, dtype=torch.float64)
    expected[pattern_numbers(states)] = probabilities
    tolerance = 6 * (expected * (1 - expected) / COUNT).sqrt() + 2 / COUNT * (expected > 0)
    assert bool(((frequency - expected).abs() <= tolerance + 1e-9).all())
    rates = firing.rates()
    assert rates is not None
    assert torch.allclose(rates, probabilities @ states.double(), atol=1e-9)


def given_fires(states: torch.Tensor, feature: int, parent: int, fires: bool = True) -> float:
    return float(states[states[:, parent] == fires, feature].float().mean())


def test_patterns_and_their_numbers_are_inverse():
    assert torch.equal(pattern_numbers(all_patterns(5)), torch.arange(32))
    assert all_patterns(3)[6].tolist() == [False, True, True]


def test_independent_probabilities_are_products():
    states, probabilities = IndependentFiring([0.25, 0.2]).enumerate()
    assert states.tolist() == [[False, False], [True, False], [False, True], [True, True]]
    assert probabilities.tolist() == pytest.approx([0.6, 0.2, 0.15, 0.05])
    assert_samples_match_enumeration(IndependentFiring([0.25, 0.2, 0.0, 1.0, 0.5]))


def test_states_of_probability_zero_are_dropped():
    states, probabilities = ConditionalFiring([0.25, {"f0": 0.2, "otherwise": 0}]).enumerate()
    assert states.tolist() == [[False, False], [True, False], [True, True]]
    assert probabilities.tolist() == pytest.approx([0.75, 0.2, 0.05])


def test_correlated_table():
    firing = ConditionalFiring([0.25, {"f0": 0.2, "not f0": 0.1}])
    assert_samples_match_enumeration(firing)
    assert firing.rates().tolist() == pytest.approx([0.25, 0.25 * 0.2 + 0.75 * 0.1])


def test_parent_with_three_children():
    firing = ConditionalFiring([0.25, *({"f0": p, "otherwise": 0} for p in (0.02, 0.15, 0.5))])
    assert_samples_match_enumeration(firing)
    states = firing.sample(COUNT, generator(1))
    assert not bool(states[~states[:, 0], 1:].any())
    assert given_fires(states, 3, 0) == pytest.approx(0.5, abs=5 * math.sqrt(0.25 / 10_000))


def test_table_over_several_parents():
    table = {"f0 and f2": 0.9, "f0 and not f2": 0.4, "not f0": 0.05}
    firing = ConditionalFiring([0.5, 0.3, {"f1": 0.7, "otherwise": 0.2}, table])
    assert_samples_match_enumeration(firing)
    states, probabilities = firing.enumerate()
    for wanted, expected in (((1, 1), 0.9), ((1, 0), 0.4), ((0, 1), 0.05), ((0, 0), 0.05)):
        case = (states[:, 0] == wanted[0]) & (states[:, 2] == wanted[1])
        assert float(probabilities[case & states[:, 3]].sum() / probabilities[case].sum()) == pytest.approx(expected)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_random_tables(data):
    features = [data.draw(probability)]
    for i in range(1, data.draw(st.integers(1, 4))):
        parents = sorted(data.draw(st.sets(st.integers(0, i - 1), min_size=1)))
        cases = {
            " and ".join(f"{'' if fires else 'not '}f{p}" for p, fires in zip(parents, case, strict=True)): None
            for case in all_patterns(len(parents)).tolist()
        }
        features.append({case: data.draw(probability) for case in cases})
    assert_samples_match_enumeration(ConditionalFiring(features))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], r"data\.firing\.features: needs at least one"),
        ([0.5, 1.5], r"data\.firing\.features\[1\]: must be a probability between 0 and 1, got 1\.5"),
        ([math.nan], r"features\[0\]: must be a probability"),
        ([0.5, {"f0": -0.1, "not f0": 0}], r"features\[1\]\['f0'\]: must be a probability"),
        ([0.5, {"f0": 0.1, "otherwise": 2}], r"features\[1\]\['otherwise'\]: must be a probability"),
        ([0.5, {"f0": 0.1}], r"features\[1\]: no probability for the case 'not f0'; name it, or add 'otherwise'"),
        ([0.5, 0.5, {"f0": 0.1, "f1": 0.2, "otherwise": 0}], r"features\[2\]\['f1'\]: overlaps"),
        ([0.5, {"f1": 0.1, "otherwise": 0}], r"\['f1'\]: feature 1 can depend only on features before it, not on f1"),
        ([0.5, {"g0": 0.1, "otherwise": 0}], r"\['g0'\]: expected a case such as 'f0'"),
        ([0.5, {"f0 and f0": 0.1, "otherwise": 0}], r"expected a case .* each feature once"),
        ([0.5, {"otherwise": 0}], r"features\[1\]: a table needs a case such as 'f0'"),
        (
            [0.5] * 17 + [{" and ".join(f"f{i}" for i in range(17)): 0.1, "otherwise": 0}],
            r"features\[17\]: depends on 17 features; at most 16",
        ),
    ],
)
def test_bad_tables_are_refused(features, message):
    with pytest.raises(UserError, match=message):
        ConditionalFiring(features)


def test_bad_independent_probabilities_are_refused():
    with pytest.raises(UserError, match=r"data\.firing\.probabilities\[1\]: must be a probability"):
        IndependentFiring([0.5, -1])
    with pytest.raises(UserError, match=r"data\.firing\.probabilities: needs at least one"):
        IndependentFiring([])


def test_large_supports_are_not_enumerated():
    with pytest.raises(UserError, match=r"data\.sampling: 'population' enumerates at most 16 features, .* has 17"):
        IndependentFiring([0.5] * 17).enumerate()
    assert IndependentFiring([0.5] * 16).enumerate()[0].shape == (2**16, 16)
    assert ConditionalFiring([0.5] * 17).rates() is None
    with pytest.raises(UserError, match=r"data\.sampling: CopulaFiring cannot be enumerated"):
        CopulaFiring(2, Zipf()).enumerate()


def test_cooccurrence_raises_the_target():
    firing = ModifiedFiring(IndependentFiring([0.3, 0.1]), [Cooccurrence(0, 1, 0.5)])
    assert_samples_match_enumeration(firing)
    assert firing.rates().tolist() == pytest.approx([0.3, 0.1 + 0.3 * 0.9 * 0.5])


def test_suppression_lowers_the_target():
    firing = ModifiedFiring(IndependentFiring([0.3, 0.4]), [Suppression(0, 1, 0.75)])
    assert_samples_match_enumeration(firing)
    assert firing.rates().tolist() == pytest.approx([0.3, 0.4 * (0.7 + 0.3 * 0.25)])


def test_mutual_exclusion_leaves_one_with_equal_chance():
    firing = ModifiedFiring(IndependentFiring([1.0, 1.0, 0.5]), [MutualExclusion([0, 1])])
    assert_samples_match_enumeration(firing)
    assert firing.rates().tolist() == pytest.approx([0.5, 0.5, 0.5])
    states = firing.sample(COUNT, generator(2))
    assert bool((states[:, :2].sum(1) == 1).all())


def test_parent_child_gates():
    firing = ModifiedFiring(IndependentFiring([0.25, 0.2, 0.6]), [ParentChild(0, [1, 2])])
    assert_samples_match_enumeration(firing)
    assert firing.rates().tolist() == pytest.approx([0.25, 0.05, 0.15])


def test_modifiers_apply_in_order():
    base = IndependentFiring([0.5, 0.0])
    on_then_off = ModifiedFiring(base, [Cooccurrence(0, 1), Suppression(0, 1)])
    off_then_on = ModifiedFiring(base, [Suppression(0, 1), Cooccurrence(0, 1)])
    assert on_then_off.rates().tolist() == [0.5, 0.0]
    assert off_then_on.rates().tolist() == [0.5, 0.5]
    assert not bool(on_then_off.sample(1000, generator(0))[:, 1].any())


@settings(max_examples=15, deadline=None)
@given(
    st.lists(probability, min_size=4, max_size=4),
    st.lists(
        st.one_of(
            st.builds(Cooccurrence, st.just(0), st.integers(1, 3), probability),
            st.builds(Suppression, st.just(3), st.integers(0, 2), probability),
            st.sets(st.integers(0, 3), min_size=2).map(lambda members: MutualExclusion(sorted(members))),
            st.builds(ParentChild, st.just(2), st.sampled_from([[0], [1, 3], [0, 1, 3]])),
        ),
        max_size=4,
    ),
)
def test_random_modifiers(probabilities, modifiers):
    assert_samples_match_enumeration(ModifiedFiring(IndependentFiring(probabilities), modifiers))


def test_modified_firing_passes_on_what_its_base_knows():
    tree = TreeFiring({"children": [{"probability": 0.5, "magnitude": 3, "magnitude_std": 0.5}]})
    assert ModifiedFiring(tree, []).magnitudes().tolist() == [3]
    assert ModifiedFiring(tree, []).magnitude_spreads().tolist() == [0.5]
    assert ModifiedFiring(CopulaFiring(2, Zipf()), []).rates() is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cooccurrence(1, 1), r"modifiers\.target: must differ from trigger, both are 1"),
        (lambda: Suppression(0, 1, 1.1), r"modifiers\.probability: must be a probability"),
        (lambda: MutualExclusion([1]), r"modifiers\.features: needs two or more"),
        (lambda: MutualExclusion([1, 1]), r"modifiers\.features: needs two or more"),
        (lambda: ParentChild(0, []), r"modifiers\.children: needs features other than parent 0"),
        (lambda: ParentChild(0, [0]), r"modifiers\.children: needs features other than parent 0"),
        (
            lambda: ModifiedFiring(IndependentFiring([0.5, 0.5]), [Suppression(0, 1), ParentChild(0, [1, 2])]),
            r"data\.firing\.modifiers\[1\]\.children: there is no feature 2; the base has 0 to 1",
        ),
        (
            lambda: ModifiedFiring(IndependentFiring([0.5, 0.5]), [Suppression(0, True)]),
            r"data\.firing\.modifiers\[0\]\.target: expected a whole number of at least 0, got True",
        ),
        (lambda: IndependentFiring([True]), r"probabilities\[0\]: must be a probability between 0 and 1, got True"),
    ],
)
def test_bad_modifiers_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
