"""What ``hedgelab/README.md`` shows to add, added from outside: command line, sweep, store and help follow by themselves."""

import io
import json
import re
import sys
from contextlib import redirect_stdout

import pytest

from hedgelab.cli import main
from tests.docs.generated import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "hedgelab/README.md").read_text(), flags=re.DOTALL)
FIT = """\
seed_everything: 0
trainer: {max_steps: 6, log_every_n_steps: 3, accelerator: cpu}
data:
  class_path: ToyDataModule
  init_args: {d_in: 16, batch_size: 32, val_batches: 2, firing: {class_path: my_parts.RingFiring, init_args: {size: 8}}}
model:
  class_path: my_parts.BareTopKSAE
  init_args: {d_sae: 8, k: 2, mitigations: [{class_path: my_parts.TiedWeights, init_args: {weight: 0.5}}]}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the README's classes as a module of the user's, and an empty store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "my_parts.py").write_text("\n".join(BLOCKS))
    (tmp_path / "fit.yaml").write_text(FIT)
    monkeypatch.setattr("hedgelab.metrics.ValidationMetric.declared", {})
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_parts", None)


def said(*words):
    """Exit code and standard output of a command."""
    with redirect_stdout(io.StringIO()) as out:
        code = main(list(words))
    return code, out.getvalue()


def last_run():
    return json.loads(said("runs", "--last", "--json")[1])[0]


def test_own_sae_loss_term_and_toy_in_a_fit_and_a_sweep(here):
    code, out = said("fit", "--config", "fit.yaml")
    assert code == 0, out
    run = last_run()
    assert run["metrics"]["train/untied"] > 0
    assert run["metrics"]["val/detector_f1"] >= 0  # truth is known, so it is measured
    assert any("TiedWeights" in str(value) for value in run["params"].values())
    (here / "sweep.yaml").write_text(
        "sweep: {axes: {model.mitigations.weight: [0.5, 2]}, figure: {x: model.mitigations.weight}}\n" + FIT
    )
    code, out = said("sweep", "--config", "sweep.yaml")
    assert code == 0, out
    assert "2 of 2 cells done" in out


def test_a_wrong_key_of_an_own_class_is_one_line(here, capsys):
    (here / "fit.yaml").write_text(FIT.replace("weight", "wieght"))
    assert main(["fit", "--config", "fit.yaml"]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert "'weight'" in line


def test_an_own_metric_named_in_a_config_is_in_the_store(here):
    callback = {"class_path": "hedgelab.training.own_metrics.OwnMetrics", "init_args": {"metrics": ["my_parts.LargestShare"]}}
    code, out = said("fit", "--config", "fit.yaml", "--trainer.callbacks", json.dumps([callback]))
    assert code == 0, out
    assert 0.5 <= last_run()["metrics"]["val/largest_share"] <= 1  # k = 2


def test_an_own_protocol_is_a_command(here):
    (here / "widths.yaml").write_text("widths: [4, 8]\nsteps: 5\n")
    code, out = said("my_parts.WidthStudy", "--help")
    assert code == 0
    assert "Numbers of latents" in out
    code, out = said("my_parts.WidthStudy", "--config", "widths.yaml")
    assert code == 0, out
    assert last_run()["metrics"]["best_loss"] > 0
