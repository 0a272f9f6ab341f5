import json
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hedgelab.data.toy import ConditionalFiring, ToyDataModule
from hedgelab.metrics.functional.recovery import decoder_cosines, encoder_cosines
from hedgelab.saes import VanillaSAE, load_sae, weights_sha256
from hedgelab.tracking import MLflowTracker, RunRecord
from hedgelab.tracking.listing import as_json
from hedgelab.tracking.runs import list_runs


def fit(uri, max_steps, run_id=None, checkpoint=None, d_sae=2):
    L.seed_everything(1, verbose=False)
    data = ToyDataModule(ConditionalFiring([0.25, {"f0": 0.2, "otherwise": 0.0}]), d_in=8, seed=0, batch_size=32)
    sae = VanillaSAE(8, d_sae, 1e-3, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    trainer = L.Trainer(
        max_steps=max_steps,
        logger=MLflowTracker(uri=uri, run_id=run_id),
        callbacks=[RunRecord(), ModelCheckpoint(every_n_train_steps=20, save_last=True)],
        log_every_n_steps=10,
        val_check_interval=20,
        num_sanity_val_steps=0,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(sae, datamodule=data, ckpt_path=checkpoint)
    return trainer, sae


@pytest.fixture
def finished(uri):
    return fit(uri, 60)


def test_run_holds_all_that_was_promised(finished, uri):
    trainer, sae = finished
    run = trainer.logger.experiment.get_run(trainer.logger.run_id)
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    assert run.info.status == "FINISHED"
    assert {"version.torch", "version.mlflow", "host", "hardware.cpu", "world_size"} <= set(run.data.tags)
    assert run.data.tags["weights_sha256"] == weights_sha256(folder / "sae")
    model = trainer.logger.experiment.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert (model.params["class"], str(model.status)) == ("VanillaSAE", "READY")
    assert "val/mse" in {metric.key for metric in model.metrics}
    assert torch.equal(load_sae(folder / "sae").W_dec, sae.W_dec)
    figures = {"cosines.png", "decoder_bias.png", "cosines_over_training.png", "loss_terms.png"}
    assert {path.name for path in (folder / "figures").iterdir()} == figures
    directions = trainer.datamodule.feature_directions
    for name, cosines in (
        ("decoder_cos", decoder_cosines(sae.folded().W_dec, directions)),
        ("encoder_cos", encoder_cosines(sae.folded().W_enc, directions)),
    ):
        for i in range(2):
            for j in range(2):
                logged = run.data.metrics[f"latent{i}/{name}/feature{j}"]
                assert logged == pytest.approx(float(cosines[i, j]), abs=1e-6)
    assert run.data.metrics["b_dec_norm"] == pytest.approx(float(sae.b_dec.detach().norm()), rel=1e-6)
    rates = trainer.logger.experiment.get_metric_history(trainer.logger.run_id, "samples/s")
    assert [point.step for point in rates] == [10, 20, 30, 40, 50, 60]
    assert all(point.value > 0 for point in rates)
    assert run.data.metrics["data/seconds_per_batch"] > 0
    summary = json.loads(as_json(list_runs(last=True)))[0]
    assert summary["tags"]["weights_sha256"] == run.data.tags["weights_sha256"]


def test_resumed_run_keeps_the_history_of_its_figures(finished, uri):
    trainer, _ = finished
    run_id = trainer.logger.run_id
    checkpoint = trainer.checkpoint_callback.last_model_path
    state = next(
        value for key, value in torch.load(checkpoint, weights_only=True)["callbacks"].items() if key.startswith("RunRecord")
    )
    assert state["run_id"] == run_id
    resumed, _ = fit(uri, 100, run_id, checkpoint)
    record = next(callback for callback in resumed.callbacks if isinstance(callback, RunRecord))
    assert record._cosines.steps[0] == 0
    assert record._cosines.steps[-1] == 100
    assert resumed.logger.losses.steps == list(range(10, 101, 10))
    history = resumed.logger.experiment.get_metric_history(run_id, "train/loss")
    assert [point.step for point in history] == list(range(10, 101, 10))


def test_one_latent(uri):
    trainer, sae = fit(uri, 20, d_sae=1)
    metrics = trainer.logger.experiment.get_run(trainer.logger.run_id).data.metrics
    assert {key for key in metrics if key.startswith("latent")} == {
        f"latent0/{side}_cos/feature{j}" for side in ("decoder", "encoder") for j in (0, 1)
    }
    assert sae.d_sae == 1


def test_without_a_tracker_nothing_happens(uri, tmp_path):
    record = RunRecord()
    data = ToyDataModule(ConditionalFiring([0.25]), d_in=4, seed=0, batch_size=8)
    sae = VanillaSAE(4, 1, 1e-3, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3))
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    L.Trainer(max_steps=5, logger=False, callbacks=[record], accelerator="cpu", **options).fit(sae, datamodule=data)
    assert list_runs() == []
