"""``hedgelab evaluate`` of an SAE on a language model: data and normalisation come from the run."""

import json

import pytest
import yaml

from hedgelab.cli import main


@pytest.fixture
def fitted(tiny_model, tiny_text, tmp_path, monkeypatch):
    """An empty working directory with a run ``tiny`` of an SAE on the tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    text = {"class_path": "TextFiles", "init_args": {"paths": tiny_text}}
    data = {"model": tiny_model, "layer": 1, "text": text, "context_length": 16, "contexts_per_block": 20, "batch_size": 64}
    config = {
        "seed_everything": 0,
        "trainer": {"max_steps": 6, "log_every_n_steps": 3, "accelerator": "cpu", "enable_progress_bar": False},
        "data": {"class_path": "LLMDataModule", "init_args": {**data, "held_out": 0.2, "val_batches": 1}},
        "model": {"class_path": "BatchTopKSAE", "init_args": {"d_sae": 40, "k": 5}},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config=tiny.yaml", "--trainer.accelerator=cpu"]) == 0
    return tmp_path


@pytest.mark.slow
def test_a_run_is_evaluated_on_what_it_read(fitted, capsys):
    command = ["evaluate", "tiny", "--suite=density,loss_recovered", "--rows=100", "--loss_contexts=3"]
    assert main(command) == 0
    assert main(["runs", "--last", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out.split("\n[", 1)[1].join(["[", ""]))
    metrics = run["metrics"]
    assert metrics["loss_recovered/cross_entropy"] > 0
    assert metrics["density/l0"] == pytest.approx(metrics["val/l0"], rel=0.3)
    assert metrics["density/explained_variance"] == pytest.approx(metrics["val/explained_variance"], abs=0.1)
    kept = sorted((fitted / "runs/cache/evaluation").glob("*.safetensors"))
    assert kept
    folder = fitted / "runs/artifacts/hedgelab" / run["run_id"] / "artifacts/sae"
    text = ["--data.text.class_path=TextFiles", f"--data.text.paths=[{fitted / 'more.txt'}]"]  # a folder knows all but its text
    (fitted / "more.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 " * 200)
    sizes = ["--data.contexts_per_block=8", "--data.batch_size=16"]
    assert main(["evaluate", str(folder), "--suite=geometry", *text, *sizes]) == 0
    assert main(["evaluate", "tiny", "--suite=probing"]) == 2
    assert "needs labelled text; set words" in capsys.readouterr().err
