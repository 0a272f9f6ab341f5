import shutil

import pytest

from hedgelab.tracking.store import create_database


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """An SQLite store as MLflow makes it, which takes seconds, so once for all tests."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    create_database(database)
    return database


@pytest.fixture
def uri(empty_database, tmp_path, monkeypatch):
    """Tracking URI of a fresh store in ``<tmp_path>/runs``."""
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return f"sqlite:///{folder / 'mlflow.db'}"
