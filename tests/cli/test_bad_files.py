"""Mistakes in files: trees, text, checkpoints, SAEs, runs; and configs that would write where they should not.

Each ends with exit code 2 and one line that names the key or file; nothing is computed, and nothing on the disk changes.
"""

import itertools
import json
import os
import pickle
import sqlite3
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hedgelab.cli import main
from hedgelab.saes import BatchTopKSAE, MatryoshkaSAE, TopKSAE, save_sae
from hedgelab.training.checkpoints import RunFolder


class Bomb:
    """Unpickling it leaves a trace."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture(autouse=True)
def _no_store(monkeypatch):
    monkeypatch.delenv("HEDGELAB_FOLDERS", raising=False)


def snapshot():
    return {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file() and path.name != ".lock"}


def check(words, expected, capsys):
    before = snapshot()
    code = main(words)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line]
    assert code == 2, printed.err
    assert len(lines) == 1, printed.err
    assert all(part in lines[0] for part in expected), lines[0]
    assert snapshot() == before
    assert not Path("executed").exists()


# -- feature trees -----------------------------------------------------------------------------------

TREES = {
    "no such file": (None, ["data.firing.file", "tree.yaml"]),
    "not YAML": ("{children: [", ["data.firing.file", "tree.yaml"]),
    "binary": (b"\xff\xfe\x00\x81", ["data.firing.file", "tree.yaml"]),
    "empty": ("", ["tree", "no feature"]),
    "a list": ("[1, 2]", ["tree", "mapping", "list"]),
    "a number": ("3", ["tree.yaml", "int"]),
    "unknown key": ("{childen: []}", ["tree.childen: unknown key", "'children'"]),
    "key that is a number": ("{children: [{probability: 0.1, 7: 8}]}", ["tree.children[0].7: unknown key"]),
    "children that are no list": ("{children: {probability: 0.1}}", ["tree.children", "list"]),
    "child without probability": ("{children: [{magnitude: 2}]}", ["tree.children[0].probability: missing"]),
    "probability above one": ("{children: [{probability: 1.5}]}", ["tree.children[0].probability", "1.5"]),
    "negative probability": ("{children: [{probability: -0.1}]}", ["tree.children[0].probability", "-0.1"]),
    "probability that is no number": ("{children: [{probability: .nan}]}", ["tree.children[0].probability"]),
    "probability in words": ("{children: [{probability: often}]}", ["tree.children[0].probability", "'often'"]),
    "probability that is true": ("{children: [{probability: true}]}", ["tree.children[0].probability", "True"]),
    "magnitude of zero": ("{children: [{probability: 0.1, magnitude: 0}]}", ["tree.children[0].magnitude"]),
    "infinite magnitude": ("{children: [{probability: 0.1, magnitude: .inf}]}", ["tree.children[0].magnitude"]),
    "flag that is a number": ("{children: [{probability: 0.1, is_read_out: 1}]}", ["tree.children[0].is_read_out"]),
    "exclusive children above one": (
        "{mutually_exclusive_children: true, children: [{probability: 0.7}, {probability: 0.6}]}",
        ["tree.children", "1.3", "above 1"],
    ),
    "nothing read out": ("{children: []}", ["tree", "no feature"]),
    "a circle of aliases": ("&a {probability: 0.5, children: [*a]}", ["tree", "recursive aliases"]),
    "aliases that multiply": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{n}: &{n} [{','.join(['*' + m] * 10)}]\n" for m, n in itertools.pairwise("abcdefgh")),
        ["data.firing.file", "tree.yaml", "1000000"],
    ),
    "key twice": ("{children: [{probability: 0.1, probability: 0.2}]}", ["tree.yaml", "duplicate key probability"]),
    "an object of Python": ("!!python/object/apply:os.system ['touch executed']", ["data.firing.file", "tree.yaml"]),
}


@pytest.mark.parametrize("name", TREES)
def test_tree_files(name, config, capsys):
    content, expected = TREES[name]
    if content is not None:
        Path("tree.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    firing = "class_path: TreeFiring\n      init_args: {file: tree.yaml}\n"
    text = config[: config.index("class_path: Indep")] + firing + config[config.index("model:") :]
    Path("tree_config.yaml").write_text(text)
    check(["fit", "--config=tree_config.yaml", "--trainer.logger=false"], expected, capsys)


# -- checkpoints -------------------------------------------------------------------------------------


def whole_checkpoint(**changes):
    return {"state_dict": {}, "global_step": 3, "loops": {}, "epoch": 0, "pytorch-lightning_version": "2.6.0", **changes}


CHECKPOINTS = {
    "empty": (lambda path: path.write_bytes(b""), ["bad.ckpt"]),
    "text": (lambda path: path.write_text("weights"), ["bad.ckpt"]),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Bomb())), ["bad.ckpt"]),
    "a hostile archive": (lambda path: torch.save(Bomb(), path), ["bad.ckpt", "refused"]),
    "hostile state": (lambda path: torch.save(whole_checkpoint(callbacks=[Bomb()]), path), ["bad.ckpt", "refused"]),
    "hostile hyper-parameters": (
        lambda path: torch.save(whole_checkpoint(hyper_parameters={"x": Bomb()}), path),
        ["bad.ckpt", "refused"],
    ),
    "weights alone": (lambda path: torch.save({"W_dec": torch.ones(2)}, path), ["bad.ckpt", "no checkpoint of a fit"]),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), ["bad.ckpt", "no checkpoint of a fit"]),
    "torn": (lambda path: (torch.save(whole_checkpoint(), path), path.write_bytes(path.read_bytes()[:-50])), ["bad.ckpt"]),
}


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name, command, config, capsys):
    make, expected = CHECKPOINTS[name]
    make(Path("bad.ckpt"))
    words = [command, "--config=tiny.yaml", "--ckpt_path=bad.ckpt", "--trainer.logger=false"]
    check([*words, "--trainer.enable_progress_bar=false"], ["ckpt_path", *expected], capsys)


def test_checkpoint_of_another_sae(config, capsys):
    words = ["--config=tiny.yaml", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *words, "--checkpoint.dirpath=kept"]) == 0
    capsys.readouterr()
    assert Path("kept/last.ckpt").is_file()
    for option, key in (("--model.d_sae=2", "b_enc"), ("--model.class_path=VanillaSAE", "steps_since_fired")):
        extra = ["--model.d_sae=3", "--model.l1_coefficient=0.1"] if "Vanilla" in option else []
        check(["test", *words, "--ckpt_path=kept/last.ckpt", option, *extra], ["ckpt_path", key], capsys)
    check(["fit", *words, "--checkpoint.dirpath=kept"], ["checkpoint.dirpath", "another run"], capsys)


# -- resuming ----------------------------------------------------------------------------------------

RESUMING = {
    "with a checkpoint as well": (["--resume", "--ckpt_path=tiny.yaml"], ["resume", "ckpt_path"]),
    "without checkpoints": (["--resume", "--trainer.enable_checkpointing=false"], ["resume", "enable_checkpointing"]),
    "a run that is not there": (["--resume=abc"], ["resume", "no run 'abc'"]),
    "two runs of one beginning": (["--resume=f"], ["resume", "2 runs 'f'"]),
    "a number that is no run": (["--resume=7"], ["resume", "7"]),
}


@pytest.mark.parametrize("name", RESUMING)
def test_resuming(name, config, capsys):
    words, expected = RESUMING[name]
    for run in ("f1", "f2"):
        RunFolder(Path("runs/checkpoints") / run).note(identity="x", run_id=run)
    check(["fit", "--config=tiny.yaml", "--trainer.logger=false", *words], expected, capsys)


def test_resuming_an_untracked_hedge(config, capsys):
    check(["hedge", "--config=tiny.yaml", "--trainer.logger=false", "--resume"], ["resume", "trainer.logger"], capsys)


def test_resuming_what_is_being_trained(config, capsys):
    words = ["fit", "--config=tiny.yaml", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    assert main(words) == 0
    (folder,) = Path("runs/checkpoints").iterdir()
    other = RunFolder(folder)
    other.note(finished=False)
    other.claim()
    capsys.readouterr()
    check([*words, "--resume"], ["resume", "another process is training"], capsys)
    other.release()


# -- SAEs --------------------------------------------------------------------------------------------


def edited(**changes):
    def edit(folder):
        config = json.loads((folder / "sae.json").read_text())
        config.update(changes)
        (folder / "sae.json").write_text(json.dumps({key: value for key, value in config.items() if value != "REMOVE"}))

    return edit


def with_weights(change):
    def edit(folder):
        from safetensors.torch import load_file

        tensors = load_file(folder / "sae.safetensors")
        change(tensors)
        save_file(tensors, folder / "sae.safetensors")

    return edit


SAES = {
    "no weights": (lambda folder: (folder / "sae.safetensors").unlink(), ["sae.safetensors"]),
    "no config": (lambda folder: (folder / "sae.json").unlink(), ["sae.json"]),
    "config is no JSON": (lambda folder: (folder / "sae.json").write_text("{"), ["saved", "damaged"]),
    "config is a list": (lambda folder: (folder / "sae.json").write_text("[]"), ["sae.json", "list"]),
    "config is binary": (lambda folder: (folder / "sae.json").write_bytes(b"\xff\xfe"), ["saved", "damaged"]),
    "endless nesting": (lambda folder: (folder / "sae.json").write_text("[" * 100_000), ["saved", "damaged"]),
    "weights are no safetensors": (lambda folder: (folder / "sae.safetensors").write_bytes(b"weights"), ["saved", "damaged"]),
    "weights are a pickle": (
        lambda folder: (folder / "sae.safetensors").write_bytes(pickle.dumps(Bomb())),
        ["saved", "damaged"],
    ),
    "weights are cut short": (
        lambda folder: (folder / "sae.safetensors").write_bytes((folder / "sae.safetensors").read_bytes()[:-9]),
        ["saved", "damaged"],
    ),
    "class of someone's": (edited(**{"class": "os.system"}), ["class", "os.system"]),
    "class that is no SAE": (edited(**{"class": "Initialization"}), ["class", "Initialization"]),
    "class that is abstract": (edited(**{"class": "SAE"}), ["sae.json"]),
    "class that is missing": (edited(**{"class": "REMOVE"}), ["class"]),
    "unknown argument": (edited(optimizer="os.system"), ["sae.json: 'optimizer': unknown key"]),
    "another SAE to begin from": (edited(init={"sae": "/etc"}), ["sae.json: 'init': unknown key"]),
    "impossible k": (edited(k=99), ["k", "99"]),
    "k in words": (edited(k="many"), ["sae.json"]),
    "missing k": (edited(k="REMOVE"), ["sae.json", "k"]),
    "width of the universe": (edited(d_sae=10**15), ["d_sae", "1000000000000000"]),
    "width in words": (edited(d_sae="wide"), ["d_sae", "wide"]),
    "activations of another width": (edited(d_in=7), ["d_in", "7"]),
    "missing weight": (with_weights(lambda tensors: tensors.pop("b_dec")), ["sae.safetensors", "b_dec"]),
    "missing decoder": (with_weights(lambda tensors: tensors.pop("W_dec")), ["sae.safetensors", "W_dec"]),
    "weight that is NaN": (with_weights(lambda tensors: tensors["W_enc"].fill_(float("nan"))), ["W_enc", "NaN"]),
    "weight that is infinite": (with_weights(lambda tensors: tensors["b_enc"].fill_(-float("inf"))), ["b_enc"]),
    "nothing of universal width": (
        lambda folder: (
            with_weights(lambda tensors: tensors.update(W_dec=torch.empty(10**12, 0)))(folder),
            edited(d_sae=10**12, d_in=0)(folder),
        ),
        ["d_in"],
    ),
    "weight too many": (with_weights(lambda tensors: tensors.update(W_two=torch.ones(1))), ["W_two"]),
    "weight of another shape": (with_weights(lambda tensors: tensors.update(b_enc=torch.ones(9))), ["b_enc"]),
    "damaged source": (lambda folder: (folder / "activations.json").write_text("{"), ["activations.json", "damaged"]),
    "source is a list": (lambda folder: (folder / "activations.json").write_text("[1]"), ["activations.json"]),
}


@pytest.mark.parametrize("name", SAES)
def test_sae_folders(name, config, capsys):
    change, expected = SAES[name]
    save_sae(TopKSAE(6, 4, k=2), "saved")
    change(Path("saved"))
    check(["export", "saved", "--to=out"], expected, capsys)


@pytest.mark.parametrize("change", [{"levels": [9]}, {"inner": 3}, {"inner": {"class": "os.system"}}, {"beta": "x"}])
def test_matryoshka_folders(change, config, capsys):
    save_sae(MatryoshkaSAE(6, lambda d_in: BatchTopKSAE(d_in, 4, k=2), [1, 4]), "saved")
    edited(**change)(Path("saved"))
    check(["export", "saved", "--to=out"], [next(iter(change))] if "levels" in change else ["s"], capsys)


def test_a_folder_that_is_taken(config, capsys):
    save_sae(TopKSAE(6, 4, k=2), "saved")
    Path("taken").mkdir()
    Path("taken/mine.txt").write_text("mine")
    check(["export", "saved", "--to=taken"], ["--to", "taken"], capsys)


# -- where a config may write ------------------------------------------------------------------------

OUTSIDE = {
    "checkpoints": ("data:", "checkpoint: {dirpath: /tmp/elsewhere}\ndata:", "checkpoint.dirpath"),
    "checkpoints by a detour": ("data:", "checkpoint: {dirpath: runs/../../elsewhere}\ndata:", "checkpoint.dirpath"),
    "the trainer's folder": ("trainer:", "trainer:\n  default_root_dir: /tmp/elsewhere", "trainer.default_root_dir"),
    "the store": (
        "trainer:",
        "trainer:\n  logger: {class_path: MLflowTracker, init_args: {uri: sqlite:////tmp/elsewhere/m.db}}",
        "trainer.logger.uri",
    ),
    "a callback's folder": (
        "trainer:",
        "trainer:\n  callbacks: [{class_path: ModelCheckpoint, init_args: {dirpath: /tmp/elsewhere}}]",
        "trainer.callbacks[0].dirpath",
    ),
    "the store by another driver": (
        "trainer:",
        "trainer:\n  logger: {class_path: MLflowTracker, init_args: {uri: 'sqlite+pysqlite:////tmp/elsewhere/m.db'}}",
        "trainer.logger.uri",
    ),
    "a store of files": (
        "trainer:",
        "trainer:\n  logger: {class_path: MLflowTracker, init_args: {uri: 'file:///tmp/elsewhere'}}",
        "trainer.logger.uri",
    ),
    "a store by its path": (
        "trainer:",
        "trainer:\n  logger: {class_path: MLflowTracker, init_args: {uri: /tmp/elsewhere}}",
        "trainer.logger.uri",
    ),
    "another library's store": (
        "trainer:",
        "trainer:\n  logger: {class_path: lightning.pytorch.loggers.MLFlowLogger, "
        "init_args: {tracking_uri: 'file:/tmp/elsewhere'}}",
        "trainer.logger.tracking_uri",
    ),
    "a store on this very host": (
        "trainer:",
        "trainer:\n  logger: {class_path: MLflowTracker, init_args: {uri: 'file://localhost/tmp/elsewhere'}}",
        "trainer.logger.uri",
    ),
    "a store in capitals": (
        "trainer:",
        "trainer:\n  logger: {class_path: MLflowTracker, init_args: {uri: 'FILE:///tmp/elsewhere'}}",
        "trainer.logger.uri",
    ),
    "dots in disguise": (
        "trainer:",
        "trainer:\n  logger: {class_path: MLflowTracker, init_args: {uri: 'file:%2e%2e/%2E%2E/elsewhere'}}",
        "trainer.logger.uri",
    ),
    "checkpoints in fsspec's words": ("data:", "checkpoint: {dirpath: 'local:///tmp/elsewhere'}\ndata:", "checkpoint.dirpath"),
    "checkpoints in a chain": (
        "data:",
        "checkpoint: {dirpath: 'simplecache::file:///tmp/elsewhere'}\ndata:",
        "checkpoint.dirpath",
    ),
    "a chain without a protocol": ("data:", "checkpoint: {dirpath: 'dir::/tmp/elsewhere'}\ndata:", "checkpoint.dirpath"),
    "names that climb out": ("data:", "checkpoint: {filename: '../../../tmp/elsewhere/x'}\ndata:", "checkpoint.filename"),
    "a version that climbs out": (
        "trainer:",
        "trainer:\n  logger: {class_path: lightning.pytorch.loggers.CSVLogger, "
        "init_args: {save_dir: logs, version: '../../../tmp/elsewhere'}}",
        "trainer.logger.version",
    ),
    "a profile": (
        "trainer:",
        "trainer:\n  profiler: {class_path: lightning.pytorch.profilers.SimpleProfiler, "
        "init_args: {dirpath: logs, filename: /tmp/elsewhere}}",
        "trainer.profiler.filename",
    ),
    "a home": ("trainer:", "trainer:\n  default_root_dir: ~/elsewhere", "trainer.default_root_dir"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_config_does_not_write_elsewhere(name, config, capsys):
    old, new, key = OUTSIDE[name]
    Path("outside.yaml").write_text(config.replace(old, new, 1))
    check(["fit", "--config=outside.yaml"], [key, "outside the working folder", f"--{key}="], capsys)
    assert not Path("/tmp/elsewhere").exists()


def test_a_cache_is_not_written_elsewhere(config, capsys):
    text = "data: {class_path: LLMDataModule, init_args: {model: none, layer: 1, cache: /tmp/elsewhere}}\n"
    Path("outside.yaml").write_text(text)
    check(["cache", "--config=outside.yaml"], ["data.cache", "outside the working folder", "--data.cache="], capsys)
    code = main(["cache", "--config=outside.yaml", "--data.cache=/tmp/elsewhere"])
    assert code == 2
    assert "outside the working folder" not in capsys.readouterr().err
    assert not Path("/tmp/elsewhere").exists()


def test_words_that_look_like_paths_are_words(config, capsys):
    logger = "class_path: MLflowTracker, init_args: {description: '/ and .. are text', tags: {why: /nowhere}}"
    Path("words.yaml").write_text(config.replace("trainer:", f"trainer:\n  logger: {{{logger}}}", 1))
    assert main(["fit", "--config=words.yaml", "--trainer.max_steps=1"]) == 0
    capsys.readouterr()


def test_a_link_out_of_the_folder_is_followed(config, capsys, tmp_path_factory):
    Path("inside").symlink_to(tmp_path_factory.mktemp("outside"))
    Path("outside.yaml").write_text(config.replace("data:", "checkpoint: {dirpath: inside/x}\ndata:", 1))
    check(["fit", "--config=outside.yaml"], ["checkpoint.dirpath", "outside the working folder"], capsys)


def test_the_user_may_write_anywhere(config, capsys, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    plain = ["fit", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    assert main([*plain, "--config=tiny.yaml", f"--checkpoint.dirpath={elsewhere}/a"]) == 0
    Path("outside.yaml").write_text(config.replace("data:", f"checkpoint: {{dirpath: {elsewhere}/b}}\ndata:", 1))
    monkeypatch.setenv("HEDGELAB_FOLDERS", f"/nowhere:{elsewhere}")
    assert main([*plain, "--config=outside.yaml"]) == 0
    assert {path.parent.name for path in elsewhere.rglob("last.ckpt")} == {"a", "b"}
    capsys.readouterr()


# -- the rest of the command line --------------------------------------------------------------------

COMMANDS = {
    "unknown guard": (["fit", "--config=tiny.yaml", "--guard.on_nonfinite=ignore"], ["guard.on_nonfinite", "'skip'"]),
    "unknown choice of an outage": (
        ["fit", "--config=tiny.yaml", "--trainer.logger.on_unreachable=wait"],
        ["trainer.logger.on_unreachable", "'local'"],
    ),
    "no batch": (["fit", "--config=tiny.yaml", "--data.batch_size=0"], ["data.batch_size", "at least 1"]),
    "no buffer": (["fit", "--config=tiny.yaml", "--trainer.logger.buffer_points=0"], ["trainer.logger.buffer_points"]),
    "seed out of bounds": (["fit", "--config=tiny.yaml", "--data.seed=x"], ["data.seed", "'x'"]),
    "word for sync": (["sync", "now"], ["'now'"]),
    "option of sync": (["sync", "--al"], ["--al"]),
    "port out of bounds": (["ui", "--port=70000"], ["port", "70000"]),
    "config that is a folder": (["fit", "--config=."], ["--config", "'.'"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_lines(name, config, capsys, monkeypatch):
    words, expected = COMMANDS[name]
    if words[0] == "ui":
        Path("runs").mkdir()
        sqlite3.connect("runs/mlflow.db").execute("create table experiments (x)")
    check(words, expected, capsys)


def test_sync_with_a_server_that_is_away(config, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    check(["sync"], ["MLFLOW_TRACKING_URI", "http://127.0.0.1:9"], capsys)


def test_the_ui_listens_on_loopback_unless_told_otherwise(config, monkeypatch):
    from hedgelab.cli import ui

    Path("runs").mkdir()
    sqlite3.connect("runs/mlflow.db").execute("create table experiments (x)")
    commands = []

    monkeypatch.setattr(ui, "serve", lambda command: commands.append(command) or 0)
    monkeypatch.setattr(ui, "check_port", lambda host, port: None)
    monkeypatch.setattr(ui, "page", lambda run: "")
    assert main(["ui", "--port=5123"]) == 0
    assert commands[0][commands[0].index("--host") + 1] == "127.0.0.1"
