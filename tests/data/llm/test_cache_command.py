"""``hedgelab cache`` and fits that read what it wrote; every mistake is exit code 2 and one line that names the key."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import yaml

from hedgelab.cli import main


@pytest.fixture
def config(tiny_model, tiny_text, tmp_path, monkeypatch):
    """A config ``tiny.yaml`` in an empty working directory, as a tree; its cache would lie in ``acts``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEDGELAB_DEBUG", raising=False)
    data = {
        "model": tiny_model,
        "layer": 1,
        "text": {"class_path": "TextFiles", "init_args": {"paths": tiny_text}},
        "context_length": 16,
        "contexts_per_block": 20,
        "batch_size": 32,
        "val_batches": 2,
        "device": "cpu",
        "cache": "acts",
    }
    tree = {
        "seed_everything": 0,
        "trainer": {"max_steps": 12, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        "data": {"class_path": "LLMDataModule", "init_args": data},
        "model": {"class_path": "TopKSAE", "init_args": {"d_sae": 16, "k": 4}},
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(tree))
    return tree


def refused(words, expected, capsys):
    code = main(words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hedgelab:") or "Error" in line]
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert all(part in lines[0] for part in expected), lines[0]


def test_write_then_fit_then_nothing_left(config, capsys):
    assert main(["cache", "--config", "tiny.yaml"]) == 0
    said = capsys.readouterr()
    assert "contexts of 16 tokens, 32 wide, float32" in said.out
    assert "Caching: 100%" in said.err
    assert main(["fit", "--config", "tiny.yaml", "--trainer.enable_checkpointing=false"]) == 0
    capsys.readouterr()
    assert main(["cache", "--config=tiny.yaml"]) == 0
    assert "nothing was left to write" in capsys.readouterr().out
    shards = sorted(Path("acts/shards").iterdir())
    damaged = bytearray(shards[0].read_bytes())
    for start in range(5000, len(damaged) - 5000, 16 * 32 * 4):  # a byte of nearly every context
        damaged[start] ^= 64
    shards[0].write_bytes(damaged)
    refused(["fit", "--config=tiny.yaml", "--trainer.enable_checkpointing=false"], ["data.cache", "checksum"], capsys)
    assert main(["cache", "--config=tiny.yaml", "--verify"]) == 0
    assert "this process ran" in capsys.readouterr().out
    assert main(["fit", "--config=tiny.yaml", "--trainer.enable_checkpointing=false"]) == 0
    capsys.readouterr()
    refused(["fit", "--config=tiny.yaml", "--data.layer=0"], ["data.hook", "layers.1", "layers.0"], capsys)
    refused(["cache", "--config=tiny.yaml", "--data.context_length=8"], ["data.context_length", "16", "8"], capsys)
    shards[0].write_bytes(damaged[:1000])
    refused(["fit", "--config=tiny.yaml"], ["data.cache", "holds the first 0 of"], capsys)


MISTAKES = {
    "no cache": (["fit"], ["data.cache", "no activation cache in 'acts'", "hedgelab cache"]),
    "no folder named": (["cache", "--data.cache=null"], ["data.cache", "names no folder"]),
    "folder that cannot be": (["cache", "--data.cache=tiny.yaml/acts"], ["data.cache", "cannot make the folder"]),
    "folder of other things": (["cache", "--data.cache=."], ["data.cache", "holds other files"]),
    "unknown key": (["cache", "--data.layr=0"], ["data.layr: unknown key", "'layer'"]),
    "unknown option": (["cache", "--verfy"], ["verfy: unknown key", "'verify'"]),
    "wrong value": (["cache", "--data.max_contexts=0"], ["data.max_contexts: expected a whole number of at least 1"]),
    "wrong type": (["cache", "--data.storage_dtype=int8"], ["data.storage_dtype", "bfloat16"]),
    "no such model": (["cache", "--data.model=no/such.gguf"], ["data.model: there is no file 'no/such.gguf'"]),
    "toy data": (["cache", "--config=toy.yaml"], ["ToyDataModule needs no cache"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, config, capsys):
    firing = {"class_path": "IndependentFiring", "init_args": {"probabilities": [0.1, 0.2]}}
    toy = {"data": {"class_path": "ToyDataModule", "init_args": {"d_in": 4, "firing": firing}}}
    Path("toy.yaml").write_text(yaml.safe_dump(toy))
    (command, *rest), expected = MISTAKES[name]
    refused([command, "--config=tiny.yaml", *rest], expected, capsys)


def test_too_little_room(config, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    refused(["cache", "--config=tiny.yaml"], ["data.cache: 'acts' needs", "free", "data.storage_dtype: bfloat16"], capsys)


def test_help_lists_its_keys(capsys):
    assert main(["cache", "--help"]) == 0
    assert "--verify" in capsys.readouterr().out


def test_data_is_required(config, capsys):
    Path("none.yaml").write_text("seed_everything: 0\n")
    refused(["cache", "--config=none.yaml"], ["data: is required"], capsys)
