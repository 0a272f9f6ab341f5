"""Every command that has tensors, on a GPU without one: trained by Lightning, of a language model that lies on the GPU."""

import collections
import json
from pathlib import Path

import pytest

from hedgelab.cli import COMMANDS, main

from .test_gpu import make_language_model

pytestmark = pytest.mark.slow
NO_TENSORS = {"compare", "report", "runs", "sync", "ui", "import"}
ON_THE_CPU = {"phase": "populations of toys, whose SAEs take microseconds a step", "balance": "the same", "figures": "the same"}
"""Commands whose work stays on the CPU wherever there is a GPU, and why."""
QUIET = {"enable_progress_bar": False, "log_every_n_steps": 4}
SAE = {"class_path": "BatchTopKSAE", "init_args": {"d_sae": 64, "k": 8, "dead_after_steps": 3}}
MATRYOSHKA = {"class_path": "MatryoshkaSAE", "init_args": {"levels": [16, 64], "inner": SAE}}
JUMPRELU = {"class_path": "JumpReLUSAE", "init_args": {"d_sae": 64, "target_l0": 8}}
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with configs of fits and studies on a language model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HEDGELAB_DEBUG", "1")
    words, model = make_language_model(tmp_path / "model")
    text = " ".join(words[(7 * i + i * i) % len(words)] for i in range(6000))
    (tmp_path / "text.txt").write_text(text)
    data = {
        "model": model, "layer": 1, "text": {"class_path": "TextFiles", "init_args": {"paths": [str(tmp_path / "text.txt")]}},
        "context_length": 32, "contexts_per_block": 16, "contexts_at_once": 8, "batch_size": 64, "val_batches": 2,
        "held_out": 0.2, "normalisation": "centred",
    }  # fmt: skip
    llm = {"class_path": "LLMDataModule", "init_args": data}
    fit = {"seed_everything": 0, "trainer": {"max_steps": 8, **QUIET}, "data": llm, "model": SAE}
    plant = {
        "widths": [12], "steps": 8, "parents": 4, "silent": 2, "seeds": 1, "batches": 4, "rates": [0.001, 0.999],
        "magnitude": 2.0, "doses": [0.0, 0.8], "parent_steps": 8, "n_new": 2, "continued_steps": 4, "loss_contexts": 2,
    }  # fmt: skip
    cells = {"command": "fit", "base": "fit.yaml", "axes": {"model.k": [4, 8], "seed": [0]}}
    trees = {
        "fit": fit, "hedge": fit | {"hedge": {"n_new": 1, "new_norm": 3.0, "seeds": 1}}, "sweep": {"sweep": cells},
        "plant": {"data": llm, "parents": SAE, "kinds": {"BatchTopK": SAE, "matryoshka": MATRYOSHKA}, "plant": plant},
        "cache": {"data": llm},
    }  # fmt: skip
    for name, tree in trees.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(tree))
    return tmp_path


def run(*words: str) -> None:
    assert main([*words]) == 0, words


def test_every_command_is_walked_or_has_no_tensors():
    source = Path(__file__).read_text()
    assert all(f'"{name}"' in source for name in COMMANDS.keys() - {"validate"})


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("model", [SAE, MATRYOSHKA, JUMPRELU], ids=lambda model: model["class_path"])
def test_fit(gpu, here, precision, model):
    """Between its logging intervals, a fit waits for nothing but a look at which latents may die."""
    tree = json.loads((here / "fit.yaml").read_text())
    tree["trainer"] |= {"precision": precision, "max_steps": 16, "log_every_n_steps": 16, "limit_val_batches": 0}
    (here / "fit.yaml").write_text(json.dumps(tree | {"model": model, "checkpoint": {"every_n_train_steps": 16}}))
    run("fit", "--config=fit.yaml")
    often = {wait: count for wait, count in collections.Counter(gpu.waits).items() if count >= 14}
    # Lightning itself moves the optimiser's states in the end.
    assert not {wait for wait in often if not wait.startswith(("data/llm/", "cli/lightning.py:__init__"))}
    (checkpoint,) = here.rglob("last.ckpt")
    for command in ("validate", "test"):
        run(command, "--config=fit.yaml", f"--ckpt_path={checkpoint}")


def test_hedge_and_its_case_study(gpu, here):
    run("hedge", "--config=hedge.yaml")
    assert list(here.rglob("case_study/seed0.html"))


def test_sweep_evaluate_and_export(gpu, here):
    run("cache", "--config=cache.yaml", "--data.cache=activations")
    run("sweep", "--config=sweep.yaml")
    run("fit", "--config=fit.yaml", "--name=one")
    # The suites with texts of their own: tests/data/llm/test_second_device.py.
    run("evaluate", "one", "--suite=density,geometry,loss_recovered", "--rows=128", "--loss_contexts=2")
    run("export", "one", "--to=out")


def test_plant(gpu, here):
    run("plant", "--config=plant.yaml")


def test_trial(gpu, here):
    small = ["--trial.widths=[4]", "--trial.steps=3", "--trial.continued_steps=3", "--trial.seeds=1", "--trial.n_new=2"]
    small += ["--trial.val_batches=2", "--data.init_args.batch_size=32", "--data.init_args.device=cuda"]
    topk = "{topk: {class_path: TopKSAE, init_args: {k: 2, auxiliary_coefficient: 0.0}}}"
    run("trial", f"--config={CONFIGS}/toy/degree_trial_hard.yaml", *small, "--kinds", topk)
