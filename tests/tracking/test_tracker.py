import pickle
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from hedgelab.data.llm import LLMDataModule
from hedgelab.errors import UserError
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.spool import Spool


def artifact(tracker, name):
    run = tracker.experiment.get_run(tracker.run_id)
    return Path(run.info.artifact_uri.removeprefix("file://")) / name


def test_a_run_from_start_to_end(uri, tmp_path):
    tracker = MLflowTracker("toys", run_name="first", tags={"why": "test"}, description="A note.", uri=uri)
    for step in range(300):
        tracker.log_metrics({"train/loss": 1.0 / (step + 1), "val/x@[0]": step}, step)
    tracker.log_config("model: {}\n")
    tracker.log_figure(Figure(), "figures/empty.png")
    client = tracker.experiment
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    tracker.finalize("success")

    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert client.get_experiment(run.info.experiment_id).name == "toys" == tracker.name
    assert run.data.tags["why"] == "test"
    assert run.data.tags["mlflow.note.content"] == "A note."
    assert len(run.data.tags["config_hash"]) == 16
    history = client.get_metric_history(tracker.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1.0 / (step + 1)) for step in range(300)]
    assert run.data.metrics["val/x_0_"] == 299
    assert artifact(tracker, "config.yaml").read_text() == "model: {}\n"
    assert artifact(tracker, "figures/empty.png").read_bytes().startswith(b"\x89PNG")
    assert artifact(tracker, "").is_relative_to(tmp_path / "runs" / "artifacts" / "toys")
    assert (tracker.save_dir, tracker.version) == (str(tmp_path / "runs"), tracker.run_id)


def test_long_and_odd_parameters(uri):
    tracker = MLflowTracker(uri=uri)
    long = "x" * 20_000
    tracker.log_hyperparams({"model": {"k": 3, "text": long}, **{f"p{i}": i for i in range(150)}})
    params = tracker.experiment.get_run(tracker.run_id).data.params
    assert len(params) == 152
    assert params["model.k"] == "3"
    assert "params/model.text.txt" in params["model.text"]
    assert artifact(tracker, "params/model.text.txt").read_text() == long


def datasets(tracker):
    return tracker.experiment.get_run(tracker.run_id).inputs.dataset_inputs


def test_the_data_are_an_input_of_the_run_once(uri):
    llm = {"class_path": f"{LLMDataModule.__module__}.LLMDataModule", "init_args": {"model": "m", "layer": 3}}
    found = {}
    changes = {"plain": {}, "how": {"device": "cuda", "chunk_steps": 9}, "other": {"layer": 4}}
    for name, change in changes.items():
        tracker = MLflowTracker(uri=uri)
        tracker.log_hyperparams({"data": {**llm, "init_args": {**llm["init_args"], **change}}, "model": {"k": 1}})
        tracker.finalize("failed")
        (found[name],) = datasets(tracker)
    assert found["plain"].dataset.name == "LLMDataModule m 3"
    assert '"model": "m"' in found["plain"].dataset.source
    assert [(tag.key, tag.value) for tag in found["plain"].tags] == [("mlflow.data.context", "training")]
    assert found["plain"].dataset.digest == found["how"].dataset.digest != found["other"].dataset.digest
    again = MLflowTracker(uri=uri, run_id=tracker.run_id)  # the last one, resumed
    again.log_hyperparams({"data": {**llm, "init_args": {**llm["init_args"], "layer": 4}}})
    again.finalize("success")
    assert len(datasets(again)) == 1


def test_resuming_goes_on_in_the_same_run(uri):
    first = MLflowTracker(uri=uri)
    first.log_hyperparams({"k": 3, "max_steps": 10, "long": "y" * 9000})
    first.log_metrics({"train/loss": 1.0}, 10)
    first.finalize("failed")
    client, run_id = first.experiment, first.run_id
    assert client.get_run(run_id).info.status == "FAILED"

    second = MLflowTracker(uri=uri, run_id=run_id)
    second.log_hyperparams({"k": 3, "max_steps": 20, "new": None, "long": "y" * 9000})
    assert client.get_run(run_id).info.status == "RUNNING"
    second.log_metrics({"train/loss": 0.5}, 20)
    second.finalize("success")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert {key: run.data.params[key] for key in ("k", "max_steps", "new")} == {"k": "3", "max_steps": "10", "new": "null"}
    resumed = {key: value for key, value in run.data.tags.items() if key.startswith("resumed_with")}
    assert resumed == {"resumed_with.max_steps": "20"}
    assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == [10, 20]


def test_a_point_sent_twice_is_kept_once(uri):
    tracker = MLflowTracker(uri=uri)
    spool = Spool(Path(tracker.save_dir) / "spool", tracker.run_id)
    from hedgelab.tracking.spool import Operation

    for _ in range(2):
        spool.append(Operation([("a", 1.0, 123, 1), ("b", float("nan"), 123, 1)]))
    tracker._writer.send(again=True)
    assert not spool
    for key in ("a", "b"):
        assert len(tracker.experiment.get_metric_history(tracker.run_id, key)) == 1


def test_interruption_is_told_apart_from_failure(uri):
    tracker = MLflowTracker(uri=uri)
    client, run_id = tracker.experiment, tracker.run_id
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        tracker.finalize("failed")
    assert client.get_run(run_id).info.status == "KILLED"


def test_store_that_fails_in_mid_run_loses_nothing(uri, monkeypatch, caplog):
    tracker = MLflowTracker(uri=uri)
    client, run_id = tracker.experiment, tracker.run_id

    def refuse(*args, **kwargs):
        raise ConnectionError("gone")

    with monkeypatch.context() as broken:
        for method in ("log_batch", "log_artifact", "set_terminated"):
            broken.setattr(client, method, refuse)
        tracker.log_metrics({"train/loss": 1.0}, 1)
        tracker.log_text("kept", "note.txt")
        tracker.finalize("success")
    assert client.get_run(run_id).info.status == "RUNNING"
    assert Path(tracker.save_dir, "spool", f"{run_id}.jsonl").exists()

    tracker._writer.send(again=True)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 1.0)
    assert artifact(tracker, "note.txt").read_text() == "kept"
    assert not Path(tracker.save_dir, "spool", f"{run_id}.jsonl").exists()
    assert len(caplog.messages) == 1


def test_other_ranks_say_nothing(uri, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    tracker = MLflowTracker(uri="http://127.0.0.1:9")
    tracker.log_metrics({"a": 1.0}, 1)
    tracker.log_hyperparams({"a": 1})
    tracker.log_text("x", "x.txt")
    tracker.finalize("success")
    assert tracker.run_id is None


def test_travels_to_another_process_as_the_same_run(uri):
    tracker = MLflowTracker(uri=uri)
    run_id = tracker.run_id
    assert pickle.loads(pickle.dumps(tracker)).run_id == run_id


def test_mistakes_are_one_line(uri):
    with pytest.raises(UserError, match=r"^trainer.logger.run_id: no run 'nope'"):
        MLflowTracker(uri=uri, run_id="nope").log_metrics({"a": 1.0}, 1)
    with pytest.raises(UserError, match=r"^trainer.logger.buffer_points: must be at least 1, got 0"):
        MLflowTracker(uri=uri, buffer_points=0)
    tracker = MLflowTracker("gone", uri=uri)
    experiment = tracker.experiment.get_experiment_by_name("Default")
    tracker.experiment.delete_experiment(tracker.experiment.get_run(tracker.run_id).info.experiment_id)
    assert experiment is not None
    with pytest.raises(UserError, match=r"^trainer.logger.experiment: 'gone' is deleted"):
        _ = MLflowTracker("gone", uri=uri).run_id


def test_a_run_deleted_in_the_ui_is_named(uri):
    tracker = MLflowTracker("deleted", "gone", uri=uri)
    run_id = tracker.run_id
    tracker.finalize("failed")
    tracker.experiment.delete_run(run_id)
    again = MLflowTracker("deleted", uri=uri)
    again.go_on_with(run_id)
    with pytest.raises(UserError, match=f"run '{run_id}' is deleted in .*mlflow runs restore --run-id {run_id}"):
        again.log_metrics({"loss": 1.0}, 1)
