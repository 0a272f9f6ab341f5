import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgelab.data.toy import ToyDataModule, TreeFiring
from hedgelab.data.toy.firing import pattern_numbers
from hedgelab.errors import UserError
from hedgelab.seeding import generator

TREE = {
    "children": [
        {
            "probability": 0.5,
            "magnitude": 2.0,
            "mutually_exclusive_children": True,
            "children": [{"probability": 0.6}, {"probability": 0.3, "children": [{"probability": 0.5}]}],
        },
        {"probability": 0.4, "is_read_out": False, "children": [{"probability": 0.5}, {"probability": 0.25}]},
    ]
}


def frequencies(firing: TreeFiring, count: int) -> torch.Tensor:
    numbers = pattern_numbers(firing.sample(count, generator(0, "tree")))
    return torch.bincount(numbers, minlength=2**firing.n).double() / count


def assert_tree_is_consistent(firing: TreeFiring, count: int = 40_000) -> None:
    probabilities = firing.pattern_probabilities()
    assert bool((probabilities >= -1e-12).all())
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)
    tolerance = 6 * (probabilities.clamp(0, 1) * (1 - probabilities).clamp(0, 1) / count).sqrt() + 3 / count
    assert bool(((frequencies(firing, count) - probabilities).abs() <= tolerance).all())
    states, kept = firing.enumerate()
    assert float(kept.sum()) == pytest.approx(1, abs=1e-12)
    assert torch.allclose(kept @ states.double(), firing.rates(), atol=1e-9)


def test_tree_semantics():
    firing = TreeFiring(TREE)
    assert firing.n == 6
    assert firing.rates().tolist() == pytest.approx([0.5, 0.3, 0.15, 0.075, 0.2, 0.1])
    assert firing.magnitudes().tolist() == [2, 1, 1, 1, 1, 1]
    assert_tree_is_consistent(firing)
    states = firing.sample(20_000, generator(1))
    assert not bool((states[:, 1] & states[:, 2]).any())
    assert not bool((states[:, 1:4].any(1) & ~states[:, 0]).any())
    assert not bool((states[:, 3] & ~states[:, 2]).any())


def test_unread_gate_correlates_its_children():
    states, probabilities = TreeFiring(TREE).enumerate()
    both = float(probabilities[states[:, 4] & states[:, 5]].sum())
    assert both == pytest.approx(0.4 * 0.5 * 0.25)


def test_exclusive_children_may_fill_the_whole_probability():
    children = [{"probability": 0.1}] * 10
    firing = TreeFiring({"mutually_exclusive_children": True, "children": children})
    states, probabilities = firing.enumerate()
    assert bool((states.sum(1) <= 1).all())
    assert states.shape == (10, 10)  # the silent state has no probability left
    assert float(probabilities.sum()) == pytest.approx(1)
    assert float(firing.sample(10_000, generator(0)).sum(1).float().mean()) == pytest.approx(1, abs=1e-3)


def test_a_read_out_root_is_the_first_feature():
    firing = TreeFiring({"probability": 0.25, "is_read_out": True, "children": [{"probability": 0.2}]})
    assert firing.rates().tolist() == pytest.approx([0.25, 0.05])
    assert_tree_is_consistent(firing)


def nodes() -> st.SearchStrategy:
    probability = st.floats(0, 1).filter(lambda p: p == 0 or p > 1e-6)
    flags = {"is_read_out": st.booleans()}
    leaf = st.fixed_dictionaries({"probability": probability, **flags})

    def grow(inner):
        independent = st.lists(inner, min_size=1, max_size=2)
        exclusive = independent.map(lambda c: [{**n, "probability": n["probability"] / len(c)} for n in c])
        base = {"probability": probability, **flags}
        return st.one_of(
            st.fixed_dictionaries({**base, "children": independent}),
            st.fixed_dictionaries({**base, "children": exclusive, "mutually_exclusive_children": st.just(True)}),
        )

    return st.recursive(leaf, grow, max_leaves=5)


@settings(max_examples=25, deadline=None)
@given(nodes())
def test_random_trees(node):
    firing = TreeFiring({"children": [{"probability": 0.5}, node]})
    if firing.n <= 10:
        assert_tree_is_consistent(firing, count=10_000)


@pytest.mark.parametrize("name", ["tree.json", "tree.yaml"])
def test_trees_come_from_files(tmp_path, name):
    path = tmp_path / name
    path.write_text(json.dumps(TREE))
    assert TreeFiring(file=str(path)).root == TreeFiring(TREE).root


def nest(node):
    return {"children": [{"probability": 0.5}, node]}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], r"^tree: expected a mapping with keys such as 'probability', got list \[\]"),
        ({"childern": []}, r"^tree\.childern: unknown key; did you mean 'children'\?"),
        (nest({"probability": 0.1, "zzz": 1}), r"^tree\.children\[1\]\.zzz: unknown key; expected one of children"),
        (nest({}), r"^tree\.children\[1\]\.probability: missing"),
        (nest(None), r"^tree\.children\[1\]: expected a mapping .* got nothing"),
        (nest({"probability": 1.5}), r"^tree\.children\[1\]\.probability: must be a probability between 0 and 1"),
        (nest({"probability": "0.5"}), r"^tree\.children\[1\]\.probability: expected a number, got str '0\.5'"),
        (nest({"probability": True}), r"^tree\.children\[1\]\.probability: expected a number, got bool True"),
        (nest({"probability": 0.5, "magnitude": 0}), r"^tree\.children\[1\]\.magnitude: must be positive"),
        (nest({"probability": 0.5, "is_read_out": 1}), r"\[1\]\.is_read_out: expected true or false, got int 1"),
        (nest({"probability": 0.5, "children": {}}), r"\[1\]\.children: expected a list of nodes, got dict"),
        (nest({"probability": 0.5, "children": [{"probability": 0.5}, 3]}), r"^tree\.children\[1\]\.children\[1\]: exp"),
        (
            {"mutually_exclusive_children": True, "children": [{"probability": 0.7}, {"probability": 0.5}]},
            r"^tree\.children: probabilities of mutually exclusive children sum to 1\.2, above 1",
        ),
        ({"children": [{"probability": 0.5, "is_read_out": False}]}, r"^tree: has no feature"),
    ],
)
def test_bad_trees_are_refused(tree, message):
    with pytest.raises(UserError, match=message) as caught:
        TreeFiring(tree)
    assert "\n" not in str(caught.value)


def test_bad_files_are_refused(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("children: [\n  {probability: 0.5")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xff")
    circle = tmp_path / "circle.yaml"
    circle.write_text("&a {probability: 0.5, children: [*a]}")
    for path, message in (
        (circle, r"^data\.firing\.file: .*circle\.yaml.*recursive aliases"),
        (tmp_path / "absent.yaml", r"^data\.firing\.file: no such file .*absent\.yaml"),
        (tmp_path, r"^data\.firing\.file: no such file"),
        (broken, r"^data\.firing\.file: .*cannot read .*broken"),
        (binary, r"^data\.firing\.file: cannot read"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            TreeFiring(file=str(path))
        assert "\n" not in str(caught.value)


def test_tree_and_file_exclude_each_other():
    with pytest.raises(UserError, match="needs either 'tree'"):
        TreeFiring(TREE, file="tree.yaml")
    with pytest.raises(UserError, match="needs either 'tree'"):
        TreeFiring()


def test_nodes_have_a_spread_of_their_own(tmp_path):
    tree = {"children": [{"probability": 0.5, "magnitude": 4.0, "magnitude_std": 0.5}, {"probability": 0.5}]}
    file = tmp_path / "tree.json"
    file.write_text(json.dumps(tree))
    for firing in (TreeFiring(tree), TreeFiring(file=str(file))):
        assert firing.magnitude_spreads().tolist() == [0.5, 0.0]
        features = ToyDataModule(firing, d_in=4, batch_size=4000, seed=0).batch("train", 0).features
        first, second = (column[column > 0] for column in features.T)
        assert float(first.mean()) == pytest.approx(4, abs=0.05)
        assert float(first.std()) == pytest.approx(0.5, abs=0.05)
        assert set(second.tolist()) == {1.0}
    steady = ToyDataModule(TreeFiring(tree), d_in=4, magnitude_std=0.0, seed=0).batch("train", 0).features
    assert set(steady.flatten().tolist()) == {0.0, 1.0, 4.0}
    for wrong in (-0.1, math.inf, math.nan):
        with pytest.raises(UserError, match=r"tree.children\[0\].magnitude_std: must be at least 0 and finite"):
            TreeFiring({"children": [{"probability": 0.5, "magnitude_std": wrong}]})
    with pytest.raises(UserError, match="sampling: population, whose support must be finite"):
        ToyDataModule(TreeFiring(tree), d_in=4, sampling="population")
