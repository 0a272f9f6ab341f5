"""Every mistake: exit code 2, one line on stderr, which names the key and says what would be right."""

import itertools
import os
import subprocess
import sys
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

QUIET = ["--trainer.enable_progress_bar=false"]
# What is replaced in the config, by what; what the line must contain.
IN_FILE = {
    "unknown section": ("trainer:", "trainr:", ["trainr: unknown key", "'trainer'"]),
    "unknown trainer key": ("max_steps", "max_step", ["trainer.max_step: unknown key", "'max_steps'"]),
    "unknown model key": ("k: 2", "kk: 2", ["model.kk: unknown key", "'k'"]),
    "unknown key of a class in a class": ("probabilities", "probabilites", ["data.firing.probabilites", "'probabilities'"]),
    "wrong type": ("k: 2", "k: two", ["model.k: expected int", "'two'"]),
    "wrong type of a trainer key": ("max_steps: 6", "max_steps: many", ["trainer.max_steps: expected int", "'many'"]),
    "wrong type in a list": ("0.2", "often", ["data.firing.probabilities[1]: expected float", "'often'"]),
    "wrong type at the top": ("seed_everything: 1", "seed_everything: one", ["seed_everything: expected", "'one'"]),
    "unknown choice": ("k: 2", "k: 2\n    init: {encoder: copy}", ["model.init.encoder", "'transpose'"]),
    "unknown model class": ("TopKSAE", "TopkSAE", ["model: unknown class 'TopkSAE'", "'TopKSAE'"]),
    "unknown data class": ("ToyDataModule", "ToyData", ["data: unknown class 'ToyData'", "'ToyDataModule'"]),
    "unknown class in a class": ("IndependentFiring", "IndependntFiring", ["data.firing: unknown", "'IndependentFiring'"]),
    "class of the wrong kind": ("TopKSAE", "ToyDataModule", ["model: unknown class 'ToyDataModule'"]),
    "arguments beside the class": ("  init_args:\n    d_sae: 3\n    k: 2", "  d_sae: 3", ["model.d_sae", "init_args"]),
    "section that is no mapping": (
        CONFIG_MODEL := "class_path: TopKSAE\n  init_args:\n    d_sae: 3\n    k: 2",
        "- 3",
        ["model"],
    ),
    # The parser takes a boolean for a number where it equals the default, and a float for an integer.
    "boolean for the default 1 of a trainer key": (
        "max_steps: 6",
        "max_steps: 6\n  check_val_every_n_epoch: true",
        ["trainer.check_val_every_n_epoch: expected int", "True"],
    ),
    "boolean for the default 0 of a trainer key": (
        "max_steps: 6",
        "max_steps: 6\n  num_sanity_val_steps: no",
        ["trainer.num_sanity_val_steps: expected int", "False"],
    ),
    "boolean for a size": ("k: 2", "k: true", ["model.k: expected int", "True"]),
    "boolean for a callback's number": (
        "trainer:",
        "checkpoint: {save_top_k: false}\ntrainer:",
        ["checkpoint.save_top_k: expected int", "False"],
    ),
    "boolean for an argument of the optimiser": (
        "k: 2",
        "k: 2\n    optimizer: {class_path: torch.optim.Adam, init_args: {lr: 1.0e-3, weight_decay: false}}",
        ["model.optimizer.weight_decay: expected float", "False"],
    ),
    "boolean for an argument of a schedule": (
        "k: 2",
        "k: 2\n    lr_scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR, "
        "init_args: {T_max: 6, eta_min: false}}",
        ["model.lr_scheduler.eta_min: expected float", "False"],
    ),
    "boolean in a list": ("0.2", "true", ["data.firing.probabilities[1]: expected float", "True"]),
    "boolean in the list of a class in a class": (
        f"  {CONFIG_MODEL}\n",
        MATRYOSHKA.replace("[1, 3]", "[true, 3]"),
        ["model.levels[0]: expected int", "True"],
    ),
    "boolean for the inner SAE's number": (
        f"  {CONFIG_MODEL}\n",
        MATRYOSHKA.replace("k: 2}", "k: 2, init: {noise: false}}"),
        ["model.inner.init.noise: expected float", "False"],
    ),
    "float for an integer default": (
        "max_steps: 6",
        "max_steps: 6\n  num_sanity_val_steps: 0.0",
        ["trainer.num_sanity_val_steps: expected int", "0.0"],
    ),
    "missing argument": ("    d_sae: 3\n", "", ["model.d_sae: is required", "int"]),
    "impossible value": ("d_sae: 3", "d_sae: -3", ["model.d_sae: expected a whole number of at least 1, got -3"]),
    "impossible value in a class": ("0.2", "2.0", ["data.firing.probabilities[1]", "2.0"]),
    "linked key": ("d_sae: 3", "d_sae: 3\n    d_in: 6", ["model.d_in: is taken from the data"]),
    "no such interpolated key": ("k: 2", "k: ${data.init_args.d_inn}", ["model.k", "'${data.init_args.d_in}'"]),
    "no such environment variable": ("k: 2", "k: ${oc.env:HEDGELAB_NOPE}", ["model.k", "HEDGELAB_NOPE"]),
    "broken interpolation": ("k: 2", "k: ${data.init_args", ["cannot read 'wrong.yaml'", "model.init_args.k"]),
    "invalid YAML": ("k: 2", "k: [2", ["cannot read 'wrong.yaml'", "line "]),
    "unknown key in the inner SAE": (f"  {CONFIG_MODEL}\n", MATRYOSHKA.replace("k: 2", "kk: 2"), ["model.inner.kk", "'k'"]),
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
    "key twice": ("d_sae: 3", "d_sae: 3\n    d_sae: 4", ["wrong.yaml", "line 20", "duplicate key d_sae"]),
    "key twice at the top": ("data:", "name: a\nname: b\ndata:", ["wrong.yaml", "duplicate key name"]),
    "a circle of aliases": (
        "init_args:\n    d_sae",
        "init_args: &a\n    d_sae: *a\n    b",
        ["wrong.yaml", "recursive aliases"],
    ),
    "nesting without end": ("k: 2", "k: " + "[" * 5000 + "]" * 5000, ["wrong.yaml", "recursion depth"]),
    "aliases that multiply": (
        "data:",
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{n}: &{n} [{','.join(['*' + m] * 10)}]\n" for m, n in itertools.pairwise("abcdefgh"))
        + "data:",
        ["wrong.yaml", "1000000"],
    ),
    "a key that is nothing": ("data:", "null: 2\ndata:", ["wrong.yaml", "key type 'NoneType'"]),
    "nothing for a number": ("batch_size: 8", "batch_size: null", ["data.batch_size: expected int, got null"]),
    "nothing for a number later on": (
        "k: 2",
        "k: 2\n    dead_after_steps: null",
        ["model.dead_after_steps: expected int, got null"],
    ),
    "more than 64 bits": ("batch_size: 8", f"batch_size: {10**30}", ["data.batch_size", "64 bits", f"{10**30}"]),
    "more than there is memory": ("d_sae: 3", "d_sae: 1000000000000", ["24000000000000 bytes", "model.d_sae"]),
    "a batch beyond memory": ("batch_size: 8", "batch_size: 1000000000000", ["not enough memory", "data.batch_size"]),
    "a seed below zero": ("seed_everything: 1", "seed_everything: -1", ["seed_everything", "-1"]),
    "no device": ("max_steps: 6", "max_steps: 6\n  devices: -1", ["trainer", "devices"]),
    "devices without end": ("max_steps: 6", f"max_steps: 6\n  devices: {10**12}", ["trainer"]),
    "validation every zero epochs": (
        "max_steps: 6",
        "max_steps: 6\n  check_val_every_n_epoch: 0",
        ["trainer.check_val_every_n_epoch: must be from 1"],
    ),
    "logging at negative intervals": (
        "log_every_n_steps: 3",
        "log_every_n_steps: -1",
        ["trainer.log_every_n_steps: must be from 0"],
    ),
    "batches without end": ("max_steps: 6", "max_steps: 6\n  limit_val_batches: 1e308", ["trainer.limit_val_batches: must be"]),
    "a time that is none": ("max_steps: 6", "max_steps: 6\n  val_check_interval: {a: 1}", ["trainer", "'a'"]),
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
    "unknown key of the optimiser": (["--model.optimizer=Adam", "--model.optimizer.lrr=1"], ["model.optimizer.lrr", "'lr'"]),
    "unknown key of the tracker": (["--trainer.logger.experimnt=x"], ["trainer.logger.experimnt", "'experiment'"]),
    "unknown precision": (["--trainer.precision=12"], ["trainer.precision", "'bf16-mixed'", "12"]),
    "unknown accelerator": (["--trainer.accelerator=cpp"], ["trainer:", "'cpp'", "cuda"]),
    "unknown checkpoint key": (["--checkpoint.save_lst=true"], ["checkpoint.save_lst", "'save_last'"]),
    "missing checkpoint": (["--ckpt_path=nope.ckpt"], ["ckpt_path", "nope.ckpt"]),
    "missing second config": (["--config=tinny.yaml"], ["--config", "tinny.yaml", "'tiny.yaml'"]),
    "config without a file": (["--config"], ["--config: expected a file"]),
    "name of a config without end": ([f"--config={'a' * 300}"], ["--config: cannot read", "too long"]),
    "folder without end": ([f"--checkpoint.dirpath={'a' * 300}"], ["aaa", "too long"]),
    "folder that is a file": (["--checkpoint.dirpath=tiny.yaml"], ["tiny.yaml", "File exists"]),
    "folder in a file": (["--checkpoint.dirpath=tiny.yaml/x"], ["tiny.yaml", "Not a directory"]),
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
    "run without end": (["export", "a" * 300, "--to=out"], ["aaa", "too long"]),
    "run to evaluate without end": (["evaluate", "a" * 300], ["aaa", "too long"]),
    "folder to write without end": (["export", "last", f"--to={'a' * 300}"], ["aaa", "too long"]),
    "wrong option of ui": (["ui", "--hst=x"], ["--hst", "'--host'"]),
}


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
    check(["fit", "--config", "wrong.yaml", "--trainer.logger=false", *QUIET], expected, capsys)


@pytest.mark.parametrize("name", ON_COMMAND_LINE)
def test_mistake_on_the_command_line(name, config, capsys):
    words, expected = ON_COMMAND_LINE[name]
    check(["fit", "--config=tiny.yaml", *QUIET, *words], expected, capsys)


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
    monkeypatch.setattr("hedgelab.cli.fit.defer_torchmetrics", lambda: 1 / 0)
    assert main(["fit"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_interrupt(config, capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("hedgelab.cli.fit.defer_torchmetrics", interrupt)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == "hedgelab: interrupted\n"


def test_whoever_reads_may_stop_reading(config):
    """As in ``hedgelab --help | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "hedgelab", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(("target", "expected"), [(">/dev/full", 2), (">&-", 0)])
def test_standard_output_that_is_full_or_closed(config, target, expected):
    command = f"{sys.executable} -m hedgelab --version {target}"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == expected
    assert len(done.stderr.splitlines()) == (expected == 2), done.stderr
    assert not done.stderr or "no space is left" in done.stderr


@pytest.mark.parametrize("word", ["a'b", "a\\", 'a"b', "a\nb", "%", "", "nope"])
def test_names_that_no_run_has(word, config, capsys, monkeypatch, empty_database):
    Path("runs").mkdir()
    Path("runs/mlflow.db").write_bytes(empty_database.read_bytes())
    (line,) = refused(["compare", word], capsys)
    assert "in the store; give 'last', or a name or id" in line
    assert main(["runs", "--limit=100000000"]) == 0
    capsys.readouterr()


def refused(words, capsys):
    assert main(words) == 2
    return capsys.readouterr().err.splitlines()
