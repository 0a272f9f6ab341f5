import pytest

from hedgelab.tracking.store import create_database

CONFIG = """\
seed_everything: 1
trainer:
  max_steps: 6
  log_every_n_steps: 3
  accelerator: cpu
data:
  class_path: ToyDataModule
  init_args:
    d_in: 6
    batch_size: 8
    val_batches: 2
    firing:
      class_path: IndependentFiring
      init_args:
        probabilities: [0.1, 0.2, 0.3]
model:
  class_path: TopKSAE
  init_args:
    d_sae: 3
    k: 2
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A tiny valid config ``tiny.yaml`` in an empty working directory; its text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("HEDGELAB_DEBUG", raising=False)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return CONFIG


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """An SQLite store as MLflow makes it, which takes seconds, so once for all tests."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    create_database(database)
    return database
