"""An SAE class of one's own, and a checkpoint: exported, evaluated, or refused in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hedgelab.cli import main
from hedgelab.interop.saelens import import_saelens
from hedgelab.saes import TopKSAE, load_sae
from tests.saes.comparison import same_weights

OWN = '''
"""SAE classes from outside of the package."""

import torch
from hedgelab.saes import TopKSAE


class Logged(TopKSAE):
    """A TopK SAE that keeps a note."""

    note = "mine"


class Doubled(TopKSAE):
    """Reads twice its activations."""

    def encode(self, x):
        return super().encode(2 * x)
'''
SAVE = "from hedgelab.saes import save_sae; import own_saes as o; save_sae(o.{0}(6, 3, k=2), '{0}')"


@pytest.fixture
def place(config, tmp_path, monkeypatch):
    """The working folder with SAEs of both classes, saved by a process of their own, so that nothing is imported here."""
    (tmp_path / "own_saes.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    for name in ("Logged", "Doubled"):
        script, where = SAVE.format(name), {**os.environ, "PYTHONPATH": paths}
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=where, check=True, timeout=300)
    yield tmp_path
    sys.modules.pop("own_saes", None)


@pytest.mark.slow
def test_an_sae_of_ones_own_class_is_exported_and_evaluated(place, capsys):
    assert main(["export", "Logged", "--to", "out"]) == 2
    assert "'own_saes.Logged' is not imported" in capsys.readouterr().err
    assert main(["export", "Logged", "--to", "out", "--class", "own_saes.Missing"]) == 2
    assert "--class: cannot import 'own_saes.Missing'" in capsys.readouterr().err
    assert main(["export", "Logged", "--to", "out", "--class", "own_saes.Logged"]) == 0
    with torch.no_grad():
        x = torch.randn(8, 6)
        torch.testing.assert_close(import_saelens("out")[0](x), load_sae("Logged")(x))
    assert main(["export", "Doubled", "--to", "no", "--class", "own_saes.Doubled"]) == 2
    told = capsys.readouterr().err
    assert "SAELens knows nothing that computes what Doubled does; --format hedgelab keeps it" in told
    assert main(["export", "Doubled", "--to", "kept", "--class", "own_saes.Doubled", "--format", "hedgelab"]) == 0
    assert same_weights(load_sae("kept"), load_sae("Doubled"))
    toy = ["--data.class_path=ToyDataModule", "--data.d_in=6", "--data.firing.class_path=IndependentFiring"]
    toy += ["--data.firing.probabilities=[0.4,0.5]", "--suite", "density", "--rows", "64"]
    assert main(["evaluate", "Doubled", *toy, "--class", "own_saes.Doubled"]) == 0
    assert "density/l0" in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkpoint_becomes_a_folder(place, capsys):
    words = ["fit", "--config=tiny.yaml", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    assert main([*words, "--trainer.max_steps=3"]) == 0
    (checkpoint,) = place.rglob("*.ckpt")
    capsys.readouterr()
    assert main(["export", str(checkpoint), "--to", "kept", "--format", "hedgelab"]) == 0
    assert main(["export", str(checkpoint), "--to", "out"]) == 0
    printed = capsys.readouterr().out
    assert f"TopKSAE of {checkpoint} → out: topk, 6 × 3" in printed
    assert "no model and hook are known of it" in printed
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert type(load_sae("kept")) is TopKSAE
    assert torch.equal(load_sae("kept").W_dec, weights["W_dec"])
    torch.testing.assert_close(import_saelens("out")[0].W_enc, weights["W_enc"])
    assert main(["export", str(checkpoint), "--to", "other", "--member", "b"]) == 2
    (place / "broken.ckpt").write_bytes(b"broken")
    assert main(["export", "broken.ckpt", "--to", "other"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 2
    assert json.loads((place / "out/cfg.json").read_text())["architecture"] == "topk"
