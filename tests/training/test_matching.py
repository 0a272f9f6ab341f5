"""Two resolved configs, and whether they are one experiment."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hedgelab.training.checkpoints import RunFolder
from hedgelab.training.checkpoints.folder import ABSENT, as_option, compare, differences, dotted, written_keys

RESOLVED = {
    "model": {"class_path": "hedgelab.saes.TopKSAE", "init_args": {"k": 2, "init": {"noise": 0.0}, "lr_scheduler": None}},
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


def facts(config=RESOLVED, written=WRITTEN, command="fit", **more):
    return {"command": command, "config": config, "written": written, "inputs": {}, "code": {}, **more}


@pytest.fixture
def against(tmp_path):
    """Names of the conflicts and of the changed defaults of two configs."""

    def compared(then=RESOLVED, now=RESOLVED, written_then=WRITTEN, written_now=WRITTEN):
        folder = RunFolder(tmp_path)
        folder.note(**facts(then, written_then), finished=False)
        match = compare(folder, facts(now, written_now))
        return [line.split(" ")[0] for line in match.conflicts], [dotted(key) for key in match.defaults]

    return compared


def test_what_is_written():
    expected = ["data.class_path", "data.rates", "data.tree.a", "model.class_path", "model.k", "trainer.callbacks"]
    assert [*expected, "trainer.max_steps"] == WRITTEN
    assert written_keys({"model": "TopKSAE"}, RESOLVED) == ["model.class_path"]
    assert written_keys({"model": "model.yaml"}, RESOLVED) == ["model"]
    assert written_keys({"trainer": {"callbacks": [{"class_path": "A"}]}}, RESOLVED) == ["trainer.callbacks.0.class_path"]


NOISE = ("model", "init_args", "init", "noise")
K = ("model", "init_args", "k")
EVERY = ("trainer", "callbacks", 0, "init_args", "every")


def test_keys_that_only_one_release_knows(against):
    assert against() == ([], [])
    assert against(then=changed(*NOISE)) == ([], [])
    assert against(then=changed(*NOISE), written_now=["model"]) == ([], [])  # a file that may say nothing of it
    assert against(now=changed(*NOISE)) == ([], [])
    assert against(then=changed(*K)) == (["model.k"], [])
    assert against(now=changed(*K)) == (["model.k"], [])


def test_values_that_differ(against):
    assert against(now=changed(*K, value=3)) == (["model.k"], [])
    assert against(now=changed(*NOISE, value=0.5)) == ([], ["model.init.noise"])
    assert against(now=changed(*NOISE, value=0.5), written_now=[*WRITTEN, "model.init"]) == (["model.init.noise"], [])
    assert against(then=changed(*NOISE, value=0.5), written_then=["model.init.noise"])[0] == ["model.init.noise"]
    assert against(now=changed(*EVERY, value=4), written_now=[], written_then=[]) == ([], ["trainer.callbacks.0.every"])
    assert against(now=changed("data", "init_args", "tree", value={"b": 1}))[0] == ["data.tree.a"]
    assert against(now=changed("trainer", "max_steps", value=5)) == (["trainer.max_steps"], [])
    assert against(now=changed("trainer", "max_steps", value=7)) == ([], [])


def test_classes_and_kinds(against):
    other = {"class_path": "hedgelab.saes.VanillaSAE", "init_args": {"l1": 1}}
    assert against(now=changed("model", value=other)) == (["model.class_path"], [])
    assert against(now=changed("model", "class_path", value="hedgelab.saes.topk.TopKSAE")) == ([], [])
    assert against(now=changed("model", "class_path", value="mine.TopKSAE")) == (["model.class_path"], [])
    scheduler = changed("model", "init_args", "lr_scheduler", value={"class_path": "torch.L", "init_args": {}})
    assert against(now=scheduler) == ([], ["model.lr_scheduler"])
    assert against(now=scheduler, written_now=[*WRITTEN, "model.lr_scheduler.class_path"]) == (["model.lr_scheduler"], [])
    assert list(differences({"a": True}, {"a": 1})) == [(("a",), True, 1)]
    assert list(differences({"a": 1.0}, {"a": 1})) == []


def test_code_and_content(tmp_path):
    folder = RunFolder(tmp_path)
    folder.note(**facts(inputs={"data.text": "a"}, code={"mine.SAE": "a", "hedgelab.X": "hedgelab 0"}), finished=False)
    assert compare(folder, facts(inputs={"data.text": "b"})).conflicts == ["the content of data.text"]
    now = facts(code={"mine.SAE": "b", "hedgelab.X": "hedgelab 1"})
    assert (compare(folder, now).other_code, compare(folder, now).conflicts) == (["mine.SAE"], [])
    folder.note(finished=True)
    assert compare(folder, now).conflicts == ["the code of mine.SAE"]


def test_what_may_be_put_in_place_of_a_default():
    key = ("model", "init_args", "x")
    for then, now in ((1, 2), (None, 3), (True, False), ([0.1, 0.2], [0.3]), ("zeros", "mean")):
        assert as_option(key, then, now) == f"--model.init_args.x={then if isinstance(then, str) else json.dumps(then)}"
    for then, now in (("os.system", None), ("os.system", {"class_path": "L"}), ({"class_path": "A"}, None), ([{}], [])):
        assert as_option(key, then, now) is None
    assert as_option(("model", "class_path"), "os.A", "torch.B") is None
    assert as_option(EVERY, 3, 4) is None


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)),
    max_leaves=12,
)


@given(VALUES, VALUES)
def test_differences_of_anything(a, b):
    assert list(differences(a, a)) == []
    assert {(key, str(then)) for key, then, _ in differences(a, b)} == {(key, str(now)) for key, _, now in differences(b, a)}


@pytest.mark.parametrize("written", [[], ["model"], ["modelling.k"]])
def test_a_key_covers_what_is_below_it_and_nothing_else(written, against):
    conflicts, changes = against(now=changed(*K, value=3), written_now=written, written_then=[])
    assert (conflicts, changes) == ((["model.k"], []) if written == ["model"] else ([], ["model.k"]))
