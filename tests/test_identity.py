"""What decides numbers, and what does not: arguments, code, content."""

import sys
from pathlib import Path

import pytest

from hedgelab.identity import EVERYTHING, code_of, content_of, deciding, pruned, stable_id, where_and_how

TOY = {
    "class_path": "hedgelab.data.toy.ToyDataModule",
    "init_args": {
        "d_in": 6, "batch_size": 8, "chunk_steps": 1,
        "firing": {"class_path": "hedgelab.data.toy.IndependentFiring", "init_args": {"probabilities": [0.1, 0.2]}},
    },
}  # fmt: skip
CONFIG = {
    "name": "x",
    "seed_everything": 1,
    "trainer": {"max_steps": 6, "devices": 1, "limit_train_batches": None, "max_time": None, "callbacks": None},
    "data": TOY,
    "model": {"class_path": "hedgelab.saes.TopKSAE", "init_args": {"d_sae": 3, "k": 2, "init": {"seed": 0}}},
    "checkpoint": {"every_n_train_steps": 1000},
}


def changed(key, value, config=CONFIG):
    """The config with another value under a dotted key."""
    head, _, rest = key.partition(".")
    return {**config, head: changed(rest, value, config.get(head) or {}) if rest else value}


def id_of(config):
    return stable_id(deciding(config))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "y"), ("trainer.devices", 2), ("trainer.max_time", "00:00:01:00"), ("trainer.log_every_n_steps", 7),
        ("trainer.strategy", "ddp"), ("trainer.logger", {"class_path": "lightning.pytorch.loggers.CSVLogger"}),
        ("checkpoint.every_n_train_steps", 5), ("data.init_args.chunk_steps", 50), ("progress.refresh_rate", 3),
        ("trainer.callbacks", [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}]),
    ],
)  # fmt: skip
def test_where_and_how_change_no_id(key, value):
    before = id_of(changed("trainer.callbacks", []) if key == "trainer.callbacks" else CONFIG)
    assert id_of(changed(key, value)) == before
    assert pruned(changed(key, value)) == pruned(CONFIG)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed_everything", 2), ("trainer.max_steps", 7), ("trainer.limit_train_batches", 5),
        ("trainer.precision", "bf16-true"),
        ("model.init_args.k", 1), ("model.init_args.init.seed", 1), ("data.init_args.batch_size", 16),
        ("data.init_args.firing.init_args.probabilities", [0.1, 0.3]), ("guard.on_nonfinite", "skip"),
        ("trainer.callbacks", [{"class_path": "lightning.pytorch.callbacks.StochasticWeightAveraging"}]),
        ("model.class_path", "hedgelab.saes.BatchTopKSAE"),
    ],
)  # fmt: skip
def test_what_decides_changes_the_id(key, value):
    assert id_of(changed(key, value)) != id_of(CONFIG)
    assert pruned(changed(key, value)) != pruned(CONFIG)


def test_a_class_may_move_within_hedgelab_and_the_release_counts(monkeypatch):
    assert id_of(changed("model.class_path", "hedgelab.saes.topk.TopKSAE")) == id_of(CONFIG)
    before = id_of(CONFIG)
    monkeypatch.setattr("hedgelab.version.__version__", "99.0")
    assert id_of(CONFIG) != before


def test_marks_are_inherited():
    class Base:
        where_and_how = frozenset({"folder"})

    class Child(Base):
        where_and_how = frozenset({"threads"})

    class Watcher:
        where_and_how = EVERYTHING

    assert where_and_how(Child) == {"folder", "threads"}
    assert where_and_how(Watcher) == EVERYTHING


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    """A class of the user's whose module takes a function from another of theirs."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_helper_of_identity.py").write_text("def scale(x):\n    return 2 * x\n")
    (tmp_path / "my_saes_of_identity.py").write_text(
        "from hedgelab.saes import TopKSAE\nfrom my_helper_of_identity import scale\n\n"
        "class Mine(TopKSAE):\n    factor = scale(1)\n"
    )
    yield tmp_path
    for name in ("my_helper_of_identity", "my_saes_of_identity"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("file", ["my_saes_of_identity.py", "my_helper_of_identity.py"])
def test_the_source_of_ones_own_class_counts(own_package, file):
    config = changed("model.class_path", "my_saes_of_identity.Mine")
    before = id_of(config)
    assert id_of(config) == before
    (own_package / file).write_text((own_package / file).read_text() + "\n# another line\n")
    assert id_of(config) != before


def test_the_content_of_files_counts_wherever_they_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()  # a folder whose name is a plain word of a config
    Path("a.txt").write_text("one")
    text = {"class_path": "hedgelab.data.llm.text.TextFiles", "init_args": {"paths": ["a.txt"], "field": "text"}}
    config = changed("data.init_args.text", text)
    before = deciding(config)
    assert list(before["inputs"]) == ["data.text.paths.0"]
    Path("a.txt").write_text("two!")
    assert deciding(config)["inputs"] != before["inputs"]
    assert stable_id(deciding(config)) != stable_id(before)


def test_content_of_a_folder_is_all_of_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(3_000_000))
    before = content_of(tmp_path)
    raw = bytearray(3_000_000)
    raw[1_234_567] = 1
    (tmp_path / "model.safetensors").write_bytes(bytes(raw))
    assert content_of(tmp_path) != before
    assert content_of(tmp_path) == content_of(tmp_path)
    before = content_of(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert content_of(tmp_path) != before


def test_code_of_installed_packages_is_their_module_alone():
    import torch

    assert code_of(torch.optim.Adam) == code_of(torch.optim.Adam)
    assert code_of(torch.optim.Adam) != code_of(torch.optim.SGD)
    assert code_of(deciding).startswith("hedgelab ")
