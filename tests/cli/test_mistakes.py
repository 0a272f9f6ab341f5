"""Every mistake: exit code 2, one line on stderr, which names the key and says what would be right."""

from pathlib import Path

import pytest

from hedgelab.cli import main

MATRYOSHKA = """\
  class_path: MatryoshkaSAE
  init_args:
    levels: [1, 3]
    inner:
      class_path: TopKSAE
      init_args: {d_sae: 3, k: 2}
"""

# What is replaced in the config, by what; what the line must contain.
IN_FILE = {
    "unknown section": ("trainer:", "trainr:", ["trainr: unknown key", "'trainer'"]),
    "unknown trainer key": ("max_steps", "max_step", ["trainer.max_step: unknown key", "'max_steps'"]),
    "unknown model key": ("k: 2", "kk: 2", ["model.kk: unknown key", "'k'"]),
    "unknown key of a class in a class": (
        "probabilities",
        "probabilites",
        ["data.firing.probabilites", "'probabilities'"],
    ),
    "wrong type": ("k: 2", "k: two", ["model.k: expected int", "'two'"]),
    "wrong type of a trainer key": ("max_steps: 6", "max_steps: many", ["trainer.max_steps: expected int", "'many'"]),
    "wrong type in a list": ("0.2", "often", ["data.firing.probabilities[1]: expected float", "'often'"]),
    "wrong type at the top": ("seed_everything: 1", "seed_everything: one", ["seed_everything: expected", "'one'"]),
    "unknown choice": ("k: 2", "k: 2\n    init: {encoder: copy}", ["model.init.encoder", "'transpose'"]),
    "unknown model class": ("TopKSAE", "TopkSAE", ["model: unknown class 'TopkSAE'", "'TopKSAE'"]),
    "unknown data class": ("ToyDataModule", "ToyData", ["data: unknown class 'ToyData'", "'ToyDataModule'"]),
    "unknown class in a class": (
        "IndependentFiring",
        "IndependntFiring",
        ["data.firing: unknown", "'IndependentFiring'"],
    ),
    "class of the wrong kind": ("TopKSAE", "ToyDataModule", ["model: unknown class 'ToyDataModule'"]),
    "arguments beside the class": ("  init_args:\n    d_sae: 3\n    k: 2", "  d_sae: 3", ["model.d_sae", "init_args"]),
    "section that is no mapping": (
        CONFIG_MODEL := "class_path: TopKSAE\n  init_args:\n    d_sae: 3\n    k: 2",
        "- 3",
        ["model"],
    ),
    "missing argument": ("    d_sae: 3\n", "", ["model.d_sae: is required", "int"]),
    "impossible value": ("d_sae: 3", "d_sae: -3", ["model.d_sae: must be at least 1, got -3"]),
    "impossible value in a class": ("0.2", "2.0", ["data.firing.probabilities[1]", "2.0"]),
    "linked key": ("d_sae: 3", "d_sae: 3\n    d_in: 6", ["model.d_in: is taken from the data"]),
    "no such interpolated key": ("k: 2", "k: ${data.init_args.d_inn}", ["model.k", "'${data.init_args.d_in}'"]),
    "no such environment variable": ("k: 2", "k: ${oc.env:HEDGELAB_NOPE}", ["model.k", "HEDGELAB_NOPE"]),
    "broken interpolation": ("k: 2", "k: ${data.init_args", ["model.k: cannot resolve"]),
    "invalid YAML": ("k: 2", "k: [2", ["invalid YAML in 'wrong.yaml', line "]),
    "unknown key in the inner SAE": (
        f"  {CONFIG_MODEL}\n",
        MATRYOSHKA.replace("k: 2", "kk: 2"),
        ["model.inner.kk", "'k'"],
    ),
    "impossible value in the inner SAE": (
        f"  {CONFIG_MODEL}\n",
        MATRYOSHKA.replace("d_sae: 3", "d_sae: 0"),
        ["model.inner.d_sae"],
    ),
    "unknown key of a callback": (
        "trainer:",
        "trainer:\n  callbacks: [{class_path: EarlyStopping, init_args: {monitr: x}}]",
        ["trainer.callbacks[0].monitr", "'monitor'"],
    ),
    "no end": ("max_steps: 6", "max_steps: -1", ["trainer.max_steps: must be set"]),
}

ON_COMMAND_LINE = {
    "unknown trainer key": (["--trainer.max_step=3"], ["trainer.max_step", "'max_steps'"]),
    "unknown model key": (["--model.kk", "3"], ["model.kk", "'k'"]),
    "unknown option": (["--nope"], ["nope: unknown key"]),
    "stray word": (["stray"], ["'stray'"]),
    "wrong type": (["--model.k=x"], ["model.k: expected int", "'x'"]),
    "no value": (["--model.d_sae"], ["model.d_sae"]),
    "linked key": (["--model.d_in=5"], ["model.d_in: is taken from the data"]),
    "linked key in full": (["--model.init_args.d_in", "5"], ["model.d_in: is taken from the data"]),
    "unknown optimiser": (["--model.optimizer=Adm"], ["model.optimizer: unknown class 'Adm'", "'Adam'"]),
    "unknown key of the optimiser": (
        ["--model.optimizer=Adam", "--model.optimizer.lrr=1"],
        ["model.optimizer.lrr", "'lr'"],
    ),
    "unknown key of the tracker": (["--trainer.logger.experimnt=x"], ["trainer.logger.experimnt", "'experiment'"]),
    "unknown precision": (["--trainer.precision=12"], ["trainer.precision", "'bf16-mixed'", "12"]),
    "unknown accelerator": (["--trainer.accelerator=cpp"], ["trainer:", "'cpp'", "cuda"]),
    "unknown checkpoint key": (["--checkpoint.save_lst=true"], ["checkpoint.save_lst", "'save_last'"]),
    "missing checkpoint": (["--ckpt_path=nope.ckpt"], ["ckpt_path", "nope.ckpt"]),
    "missing second config": (["--config=tinny.yaml"], ["--config", "tinny.yaml", "'tiny.yaml'"]),
    "config without a file": (["--config"], ["--config: expected a file"]),
}

ELSEWHERE = {
    "unknown command": (["fti"], ["'fti'", "'fit'"]),
    "nothing given": (["fit"], ["model: is required"]),
    "no data": (["fit", "--model=TopKSAE", "--model.d_sae=3", "--model.k=1"], ["data: is required"]),
    "nothing to validate": (["validate", "--config=tiny.yaml"], ["ckpt_path"]),
    "unknown option of runs": (["runs", "--limt=3"], ["--limt", "'--limit'"]),
    "impossible limit": (["runs", "--limit=0"], ["--limit"]),
    "no store to list": (["runs"], ["mlflow.db"]),
    "no store to show": (["ui"], ["mlflow.db"]),
    "wrong port": (["ui", "--port=x"], ["--port", "'x'"]),
    "wrong option of ui": (["ui", "--hst=x"], ["--hst", "'--host'"]),
}


@pytest.fixture(autouse=True)
def _no_store(monkeypatch):
    monkeypatch.setattr("hedgelab.cli.fit.prepare_store_in_background", lambda: None)


def check(words, expected, capsys):
    code = main(words)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line]
    assert code == 2, printed.err
    assert len(lines) == 1, printed.err
    assert all(part in lines[0] for part in expected), lines[0]
    assert not printed.out


@pytest.mark.parametrize("name", IN_FILE)
def test_mistake_in_a_file(name, config, capsys):
    old, new, expected = IN_FILE[name]
    assert old in config
    Path("wrong.yaml").write_text(config.replace(old, new, 1))
    check(["fit", "--config", "wrong.yaml", "--trainer.logger=false"], expected, capsys)


@pytest.mark.parametrize("name", ON_COMMAND_LINE)
def test_mistake_on_the_command_line(name, config, capsys):
    words, expected = ON_COMMAND_LINE[name]
    check(["fit", "--config=tiny.yaml", *words], expected, capsys)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_mistake_elsewhere(name, config, capsys):
    words, expected = ELSEWHERE[name]
    check(words, expected, capsys)


def test_config_that_is_a_list(config, capsys):
    Path("list.yaml").write_text("- 1\n")
    check(["fit", "--config=list.yaml"], ["list.yaml", "mapping", "list"], capsys)


def test_debugging_shows_the_traceback(config, capsys, monkeypatch):
    monkeypatch.setenv("HEDGELAB_DEBUG", "1")
    assert main(["fit", "--config=nope.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_bugs_show_a_traceback(config, capsys, monkeypatch):
    monkeypatch.setattr("hedgelab.cli.fit.compose", lambda words: 1 / 0)
    assert main(["fit"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_interrupt(config, capsys, monkeypatch):
    def interrupt(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("hedgelab.cli.fit.compose", interrupt)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == "hedgelab: interrupted\n"
