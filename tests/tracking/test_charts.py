"""Where ``hedgelab ui`` opens MLflow's pages (looked at in a browser with MLflow 3.17)."""

import json
from urllib.parse import parse_qs

import pytest

from hedgelab.cli import main, ui
from hedgelab.errors import UserError
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.charts import page
from hedgelab.tracking.store import ensure_store


def part(parent, name, params, metrics):
    tracker = parent.child(name, {})
    tracker.log_hyperparams({"model": params})
    tracker.log_metrics(metrics, 9)
    tracker.finalize("success")


@pytest.fixture
def sweep(uri):
    tracker = MLflowTracker("toys", "a sweep", uri=uri)
    for k in (2, 4):
        part(tracker, f"k={k}", {"k": k, **({"l1": 0.1} if k == 2 else {})}, {"val/l0": k, "val/mcc": 0.5, "val/mse": 1 / k})
    tracker.finalize("success")
    return tracker


def views(uri):
    tags = ensure_store(uri).get_experiment_by_name("toys").tags
    return {key.rpartition(".")[2]: json.loads(tag) for key, tag in tags.items() if "sharedViewState" in key}


def test_a_sweep_opens_on_charts_of_what_differs_among_its_cells(uri, sweep):
    path, _, query = page().partition("?")
    assert path == f"/#/experiments/{ensure_store(uri).get_run(sweep.run_id).info.experiment_id}/runs"
    said = {key: values[0] for key, values in parse_qs(query).items()}
    assert said["workflowType"] == "machine_learning"
    assert said["compareRunsMode"] == "CHART"
    view = views(uri)[said["viewStateShareKey"]]
    assert sweep.run_id in view["searchFilter"]
    parallel, *scatters = view["compareRunCharts"]
    assert parallel["selectedParams"] == ["model.k"]  # not what one of them lacks
    assert [(one["xaxis"]["key"], one["yaxis"]["key"]) for one in scatters] == [("model.k", "val/l0"), ("model.k", "val/mse")]
    assert view["orderByKey"] == "metrics.`val/l0`"
    assert {one["metricSectionId"] for one in view["compareRunCharts"]} == {view["compareRunSections"][0]["uuid"]}


def test_cells_that_differ_in_words_get_bars(uri):
    tracker = MLflowTracker("toys", "words", uri=uri)
    for kind in ("a", "b"):
        part(tracker, kind, {"kind": kind}, {"val/l0": ord(kind)})
    page("words")
    (view,) = views(uri).values()
    assert [one["type"] for one in view["compareRunCharts"]] == ["PARALLEL", "BAR"]


def test_any_other_run_opens_on_the_list(uri, sweep):
    assert page("k=2").endswith("/runs?workflowType=machine_learning")
    assert views(uri) == {}
    with pytest.raises(UserError, match="no run 'nothing'"):
        page("nothing")


def test_a_store_without_runs_opens_at_its_front(uri):
    assert page() == ""


def test_the_command_prints_the_address(uri, sweep, monkeypatch, capsys):
    monkeypatch.setattr(ui, "serve", lambda command: 0)
    monkeypatch.setattr(ui, "check_port", lambda host, port: None)
    assert main(["ui", "k=2"]) == 0
    assert "open http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning  (" in capsys.readouterr().out
