"""Table, spreads and figure of a sweep, from numbers made up for it."""

import csv
import io
import itertools
import json
import math
from types import SimpleNamespace

import pytest

from hedgelab.protocols.study import as_csv
from hedgelab.protocols.sweep.config import Cell, FigureOptions
from hedgelab.protocols.sweep.report import Row, as_json, figure, flat, over_training, rows_of, table


class Run:
    """What is read of an MLflow run."""

    def __init__(self, metrics, params=None):
        self.data = type("Data", (), {"metrics": metrics, "params": params or {}})()
        self.info = type("Info", (), {"run_id": "r"})()


def row(line, width, seed, degree, **others):
    return Row(line, {"model.d_sae": width}, seed, f"{line}{width}", {"hedging/degree": degree, **others})


ROWS = [row(line, width, seed, 1 / width + 0.01 * seed) for line in "ab" for width in (4, 64, 512) for seed in range(3)]


def test_spreads_are_those_of_the_seeds():
    first = json.loads(as_json(ROWS, {}))["summary"][0]
    assert (first["line"], first["model.d_sae"], first["seeds"]) == ("a", 4, 3)
    assert first["metrics"]["hedging/degree"]["mean"] == pytest.approx(0.26)
    assert first["metrics"]["hedging/degree"]["std"] == pytest.approx(0.01)
    (alone,) = json.loads(as_json(ROWS[:1], {}))["summary"]
    assert alone["metrics"]["hedging/degree"] == {"mean": 0.25, "std": None, "n": 1}


def test_a_metric_that_some_seeds_do_not_have_has_no_spread():
    rows = [row("a", 4, seed, math.nan if seed else 0.5) for seed in range(3)]
    (summary,) = json.loads(as_json(rows, {}))["summary"]
    assert summary["metrics"]["hedging/degree"]["std"] is None
    assert table(rows, ["hedging/degree"])[-1] == ["a", "4", "nan"]


def test_the_table_has_a_line_a_row():
    lines = list(csv.DictReader(io.StringIO(as_csv(flat([*ROWS, row("a", 8, 0, 0.5, extra=1.0)])))))
    assert len(lines) == len(ROWS) + 1
    assert [lines[0][key] for key in ("line", "model.d_sae", "seed", "run", "extra")] == ["a", "4", "0", "a4", ""]
    assert lines[-1]["extra"] == "1"
    shown = table([*ROWS, row("a", 8, 0, 0.5, extra=1.0)], ["hedging/degree", "extra"])
    assert shown[:2] == [["line", "d_sae", "hedging/degree", "extra"], ["a", "4", "0.26 ± 0.01", ""]]
    assert shown[-1] == ["a", "8", "0.5", "1"]
    document = json.loads(as_json(ROWS, {"a": "boom"}))
    assert document["failures"] == {"a": "boom"}
    assert len(document["rows"]) == 18
    assert len(document["summary"]) == 6


def test_seeds_of_a_run_are_told_apart():
    cell = Cell("x/seed=3", "x", "x", {"model.k": 2}, 3, {}, {"model.k": 2})
    metrics = {"hedging/degree": 0.2, "hedging/seed3/degree": 0.1, "hedging/seed4/degree": 0.3, "system/cpu": 1.0}
    assert [(own.seed, own.metrics) for own in rows_of(cell, Run(metrics))] == [
        (3, {"hedging/degree": 0.1}),
        (4, {"hedging/degree": 0.3}),
    ]
    (alone,) = rows_of(cell, Run({"val/mse": 0.2, "system/cpu": 1.0}))
    assert (alone.seed, alone.values, alone.metrics) == (3, {"model.k": 2}, {"val/mse": 0.2})


def test_the_figure_has_a_panel_a_metric_and_a_curve_a_line():
    drawn = figure(ROWS, {"hedging/degree": "degree", "absent": "absent"}, "title", FigureOptions())
    (panel,) = [axes for axes in drawn.axes if axes.get_visible()]
    assert panel.get_title() == "degree"
    assert panel.get_xscale() == "log"  # from 4 to 512
    curves = [line for line in panel.lines if len(line.get_xdata())]
    assert len(curves) == 2
    assert list(curves[0].get_xdata()) == [4, 64, 512]
    assert list(curves[0].get_ydata()) == pytest.approx([1 / width + 0.01 for width in (4, 64, 512)])
    assert [text.get_text() for text in drawn.legends[0].texts] == ["a", "b"]


def test_a_measured_axis_takes_its_means():
    rows = [row("a", width, seed, 0.1, l0=width + seed) for width in (4, 8) for seed in (0, 2)]
    drawn = figure(rows, {"hedging/degree": "degree"}, "title", FigureOptions("l0"))
    assert list(drawn.axes[0].lines[0].get_xdata()) == [5, 9]


def test_names_stand_on_an_axis_in_their_order():
    rows = [Row("", {"text": name, "k": k}, None, "r", {"val/mse": k}) for name in ("z", "a") for k in (1, 2)]
    assert figure(rows, {"val/mse": "mse"}, "title", FigureOptions()).axes[0].get_xlabel() == "k"
    drawn = figure(rows, {"val/mse": "mse"}, "title", FigureOptions("text"))
    assert [tick.get_text() for tick in drawn.axes[0].get_xticklabels()] == ["z", "a"]
    assert [text.get_text() for text in drawn.legends[0].texts] == ["k 1", "k 2"]


def test_nothing_to_draw_draws_nothing():
    assert figure(ROWS, {"absent": "absent"}, "title", FigureOptions()) is None
    alone = [Row("", {}, None, "r", {"val/mse": math.pi})]
    assert figure(alone, {"val/mse": "mse"}, "title", FigureOptions()) is not None


def test_without_axes_every_line_is_a_row():
    rows = [Row(line, {}, seed, "r", {"val/mse": seed / 2}) for line in ("plain", "levels") for seed in (1, 2)]
    (axes,) = figure(rows, {"val/mse": "mse", "absent": "absent"}, "title", FigureOptions()).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["plain", "levels"]
    assert [text.get_text() for text in axes.texts] == ["0.75", "0.75"]


@pytest.mark.parametrize("key", ["data.init_args.batch_size", "data.init_args.base.init_args.batch_size"])  # of wrapped data
def test_learning_curves_are_drawn_against_samples_a_line_a_kind(key):
    logged = {"val/nearest_f1": [(10, 0.2), (20, 0.6)], "val/mcc": [(20, 0.5)]}
    points = {name: [SimpleNamespace(step=step, value=value) for step, value in one] for name, one in logged.items()}
    run = Run({"val/nearest_f1": 0.6, "val/mcc": 0.5}, {key: "1024", "data.init_args.llm_batch_size": "3"})
    rows = []
    for kind, seed in itertools.product(("TopK", "L1"), range(3)):
        cell = Cell(f"{kind}/seed={seed}", kind, kind, {}, seed, {}, {})
        rows += over_training(cell, run, [*logged, "val/l0"], lambda run_id, name: points[name])
    assert [(row.values["samples"], row.metrics) for row in rows[:2]] == [
        (10240, {"val/nearest_f1": 0.2}),
        (20480, {"val/nearest_f1": 0.6, "val/mcc": 0.5}),
    ]
    axes = figure(rows, {"val/nearest_f1": "F1"}, "", FigureOptions("samples")).axes[0]
    curves = [line for line in axes.get_lines() if len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in curves] == 2 * [[10240, 20480]]
    assert list(curves[0].get_ydata()) == pytest.approx([0.2, 0.6])
    assert axes.get_xlabel() == "samples"
    unknown = Run(run.data.metrics, {"data.class_path": "my.Data"})
    assert over_training(cell, unknown, [*logged], lambda run_id, name: points[name]) == []
