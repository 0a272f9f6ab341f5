"""Cells of a sweep: products, zips, labels, lines."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hedgelab.errors import UserError
from hedgelab.protocols.sweep.config import expand, read_sweep

KEYS = st.text("abcdefgh", min_size=1, max_size=6).filter(lambda key: key != "zip")
VALUES = st.lists(st.integers(-5, 5), min_size=1, max_size=4, unique=True)
AXES = st.dictionaries(KEYS.map("model.{}".format), VALUES, max_size=3)


@given(AXES)
def test_every_combination_is_a_cell_once_the_last_axis_fastest(axes):
    cells = expand({}, axes)
    assert len(cells) == math.prod(map(len, axes.values()))
    assert len({cell.name for cell in cells}) == len(cells)
    assert [tuple(cell.values.values()) for cell in cells] == sorted(
        (tuple(cell.values.values()) for cell in cells),
        key=lambda place: [axes[key].index(value) for key, value in zip(axes, place, strict=True)],
    )
    assert all(cell.varied == cell.values for cell in cells)


@given(AXES, VALUES)
def test_the_seed_is_an_axis_that_sets_nothing_and_does_not_name_the_group(axes, seeds):
    cells = expand({}, {**axes, "seed": seeds})
    assert all("seed" not in cell.varied and cell.seed in seeds for cell in cells)
    groups = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell.seed)
    assert all(found == seeds for found in groups.values())
    assert len(groups) == len(expand({}, axes))


@given(st.integers(1, 5), st.lists(KEYS, min_size=1, max_size=3, unique=True))
def test_zipped_lists_go_together(length, keys):
    lists = {key: [f"{key}{i}" for i in range(length)] for key in keys}
    cells = expand({}, {"together": {"zip": lists}, "other": [1, 2]})
    assert len(cells) == 2 * length
    for cell in cells:
        assert len({cell.varied[key].removeprefix(key) for key in keys}) == 1
        assert cell.values["together"] == cell.varied[keys[0]]


def test_lines_have_values_and_axes_of_their_own():
    lines = {"a": {"set": {"model.k": 1}}, "b": {"set": {"model": {"class_path": "B"}}, "axes": {"model.l1": [0.1, 0.2]}}}
    cells = expand(lines, {"model.d_sae": [4, 8]})
    names = ["a/d_sae=4", "a/d_sae=8", "b/l1=0.1/d_sae=4", "b/l1=0.1/d_sae=8", "b/l1=0.2/d_sae=4", "b/l1=0.2/d_sae=8"]
    assert [cell.name for cell in cells] == names
    assert [cell.line for cell in cells] == ["a"] * 2 + ["b"] * 4
    assert cells[2].fixed == {"model": {"class_path": "B"}}
    assert cells[2].varied == {"model.l1": 0.1, "model.d_sae": 4}


def test_labels_stand_for_what_they_set():
    cells = expand({}, {"text": {"brown": {"data.text": "b", "data.seed": 1}, "python": {"data.text": "p"}}})
    assert [(cell.name, cell.varied) for cell in cells] == [
        ("text=brown", {"data.text": "b", "data.seed": 1}),
        ("text=python", {"data.text": "p"}),
    ]


def test_without_axes_there_is_one_cell():
    (cell,) = expand({}, {})
    assert (cell.name, cell.values, cell.seed) == ("all", {}, None)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"model.k": []}, "sweep.axes.model.k: needs at least one value"),
        ({"model.k": 3}, "sweep.axes.model.k: expected a list"),
        ({"model.k": [1, 2, 1]}, "sweep.axes.model.k: has 1 twice"),
        ({"seed": ["a"]}, "sweep.axes.seed: expected whole numbers, got 'a'"),
        ({"seed": [True]}, "sweep.axes.seed: expected whole numbers, got True"),
        ({"a": {"zip": {"b": [1], "c": [1, 2]}}}, "sweep.axes.a.zip: lists go together and must be equally long"),
        ({"a": {"zip": [1]}}, "sweep.axes.a.zip: expected dotted keys"),
        ({"a": {"x": 1}}, "sweep.axes.a: expected a list"),
        ({"b": [1], "a": {"zip": {"b": [1]}}}, "sweep.axes.a: sets b, which another axis sets as well"),
    ],
)
def test_mistakes_name_the_axis(axes, message):
    with pytest.raises(UserError, match="^" + message.replace("[", r"\[")):
        expand({}, axes)


def test_an_axis_stands_in_one_place():
    with pytest.raises(UserError, match=r"^sweep\.lines\.a\.axes\.k: is an axis of all lines already"):
        expand({"a": {"axes": {"k": [1]}}}, {"k": [2]})


def test_a_base_is_looked_for_beside_the_file_that_names_it(tmp_path):
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "base.yaml").write_text("trainer: {max_steps: 7}")
    (folder / "sweep.yaml").write_text("sweep: {base: base.yaml, axes: {model.k: [1, 2]}}")
    (tmp_path / "mine.yaml").write_text("sweep: {pack: 1}\ntrainer: {max_steps: 9}")
    words = ["--config", str(folder / "sweep.yaml"), "--config", str(tmp_path / "mine.yaml")]
    assert [tree["trainer"] for _, tree in read_sweep(words).cells] == 2 * [{"max_steps": 9}]


def test_cells_are_chosen_by_their_names(tmp_path):
    (tmp_path / "sweep.yaml").write_text("sweep: {axes: {model.d_sae: [64, 256, 4096], seed: [0, 1]}}\nmodel: {k: 2}")
    words = ["--config", str(tmp_path / "sweep.yaml")]
    assert len(read_sweep(words).cells) == 6
    chosen = read_sweep([*words, "--sweep.only", "d_sae=(64|256)/|seed=0"]).cells
    assert [cell.name for cell, _ in chosen] == [
        "d_sae=64/seed=0", "d_sae=64/seed=1", "d_sae=256/seed=0", "d_sae=256/seed=1", "d_sae=4096/seed=0",
    ]  # fmt: skip
    mistakes = {"width": "no cell's name has 'width' in it", "(64": "expected a regular expression, got '(64'"}
    for pattern, message in mistakes.items():
        with pytest.raises(UserError, match=rf"^sweep\.only: {re.escape(message)}"):
            read_sweep([*words, "--sweep.only", pattern])
