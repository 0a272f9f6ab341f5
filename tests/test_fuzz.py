"""Files from elsewhere, mutated at random: each is refused in one line or read as something sound; nothing else happens."""

import json
import math
import struct

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hedgelab.config.tree import load
from hedgelab.data.toy.tree import TreeFiring, parse_tree
from hedgelab.errors import UserError
from hedgelab.saes import BatchTopKSAE, MatryoshkaSAE, TopKSAE, load_sae, save_sae

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.binary(max_size=3).map(repr)
)
KEYS = st.one_of(
    st.sampled_from(["probability", "magnitude", "is_read_out", "mutually_exclusive_children", "children"]), st.text(max_size=5)
)
JSON = st.recursive(
    SCALARS, lambda below: st.lists(below, max_size=4) | st.dictionaries(KEYS, below, max_size=5), max_leaves=20
)
NODES = st.recursive(
    st.fixed_dictionaries({"probability": st.one_of(st.floats(0, 1), SCALARS)}, optional={"magnitude": SCALARS}),
    lambda below: st.fixed_dictionaries(
        {"probability": st.floats(0, 1), "children": st.lists(below, max_size=4)},
        optional={"mutually_exclusive_children": st.booleans(), "is_read_out": st.booleans(), "magnitude": st.floats(0.1, 9)},
    ),
    max_leaves=12,
)


def one_line(error):
    assert "\n" not in str(error.value if hasattr(error, "value") else error)


def sound(firing):
    pattern = firing.sample(16, torch.Generator().manual_seed(0))
    assert pattern.shape == (16, firing.n)
    rates = firing.rates()
    assert bool(((rates >= 0) & (rates <= 1)).all())
    assert all(math.isfinite(value) and value > 0 for value in firing.magnitudes().tolist())


@QUICK
@given(st.one_of(JSON, NODES))
def test_trees_of_any_content(raw):
    try:
        parse_tree(raw)
        firing = TreeFiring(tree=raw)
    except UserError as error:
        one_line(error)
        return
    sound(firing)


TREE = yaml.safe_dump(
    {
        "mutually_exclusive_children": True,
        "children": [
            {"probability": 0.3, "magnitude": 2.0, "children": [{"probability": 0.5}]},
            {"probability": 0.25, "is_read_out": False, "children": [{"probability": 0.1}, {"probability": 0.9}]},
        ],
    }
).encode()
EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "repeat", "insert"]), st.floats(0, 0.9999), st.binary(min_size=1, max_size=12)),
    min_size=1,
    max_size=4,
)


def mutated(content, edits):
    for kind, where, extra in edits:
        at = int(where * len(content))
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (extra[0] or 1)]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "repeat":
            content = content[:at] + content[max(0, at - 40) :]
        else:
            content = content[:at] + extra + content[at:]
    return content


@QUICK
@given(EDITS)
def test_tree_files_with_mutated_bytes(tmp_path_factory, edits):
    file = tmp_path_factory.getbasetemp() / "fuzzed_tree.yaml"
    file.write_bytes(mutated(TREE, edits))
    try:
        load(file)
        firing = TreeFiring(file=str(file))
    except UserError as error:
        one_line(error)
        return
    sound(firing)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    save_sae(TopKSAE(6, 4, k=2), root / "topk")
    save_sae(MatryoshkaSAE(6, lambda d_in: BatchTopKSAE(d_in, 4, k=2), [1, 4]), root / "matryoshka")
    return root


def copy(folders, kind, **files):
    target = folders / "fuzzed"
    target.mkdir(exist_ok=True)
    for name in ("sae.json", "sae.safetensors"):
        (target / name).write_bytes(files.get(name.replace(".", "_"), (folders / kind / name).read_bytes()))
    return target


def refused_or_sound(folder):
    try:
        sae = load_sae(folder)
    except UserError as error:
        one_line(error)
        return
    codes = sae.encode(torch.ones(3, sae.d_in))
    assert sae.decode(codes).shape == (3, sae.d_in)


@QUICK
@given(kind=st.sampled_from(["topk", "matryoshka"]), edits=EDITS)
def test_sae_configs_with_mutated_bytes(folders, kind, edits):
    content = mutated((folders / kind / "sae.json").read_bytes(), edits)
    refused_or_sound(copy(folders, kind, sae_json=content))


@QUICK
@given(kind=st.sampled_from(["topk", "matryoshka"]), data=st.data())
def test_sae_configs_with_other_values(folders, kind, data):
    config = json.loads((folders / kind / "sae.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        place = config["inner"] if isinstance(config.get("inner"), dict) and data.draw(st.booleans()) else config
        key = data.draw(st.sampled_from(sorted(place)) | st.text(max_size=6)) if place else "class"
        place[key] = data.draw(SCALARS | JSON)
    content = json.dumps(config, default=str).encode()
    refused_or_sound(copy(folders, kind, sae_json=content))


@QUICK
@given(kind=st.sampled_from(["topk", "matryoshka"]), edits=EDITS)
def test_sae_weights_with_mutated_bytes(folders, kind, edits):
    content = mutated((folders / kind / "sae.safetensors").read_bytes(), edits)
    refused_or_sound(copy(folders, kind, sae_safetensors=content))


@QUICK
@given(kind=st.sampled_from(["topk", "matryoshka"]), edits=EDITS)
def test_sae_weights_with_a_mutated_header(folders, kind, edits):
    content = (folders / kind / "sae.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = mutated(content[8 : 8 + length], edits)
    refused_or_sound(copy(folders, kind, sae_safetensors=struct.pack("<Q", len(header)) + header + content[8 + length :]))
