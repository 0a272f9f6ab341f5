import json

import pytest

from hedgelab.errors import UserError
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.runs import as_json, format_table, list_runs


@pytest.fixture
def runs(uri):
    for name, experiment, mcc, status in (("one", "a", 0.5, "success"), ("two", "b", float("nan"), "failed")):
        tracker = MLflowTracker(experiment, run_name=name, uri=uri, tags={"kind": "test"})
        tracker.log_hyperparams({"model": {"k": 3}})
        tracker.log_metrics({"val/mcc": mcc, "val/explained_variance": 0.91234, "samples/s": 123456.7}, 10)
        tracker.finalize(status)
    return uri


def test_newest_first_with_all_that_was_logged(runs):
    two, one = list_runs()
    assert [(run.name, run.experiment, run.status) for run in (one, two)] == [
        ("one", "a", "FINISHED"),
        ("two", "b", "FAILED"),
    ]
    assert one.params == {"model.k": "3"}
    assert one.tags == {"kind": "test"}
    assert one.metrics["val/mcc"] == 0.5
    assert one.duration_seconds >= 0


def test_selection(runs):
    assert [run.name for run in list_runs(last=True)] == ["two"]
    assert [run.name for run in list_runs(limit=1)] == ["two"]
    assert [run.name for run in list_runs(experiment="a")] == ["one"]
    with pytest.raises(UserError, match=r"no 'c' in the store; it has Default, a, b"):
        list_runs(experiment="c")


def test_last_is_the_newest_run_that_is_not_part_of_another(runs):
    parent = MLflowTracker("a", run_name="parent", uri=runs)
    child = parent.child("part", {"kind": "test"})
    for tracker in (parent, child):
        tracker.log_metrics({"val/mcc": 1.0}, 1)
        tracker.finalize("success")
    assert child.name == "a"
    assert {run.name for run in list_runs(limit=2)} == {"parent", "part"}
    assert [run.name for run in list_runs(last=True)] == ["parent"]


def test_json_is_strict(runs):
    document = json.loads(as_json(list_runs()), parse_constant=pytest.fail)
    assert document[0]["metrics"]["val/mcc"] is None
    assert {"name", "run_id", "status", "params", "tags", "metrics", "start", "duration_seconds"} <= set(document[1])
    assert document[1]["metrics"]["val/explained_variance"] == 0.91234


def test_table_shows_key_numbers_and_no_empty_columns(runs):
    header, two, one = format_table(list_runs()).splitlines()
    assert header.split("  ")[0] == "run"
    assert "MCC" in header
    assert "absorption" not in header
    assert one.index("0.912") == header.index("expl. var.")
    assert one.index("123,457") == header.index("samples/s")
    assert "failed" in two


def test_no_store_and_no_runs(uri, tmp_path):
    assert format_table(list_runs()) == "no runs yet"
    with pytest.raises(UserError, match=r"no store at .*hedgelab fit"):
        list_runs(uri=f"sqlite:///{tmp_path}/absent.db")
    assert not (tmp_path / "absent.db").exists()
