"""LISTA-Matryoshka, all of its parts in one config: trains, goes on after a stop as if there had been none, saves and loads."""

import json
import math
from pathlib import Path

import pytest
import torch

from hedgelab.cli import main
from hedgelab.cli.lightning import run_cli
from hedgelab.cli.resume import ResumableCLI
from hedgelab.saes import MatryoshkaSAE, load_sae
from tests.saes.comparison import same_weights

CONFIG = """\
seed_everything: 0
trainer: {max_steps: 90, log_every_n_steps: 10, accelerator: cpu, logger: false, enable_progress_bar: false}
data:
  class_path: ToyDataModule
  init_args:
    d_in: 24
    batch_size: 128
    val_batches: 2
    firing: {class_path: IndependentFiring, init_args: {probabilities: PROBABILITIES}}
model:
  class_path: MatryoshkaSAE
  init_args:
    levels: [2, 8, 32, 64]
    mitigations:
      - {class_path: LISTA, init_args: {eta: 0.3}}
      - class_path: DetachedInnerLevels
      - {class_path: SortedLatents, init_args: {decay: 0.9}}
      - {class_path: TiltedLoss, init_args: {tilt: 2.0e-3}}
    inner:
      class_path: BatchTopKSAE
      init_args:
        d_sae: 64
        k: 4
        k_start: 8
        k_steps: 60
        dead_after_steps: 20
        optimizer: {class_path: torch.optim.Adam, init_args: {lr: 3.0e-3}}
        lr_scheduler: {class_path: hedgelab.training.optimizers.LateDecay, init_args: {total_steps: 90, decay_steps: 30}}
""".replace("PROBABILITIES", str([round(0.4 / (1 + i) ** 0.7, 4) for i in range(32)]))


def fit(*words):
    return run_cli(ResumableCLI, "fit", ["--config=combined.yaml", *words])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("combined.yaml").write_text(CONFIG)


# Dense and sparse kernels; 90 steps train the narrow one alone.
@pytest.mark.parametrize("d_sae", [64, pytest.param(512, marks=pytest.mark.slow)])
def test_lista_matryoshka_trains_resumes_exactly_saves_and_loads(here, tmp_path, d_sae):
    wider = CONFIG.replace("levels: [2, 8, 32, 64]", f"levels: [2, 8, 32, {d_sae}]").replace("d_sae: 64", f"d_sae: {d_sae}")
    Path("combined.yaml").write_text(wider)
    undisturbed = fit("--name=whole")
    sae = undisturbed.model
    assert isinstance(sae, MatryoshkaSAE)
    metrics = {name: float(value) for name, value in undisturbed.trainer.callback_metrics.items()}
    if d_sae == 64:
        assert metrics["val/explained_variance"] > 0.5
        assert metrics["val/l0"] == pytest.approx(4, abs=1)
    assert metrics["current_k"] == 4
    assert {"train/mse/level2", f"train/mse/level{d_sae}"} <= metrics.keys()
    lista, _, ordered, _ = sae.mitigations
    assert math.isfinite(lista.thresholds.item())
    assert lista.thresholds.item() != sae.inner.threshold.item()
    assert ordered.rates.dtype == torch.float64
    assert sae.latent_order().tolist() != list(range(d_sae))

    checkpoint = "runs/checkpoints/cut"
    words = ["--name=cut", f"--checkpoint.dirpath={checkpoint}", "--checkpoint.every_n_train_steps=15"]
    fit(*words, "--trainer.max_steps=45")
    resumed = fit(*words, f"--ckpt_path={checkpoint}/last.ckpt")
    assert resumed.trainer.global_step == 90
    assert same_weights(resumed.model, sae)

    sae.save(tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae")
    assert same_weights(loaded, sae)
    assert torch.equal(loaded.latent_order(), sae.latent_order())
    x = undisturbed.datamodule.batch("val", 0).x
    assert torch.equal(loaded.encode(x).to_dense(), sae.encode(x).to_dense())
    written = json.loads((tmp_path / "sae" / "sae.json").read_text())["mitigations"]
    assert [one.pop("class") for one in written] == ["LISTA", "DetachedInnerLevels", "SortedLatents", "TiltedLoss"]
    assert written == [{"eta": 0.3, "steps": 1}, {}, {"decay": 0.9}, {"tilt": 0.002}]
    assert same_weights(MatryoshkaSAE.load_from_checkpoint(f"{checkpoint}/last.ckpt"), sae)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("eta: 0.3", "eta: 0", "model.mitigations[0].eta: must be above 0, got 0"),
        ("class_path: LISTA", "class_path: LISTTA", "model.mitigations[0]: unknown class 'LISTTA'; did you mean 'LISTA'?"),
        ("levels: [2", "detached: true\n    levels: [2", "model.detached: detaches all levels already; set it to false"),
        ("{eta: 0.3}", "{etta: 0.3}", "model.mitigations[0].etta: unknown key; did you mean 'eta'?"),
    ],
)
def test_mistakes_name_the_key(here, capsys, old, new, said):
    Path("combined.yaml").write_text(CONFIG.replace(old, new))
    assert main(["fit", "--config=combined.yaml"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
