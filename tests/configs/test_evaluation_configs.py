"""The configs of evaluations and of the balanced matryoshka study."""

import re
from pathlib import Path

import pytest

from hedgelab.config.tree import load
from hedgelab.data.llm import LLMDataModule
from hedgelab.protocols.evaluation.suite import choose, make_suites, suite_classes
from hedgelab.protocols.sweep.config import read_sweep

CONFIGS = Path(__file__).parents[2] / "configs/llm"


@pytest.fixture
def suites(monkeypatch):
    """All suites as the config makes them, by name."""
    monkeypatch.setenv("BROWN", "somewhere")
    return {suite.name: suite for suite in make_suites(load(CONFIGS / "evaluate_brown.yaml"), suite_classes())}


def test_every_suite_has_its_text(suites):
    assert suites["probing"].words.text == "somewhere/brown_text.jsonl.gz"
    model = LLMDataModule("nothing is read yet")
    assert set(choose(list(suites.values()), ["all"], model)[1]) == {"truth"}


@pytest.mark.parametrize(
    ("tag", "classes"),
    [
        ("to", ["TO"]), ("in-tl", ["IN"]), ("fw-in", ["IN"]), ("at", ["DT"]), ("dts", ["DT"]), ("cc", ["CC"]),
        ("nns", ["NNS"]), ("nns-hl", ["NNS"]), ("ppss", ["PRP"]), ("ppo", ["PRP"]), ("np$", ["POS"]), ("nns$-tl", ["POS"]),
        ("nn", []), ("pp$", []), ("nn+bez", []), ("dt$", []), ("vb", []),
    ],
)  # fmt: skip
def test_tags_fall_into_the_classes_they_should(suites, tag, classes):
    found = [name for name, patterns in suites["probing"].words.classes.items() if any(re.fullmatch(p, tag) for p in patterns)]
    assert found == classes


def test_the_study_has_the_papers_betas_and_three_seeds():
    sweep = read_sweep(["--config", str(CONFIGS / "balance_smollm2.yaml")])
    places = {(cell.values["model.beta"], cell.seed) for cell, _ in sweep.cells}
    assert places == {(beta, seed) for beta in (0, 0.1, 0.25, 0.5, 0.75, 1, 2, 5) for seed in (0, 1, 2)}
    steps = {tree["trainer"]["max_steps"] for _, tree in sweep.cells}
    decays = {
        tree["model"]["init_args"]["inner"]["init_args"]["lr_scheduler"]["init_args"]["total_iters"] for _, tree in sweep.cells
    }
    assert steps == decays
