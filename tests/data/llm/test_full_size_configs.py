"""Configs for Gemma and Llama train, on random models of these architectures that are small enough."""

import copy
from pathlib import Path

import pytest
import torch
import yaml

from hedgelab.cli import main
from hedgelab.config.tree import load, overlay

CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "llm").glob("[gl][el][ma]*.yaml"))
SMALL = {
    "context_length": 16, "max_contexts": 60, "contexts_per_block": 8, "contexts_at_once": 4, "batch_size": 32, "held_out": 0.3,
    "val_batches": 1, "device": "cpu",
}  # fmt: skip


def composed(path):
    """What the config trains: of a sweep one tree for each of its lines."""
    tree = load(path)
    sweep = tree.pop("sweep", None)
    if sweep is None:
        return [tree]
    lines = [line.get("set", {}) for line in sweep.get("lines", {"": {}}).values()]
    trees = [composed(path.parent / sweep["base"])[0] for _ in lines]
    for whole, line in zip(trees, lines, strict=True):
        overlay(whole, copy.deepcopy(tree))
        overlay(whole, line)
    return trees


def shrink(section):
    """An SAE section with 64 latents."""
    for value in section.values():
        if isinstance(value, dict):
            shrink(value)
    sizes = {"d_sae": 64, "k": 4, "levels": [8, 64]}
    section |= {key: sizes[key] for key in section if key in sizes}


SEEN = []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_steps(path, architecture, tiny_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = architecture("Gemma2" if "gemma" in path.stem else "Llama")
    for tree in composed(path):
        data, model = tree["data"], tree["model"]
        assert data["class_path"] == "LLMDataModule"
        text = {"class_path": "TextFiles", "init_args": {"paths": tiny_text}}
        layer = data["init_args"]["layer"] % 3
        data["init_args"] |= SMALL | {"model": folder, "layer": layer, "text": text, "cache_dir": str(tmp_path / "cache")}
        shrink(model)
        if (small := {"data": data["init_args"] | {"cache_dir": ""}, "model": model}) in SEEN:
            continue  # another config has trained this
        SEEN.append(small)
        trainer = {"max_steps": 2, "logger": False, "accelerator": "cpu", "enable_progress_bar": False}
        trainer |= {key: value for key, value in tree["trainer"].items() if key == "precision"}
        small = {"seed_everything": 0, "trainer": trainer, "data": data, "model": model}
        Path("small.yaml").write_text(yaml.safe_dump(small))
        assert main(["fit", "--config=small.yaml", "--trainer.default_root_dir=runs"]) == 0
        checkpoint = torch.load(next(Path("runs").rglob("*.ckpt")), weights_only=True)
        assert checkpoint["global_step"] == 2
        assert trainer["precision"] == "bf16-mixed"
        floats = [value for value in checkpoint["state_dict"].values() if value.is_floating_point()]
        assert all(value.isfinite().all() and value.itemsize >= 4 for value in floats)  # thresholds too


def test_all_are_tried():
    assert len(CONFIGS) >= 12
    assert {path.stem.partition("_")[0] for path in CONFIGS} == {"gemma2", "llama32"}
