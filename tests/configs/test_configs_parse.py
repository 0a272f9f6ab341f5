"""Every config in ``configs/`` that trains parses, whole: those that need the model hub and every cell of every sweep too."""

import itertools
from itertools import groupby
from pathlib import Path

import pytest
import yaml

from hedgelab.cli.cells import parse_cell
from hedgelab.cli.studies import parse, study_class
from hedgelab.config.tree import load, opening_comment
from hedgelab.protocols.sweep.config import read_sweep, with_seed

CONFIGS = Path(__file__).parents[2] / "configs"
TRAINING = sorted(file for file in CONFIGS.rglob("*.yaml") if {"data", "sweep"} & set(yaml.safe_load(file.read_text())))
OWN_COMMAND = {"theory", "paper"}  # run in tests of their own
SWEEPS = [file for file in TRAINING if "sweep" in yaml.safe_load(file.read_text())]
SINGLE = [
    file
    for file in TRAINING
    if file not in SWEEPS
    and file.parent.name not in OWN_COMMAND
    and not {"trial", "plant", "l0"} & set(yaml.safe_load(file.read_text()))
]


def name_of(file):
    return f"{file.parent.name}/{file.stem}"


def cells_of(file):
    """The cells, by line; of those that differ in their seed only the first."""
    sweep = read_sweep(["--config", str(file)])
    first = {cell.group: (cell, tree) for cell, tree in reversed(sweep.cells)}
    ordered = [first[group] for group in dict.fromkeys(cell.group for cell, _ in sweep.cells)]
    by_line = {line: list(cells) for line, cells in groupby(ordered, lambda pair: pair[0].line)}
    return sweep.options.command, by_line


@pytest.mark.parametrize("file", [*SINGLE, *SWEEPS], ids=name_of)
def test_configs_say_what_they_show(file):
    assert len(opening_comment([file]) or "") > 60


@pytest.mark.parametrize("file", SINGLE, ids=name_of)
def test_single_experiments_parse(file):
    tree = load(file)
    parse_cell("hedge" if "hedge" in tree else "fit", tree)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*/*_l0.yaml")), ids=name_of)
def test_searches_for_l0_parse(file):
    if "l0" not in load(file):
        pytest.skip("a sweep")
    study, _, _ = parse(study_class("l0"), "l0", ["--config", str(file)])
    for value in study.l0.values:
        assert study.make_sae(value, 0, 64).k == value


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("llm/*_plant*.yaml")), ids=name_of)
def test_trials_by_lot_parse(file):
    if "plant" not in load(file):
        pytest.skip("a fit")
    study, _, _ = parse(study_class("plant"), "plant", ["--config", str(file)])
    for kind, width in itertools.product(study.kinds, study.plant.widths):
        assert study.make_sae(kind, width, 0, 576).d_sae == width


@pytest.mark.parametrize("file", SWEEPS, ids=name_of)
def test_the_ends_of_every_sweep_parse(file):
    command, lines = cells_of(file)
    cells = [cell for line in lines.values() for cell in line]
    ends = {cell.group: (cell, tree) for cell, tree in (cells[-1], cells[0])}  # seeds of weights parse alike
    for cell, tree in ends.values():
        parse_cell(command, with_seed(tree, cell.seed))


@pytest.mark.slow
@pytest.mark.parametrize("file", SWEEPS, ids=name_of)
def test_every_cell_parses(file):
    command, lines = cells_of(file)
    for cells in lines.values():
        for cell, tree in cells:
            parse_cell(command, with_seed(tree, cell.seed))


def test_the_grids_of_the_paper_are_all_there():
    for model, grids in {
        "gemma2_2b": ("width", "sparsity", "layer", "new_latents", "balance"),
        "llama32_1b": ("width", "sparsity", "layer"),
        "smollm2": ("width", "sparsity", "layer", "new_latents"),
    }.items():
        for grid in grids:
            assert CONFIGS / "llm" / f"{model}_{grid}_grid.yaml" in SWEEPS


def test_cells_of_the_paper_are_those_of_its_table():
    _, lines = cells_of(CONFIGS / "llm" / "gemma2_2b_sparsity_grid.yaml")
    values = {line: [next(iter(cell.values.values())) for cell, _ in cells] for line, cells in lines.items()}
    assert values == {"BatchTopK": [5, 10, 50, 100, 200], "vanilla": [5, 7.5, 10, 20, 40]}
    _, lines = cells_of(CONFIGS / "llm" / "llama32_1b_width_grid.yaml")
    for cells in lines.values():
        assert [cell.values["model.d_sae"] for cell, _ in cells] == [128, 256, 1024, 4096, 16384, 65536]
