"""Figures of evaluations, and the choice of what several SAEs are drawn against."""

import math

import numpy as np
import pytest

from hedgelab.errors import UserError
from hedgelab.plots.evaluation import absorption_by_letter, cosine_distribution, losses_spliced, probing_by_class
from hedgelab.protocols.evaluation.across import figure, flat, means, rows_of
from hedgelab.protocols.study import as_csv
from hedgelab.protocols.sweep.report import Row

LOSSES = {
    "cross_entropy": 3.0, "cross_entropy_sae": 3.4, "cross_entropy_zero": 9.0, "cross_entropy_mean": 7.0, "kl_sae": 0.4,
    "kl_zero": 6.0, "kl_mean": 4.0, "recovered": 0.93, "kl_recovered": 0.94,
}  # fmt: skip


def texts(made):
    return [axes.get_title() for axes in made.axes]


def test_figures_of_one_sae():
    bars = probing_by_class(["A", "B"], [1, 5], np.array([[0.2, 0.4], [0.6, 0.8]])).axes[0].patches
    assert sorted(round(bar.get_height(), 6) for bar in bars) == [0.2, 0.4, 0.6, 0.8]
    letters = absorption_by_letter(["a", "q"], [0.1, math.nan], [0.2, math.nan]).axes[0]
    assert [text.get_text() for text in letters.texts] == ["–"]
    assert texts(losses_spliced(LOSSES)) == ["recovered of what zeros lose: 93.0%", "recovered of what zeros lose: 94.0%"]
    assert texts(cosine_distribution(np.ones(200), [0.1, 0.95], 0.9))[1] == "1 of 2 above 0.9"


PARAMS = {
    f"{beta}/{seed}": {"model.beta": beta, "model.init.seed": seed, "model.k": "5"}
    for beta in ("0", "0.5")
    for seed in ("0", "1")
}
NOTHING = {name: {} for name in PARAMS}


def test_the_axis_is_the_number_in_which_runs_differ():
    expected = {"0/0": {"beta": 0}, "0/1": {"beta": 0}, "0.5/0": {"beta": 0.5}, "0.5/1": {"beta": 0.5}}
    for key in (None, "beta", "model.beta"):
        assert {row.run_id: row.values for row in rows_of(NOTHING, PARAMS, key)} == expected
    with pytest.raises(UserError, match="--x: the SAEs do not differ in a number 'k'"):
        rows_of(NOTHING, PARAMS, "k")
    assert rows_of({"a": {}, "b": {}}, {"a": {"model.x": "one"}, "b": {"model.x": "two"}}) == []
    kinds = {f"{kind}{k}": {"model.class_path": kind, "model.k": k} for kind in ("topk", "relu") for k in ("1", "2")}
    lines = {row.run_id: row.line for row in rows_of({name: {} for name in kinds}, kinds)}
    assert lines == {"topk1": "topk", "topk2": "topk", "relu1": "relu", "relu2": "relu"}


def test_a_comparison_says_from_which_difference_on_it_is_to_be_believed():
    results = {name: {"probing/f1_k1": 0.5, "probing/f1_k1_noise": 0.01, "absorption/full": 0.1} for name in PARAMS}
    rows = rows_of(results, PARAMS)
    lines = [line.split() for line in means(rows)]
    assert lines[0][-2:] == ["reliable", "from"]
    (probing,) = [line for line in lines if line[0] == "probing/f1_k1"]
    assert float(probing[-1]) == pytest.approx(1.96 * 2**0.5 * 0.01, rel=0.02)
    assert not any(line[0].endswith("_noise") for line in lines)
    assert "probing F1, k = 1 ↑" in texts(figure(rows, "T"))
    assert not any("noise" in text for text in texts(figure(rows, "T")))


def test_scores_are_averaged_over_seeds():
    results = {
        name: {"absorption/full": float(name[:-2]) + 0.1 * int(name[-1]), "probing/f1_k1": 1.0, "probing/auc_k1": 2.0}
        for name in PARAMS
    }
    rows = rows_of(results, PARAMS)
    drawn = figure(rows, "T")
    assert sorted(texts(drawn)[:2]) == ["full absorption ↓", "probing F1, k = 1 ↑"]
    panel = drawn.axes[texts(drawn).index("full absorption ↓")]
    assert list(panel.get_lines()[0].get_ydata()) == pytest.approx([0.05, 0.55])
    (absorption,) = [line for line in means(rows) if "absorption/full" in line]
    assert absorption.split() == ["absorption/full", "0.05", "±", "0.071", "0.55", "±", "0.071"]
    lines = as_csv(flat(rows)).splitlines()
    assert lines[0] == "sae,line,beta,absorption/full,probing/f1_k1,probing/auc_k1"
    assert lines[1] == "0/0,,0,0,1,2"


def test_a_score_that_some_lack_is_drawn_for_the_others():
    rows = [Row("", {"x": 0.0}, None, "a", {"absorption/full": 0.1}), Row("", {"x": 1.0}, None, "b", {})]
    drawn = figure(rows, "T")
    assert list(drawn.axes[0].get_lines()[0].get_ydata()) == [0.1]
