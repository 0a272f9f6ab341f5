import json

import pytest

from hedgelab.errors import UserError
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.listing import as_json, format_table
from hedgelab.tracking.runs import artifact, list_runs, resolve_run, resolve_sae


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
    assert [(run.name, run.experiment, run.status) for run in (one, two)] == [("one", "a", "FINISHED"), ("two", "b", "FAILED")]
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


def test_the_table_shows_a_hedging_degree_which_belongs_to_no_stage(runs):
    tracker = MLflowTracker("a", run_name="hedge", uri=runs)
    tracker.log_metrics({"hedging/degree": 0.125}, 1)
    tracker.finalize("success")
    header, hedge, *_ = format_table(list_runs()).splitlines()
    assert hedge.index("0.125") == header.index("hedging degree")


def test_no_store_and_no_runs(uri, tmp_path, monkeypatch):
    assert format_table(list_runs()) == "no runs yet"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/absent.db")
    with pytest.raises(UserError, match=r"no store at .*hedgelab fit"):
        list_runs()
    assert not (tmp_path / "absent.db").exists()


@pytest.fixture
def kept(runs, tmp_path):
    """A run that kept an SAE, with a part of it that did too, then a newer run that did not."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "sae.json").write_text("{}")
    parent = MLflowTracker("a", run_name="trained", uri=runs)
    for tracker in (parent, parent.child("part", {})):
        tracker.log_artifact(tmp_path / "made", "sae")
        tracker.log_tags({"weights_sha256": "0"})
        tracker.finalize("success")
    other = MLflowTracker("a", run_name="table", uri=runs)
    other.log_metrics({"val/mcc": 1.0}, 1)
    other.finalize("success")
    return parent.run_id


def test_a_run_by_any_of_its_names(kept):
    assert resolve_run("last").name == "table"
    assert resolve_run("last", with_sae=True).run_id == kept
    for word in ("trained", kept, kept[:8]):
        assert resolve_run(word).run_id == kept
    with pytest.raises(UserError, match="no run 'nonsuch' in the store"):
        resolve_run("nonsuch")
    with pytest.raises(UserError, match="no run that kept an SAE 'table'"):
        resolve_run("table", with_sae=True)
    with pytest.raises(UserError, match=r"no run 'o\'neill'"):
        resolve_run("o'neill")


def test_the_newest_of_one_name(runs):
    for value in (1.0, 2.0):
        tracker = MLflowTracker("a", run_name="twice", uri=runs)
        tracker.log_metrics({"val/mcc": value}, 1)
        tracker.finalize("success")
    assert resolve_run("twice").metrics["val/mcc"] == 2.0


def test_an_sae_of_a_run_or_a_folder(kept, tmp_path):
    found = resolve_sae(kept[:8])
    assert (found.folder / "sae.json").read_text() == "{}"
    assert found.run.run_id == kept
    assert resolve_sae(str(tmp_path / "made")).folder == tmp_path / "made"
    assert resolve_sae(str(tmp_path / "made")).run is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no sae.json"):
        resolve_sae(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="cannot get its artifact 'nothing'"):
        artifact(found.run, "nothing")
