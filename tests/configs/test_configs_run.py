"""Every config for toys, and every one that needs no network, runs: shortened, through the real commands.

Those of ``configs/theory`` and ``configs/paper`` run in ``tests/cli/test_phase_command.py``.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hedgelab.cli import main
from hedgelab.config.tree import load
from hedgelab.protocols.sweep.config import read_sweep, with_seed
from hedgelab.tracking.store import create_database

ROOT = Path(__file__).parents[2]
TRAINING = sorted(f for f in ROOT.glob("configs/*/*.yaml") if {"data", "sweep"} & set(yaml.safe_load(f.read_text())))
OWN = {"trial", "plant", "l0"}  # sections of studies that have tests of their own
TOYS = [file for file in TRAINING if file.parent.name == "toy" and not OWN & load(file).keys()]
# One that reads a cache needs the cache first: tests/data/llm/test_cache_command.py.
OFFLINE = [
    file
    for file in TRAINING
    if file.parent.name == "llm" and "smollm2" in file.stem and "cache" not in file.stem and not OWN & load(file).keys()
]
SHORT = ["--trainer.max_steps", "4", "--trainer.log_every_n_steps", "2", "--trainer.enable_progress_bar", "false"]
SHORT += ["--data.init_args.val_batches", "1", "--data.init_args.batch_size", "64"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    create_database(folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


def run_shortened(file, more, store, tmp_path, monkeypatch):
    """Run a single experiment as it is, of a sweep the first cell; few steps each."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACTIVATIONS", str(tmp_path / "own.safetensors"))
    if (script := file.with_suffix(".py")).is_file():
        subprocess.run([sys.executable, script, tmp_path / "own.safetensors"], check=True)
    tree = load(file)
    command = "hedge" if "hedge" in tree else "fit"
    if "sweep" in tree:
        sweep = read_sweep(["--config", str(file)])
        command = sweep.options.command
        cell, tree = sweep.cells[0]
        file = tmp_path / "cell.yaml"
        file.write_text(yaml.safe_dump(with_seed(tree, cell.seed)))
    words = [command, "--config", str(file), *SHORT, *more]
    if "val_check_interval" in tree.get("trainer", {}):
        words += ["--trainer.val_check_interval", "4"]
    if "dictionary" in tree.get("data", {}).get("init_args", {}):
        words += ["--data.init_args.dictionary.init_args.steps", "1"]
    if command == "fit":
        words += ["--trainer.enable_checkpointing", "false"]
    assert main(words) == 0


def a_toy(file):
    """A file to run; slow where it is large or like another, or where ``tests/cli/test_paper_toys.py`` solves it, too."""
    base = load(file).get("sweep", {}).get("base") or ""
    is_large = "n: 16384" in file.read_text() or base == "synth_sae_bench.yaml"
    is_solved = file.stem.startswith(("correlated", "anti_correlated", "balance", "unbalanceable", "absorption"))
    is_like_another = file.stem in {"many_features", "mitigations", "synth_sae_bench_verdict", "width_grid"}
    slow = is_large or is_solved or is_like_another
    return pytest.param(file, id=file.stem, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("file", map(a_toy, TOYS))
def test_toys(file, store, tmp_path, monkeypatch, capsys):
    run_shortened(file, [], store, tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert "val/explained_variance" in printed or "hedging/degree" in printed


@pytest.mark.llm
@pytest.mark.slow
@pytest.mark.parametrize("file", OFFLINE, ids=lambda file: file.stem)
def test_language_models_offline(file, store, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("The railway came, and with it workers from the countryside. " * 2000)
    text = f'{{"class_path": "TextFiles", "init_args": {{"paths": ["{tmp_path / "text.txt"}"]}}}}'
    small = ["--data.init_args.context_length", "64", "--data.init_args.contexts_per_block", "8"]
    more = [*small, "--data.init_args.text", text, "--data.init_args.held_out", "0.3"]
    run_shortened(file, more, store, tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert "val/explained_variance" in printed or "hedging/degree" in printed
