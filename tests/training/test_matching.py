"""Two resolved configs, and whether they are one experiment."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hedgelab.training.checkpoints.matching import (
    ABSENT,
    Difference,
    can_be_taken_over,
    compare,
    differences,
    replaced,
    without,
    written_keys,
)

RESOLVED = {
    "model": {
        "class_path": "hedgelab.saes.TopKSAE",
        "init_args": {"k": 2, "init": {"noise": 0.0}, "lr_scheduler": None},
    },
    "trainer": {"max_steps": 6, "callbacks": [{"class_path": "torch.A", "init_args": {"every": 3}}]},
    "data": {"class_path": "hedgelab.data.Toy", "init_args": {"rates": [0.1, 0.2], "tree": {"a": 1}}},
}
TREE = {
    "model": {"class_path": "TopKSAE", "k": 2},
    "trainer": {"max_steps": 6, "callbacks": ["torch.A"]},
    "data": {"class_path": "Toy", "init_args": {"rates": [0.1, 0.2], "tree": {"a": 1}}},
}
WRITTEN = written_keys(TREE, RESOLVED)


def changed(*keys, value=ABSENT):
    """The config with another value somewhere, or without it."""
    config = copy.deepcopy(RESOLVED)
    *above, last = keys
    node = config
    for key in above:
        node = node[key]
    if value is ABSENT:
        del node[last]
    else:
        node[last] = value
    return config


def against(then=RESOLVED, now=RESOLVED, written_then=WRITTEN, written_now=WRITTEN, default=True):
    found = compare(then, written_then, now, written_now, lambda key: default)
    return [one.name for one in found.conflicts], [one.name for one in found.changed]


def test_what_is_written():
    expected = ["data.class_path", "data.rates", "data.tree.a", "model.class_path", "model.k", "trainer.callbacks"]
    assert [*expected, "trainer.max_steps"] == WRITTEN
    assert written_keys({"model": "TopKSAE"}, RESOLVED) == ["model.class_path"]
    assert written_keys({"model": "model.yaml"}, RESOLVED) == ["model"]
    assert written_keys({"trainer": {"callbacks": [{"class_path": "A"}]}}, RESOLVED) == [
        "trainer.callbacks.0.class_path"
    ]


def test_equal_configs_are_one_experiment():
    assert against() == ([], [])


NOISE = ("model", "init_args", "init", "noise")
K = ("model", "init_args", "k")
EVERY = ("trainer", "callbacks", 0, "init_args", "every")


def test_keys_that_only_one_release_knows():
    assert against(then=changed(*NOISE)) == ([], [])
    assert against(now=changed(*NOISE)) == ([], [])
    assert against(then=changed(*K), default=True) == ([], [])
    assert against(then=changed(*K), default=False) == (["model.k"], [])
    assert against(now=changed(*K)) == (["model.k"], [])


def test_values_that_differ():
    assert against(now=changed(*K, value=3)) == (["model.k"], [])
    assert against(now=changed(*NOISE, value=0.5)) == ([], ["model.init.noise"])
    assert against(now=changed(*NOISE, value=0.5), written_now=[*WRITTEN, "model.init"]) == (["model.init.noise"], [])
    assert against(then=changed(*NOISE, value=0.5), written_then=["model.init.noise"])[0] == ["model.init.noise"]
    assert against(now=changed(*EVERY, value=4), written_now=[], written_then=[]) == ([], ["trainer.callbacks.0.every"])
    assert against(now=changed("data", "init_args", "tree", value={"b": 1}), default=False)[0] == ["data.tree.a"]


def test_classes_and_kinds():
    other = {"class_path": "hedgelab.saes.VanillaSAE", "init_args": {"l1": 1}}
    assert against(now=changed("model", value=other)) == (["model.class_path"], [])
    assert against(now=changed("model", "class_path", value="hedgelab.saes.topk.TopKSAE")) == ([], [])
    assert against(now=changed("model", "class_path", value="mine.TopKSAE")) == (["model.class_path"], [])
    scheduler = changed("model", "init_args", "lr_scheduler", value={"class_path": "torch.L", "init_args": {}})
    assert against(now=scheduler) == ([], ["model.lr_scheduler"])
    assert against(now=scheduler, written_now=["model.lr_scheduler.class_path"]) == (["model.lr_scheduler"], [])
    assert list(differences({"a": True}, {"a": 1})) == [Difference(("a",), True, 1)]
    assert list(differences({"a": 1.0}, {"a": 1})) == []


def test_what_may_be_put_in_place_of_a_default():
    key = ("model", "init_args", "x")
    for then, now in ((1, 2), (None, 3), (True, False), ([0.1, 0.2], [0.3]), ("zeros", "mean")):
        assert can_be_taken_over(Difference(key, then, now))
    for then, now in (("os.system", None), ("os.system", {"class_path": "L"}), ({"class_path": "A"}, None), ([{}], [])):
        assert not can_be_taken_over(Difference(key, then, now))
    assert not can_be_taken_over(Difference(("model", "class_path"), "os.A", "torch.B"))


def test_putting_values_back():
    now = changed(*EVERY, value=4)
    assert replaced(now, list(differences(RESOLVED, now))) == {"trainer": RESOLVED["trainer"]}
    assert without(RESOLVED, NOISE) == changed(*NOISE)
    assert RESOLVED["model"]["init_args"]["init"] == {"noise": 0.0}


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(VALUES, VALUES)
def test_differences_of_anything(a, b):
    assert list(differences(a, a)) == []
    assert {(found.key, str(found.then)) for found in differences(a, b)} == {
        (found.key, str(found.now)) for found in differences(b, a)
    }


@pytest.mark.parametrize("written", [[], ["model"], ["modelling.k"]])
def test_a_key_covers_what_is_below_it_and_nothing_else(written):
    conflicts, changes = against(now=changed(*K, value=3), written_now=written, written_then=[])
    assert (conflicts, changes) == ((["model.k"], []) if written == ["model"] else ([], ["model.k"]))
