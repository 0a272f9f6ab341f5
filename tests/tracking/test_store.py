import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import pytest

from hedgelab.errors import UserError
from hedgelab.tracking import store


def test_uri_comes_from_the_environment_else_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store.tracking_uri() == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert store.tracking_uri() == "http://tracker:5000"


def test_everything_lies_beside_the_database(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert store.runs_dir("sqlite:///kept/mlflow.db") == tmp_path / "kept"
    assert store.runs_dir("http://tracker:5000") == tmp_path / "runs"
    assert store.artifact_location("sqlite:///kept/mlflow.db", "a/b") == (tmp_path / "kept/artifacts/a_b").as_uri()
    assert store.artifact_location("http://tracker:5000", "a") is None


def test_existing_store_opens_with_a_relative_uri(uri):
    client = store.ensure_store("sqlite:///runs/mlflow.db")
    assert [experiment.name for experiment in client.search_experiments()] == ["Default"]


def test_importing_the_store_needs_neither_torch_nor_mlflow():
    code = (
        "import sys, hedgelab.tracking, hedgelab.tracking.store, hedgelab.tracking.runs; "
        "print({'torch', 'mlflow', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:9", "http://127.0.0.1:99999", "http://[", "http://", "sqlite:////proc/nowhere/mlflow.db",
        "nonsense://x", "nonsense", " ", "sqlite://", "sqlite:///", "sqlite+pysqlite:///x.db", "postgresql://a:b@127.0.0.1:9/x",
        "http://user:pa@ss@127.0.0.1:9",
    ],
)  # fmt: skip
def test_unusable_store_is_one_line_with_the_fix_and_quick(uri):
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI: cannot use the store .*; .*unset it") as error:
        store.ensure_store(uri)
    assert "\n" not in str(error.value)
    assert "pa@ss" not in str(error.value)
    assert "a:b@" not in str(error.value)
    assert time.monotonic() - start < 5


class Answer(BaseHTTPRequestHandler):
    """Whatever is on the port of the tracking server."""

    status, body = 200, b"<html>\n<p>It works!</p></html>"

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("status", "expected"),
    [(200, "not in a valid JSON format"), (500, "too many 500"), (401, "TRACKING_USERNAME"), (403, "TRACKING_TOKEN")],
)
def test_a_server_that_is_none_of_mlflow_s_is_one_line_and_keeps_credentials_secret(status, expected):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Given", (Answer,), {"status": status}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI: cannot use the store http://127") as error:
            store.ensure_store(f"http://user:secret@127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert expected in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_is_known_to_be_a_store_without_mlflow(empty_database, tmp_path):
    store.check_database(empty_database)
    for content in (b"", b"not a database" * 100):
        (tmp_path / "x.db").write_bytes(content)
        with pytest.raises(UserError, match="check the file"):
            store.check_database(tmp_path / "x.db")


def test_damaged_database_is_a_user_error(tmp_path):
    database = tmp_path / "mlflow.db"
    database.write_text("not a database")
    with pytest.raises(UserError, match="check the file"):
        store.ensure_store(f"sqlite:///{database}")


def test_interrupted_creation_leaves_nothing_behind(tmp_path, monkeypatch):
    from mlflow.store.tracking import sqlalchemy_store

    def fail(uri, root):
        sqlite3.connect(uri.removeprefix("sqlite:///")).execute("create table half (x)")
        raise RuntimeError("stopped half-way")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        store.create_database(tmp_path / "mlflow.db")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def experiments(database):
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT name, artifact_location FROM experiments").fetchall()


@pytest.mark.parametrize("cached", ["nothing", "a database", "garbage", "an empty file", "no folder", "no home"])
def test_a_store_is_a_copy_of_the_first_one_where_that_can_be_kept(cached, empty_database, tmp_path, monkeypatch):
    from mlflow.store.tracking import sqlalchemy_store

    made = []
    monkeypatch.setattr(
        sqlalchemy_store, "SqlAlchemyStore", lambda uri, root: made.append(shutil.copy(empty_database, uri[10:])) or Mock()
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if cached == "no folder":
        (tmp_path / "cache").write_text("a file stands here")
    elif cached == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home")))
    elif cached != "nothing":
        (tmp_path / "cache" / "hedgelab").mkdir(parents=True)
        kept = tmp_path / "cache" / "hedgelab" / f"mlflow-{version('mlflow')}.db"
        kept.write_bytes({"a database": empty_database.read_bytes(), "garbage": b"garbage" * 1000}.get(cached, b""))
    for name in ("a", "b"):
        store.create_database(tmp_path / name / "mlflow.db")
        assert experiments(tmp_path / name / "mlflow.db") == [("Default", f"file://{tmp_path}/{name}/artifacts/0")]
    assert len(made) == {"a database": 0, "nothing": 1}.get(cached, 2)


@pytest.mark.slow
def test_three_processes_at_once_on_an_absent_store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    code = (
        "import sys; from hedgelab.tracking.store import ensure_store; "
        "print([e.name for e in ensure_store(sys.argv[1]).search_experiments()])"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code, uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [(*racer.communicate(timeout=120), racer.returncode) for racer in racers]
    assert [(out.strip(), code) for out, _, code in results] == [("['Default']", 0)] * 3, results
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mlflow.db", "mlflow.db.lock"]


class Proxy(Answer):
    """An HTTP proxy in front of a tracking server that answers below a path of its own."""

    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        self.body = b'{"experiments": []}' if "/some/where/api/2.0/mlflow/experiments/search" in self.path else b"{}"
        super().do_GET()

    do_POST = do_HEAD = do_GET  # noqa: N815


def test_a_server_behind_a_proxy_and_below_a_path_is_reached(monkeypatch):
    asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Given", (Proxy,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    try:
        client = store.ensure_store("http://tracking.invalid/some/where")
        assert list(client.search_experiments()) == []
    finally:
        server.shutdown()
        server.server_close()
    assert asked[0] == "http://tracking.invalid/some/where"
    assert all(path.startswith("http://tracking.invalid/some/where") for path in asked)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "API request to http://u:p@host/api failed with exception HTTPConnectionPool(host='host', port=80): Max retries "
            "exceeded with url: /api/2.0/mlflow/runs/search (Caused by NewConnectionError('<urllib3.connection.HTTPConnection "
            "object at 0x7f>: Failed to establish a new connection: [Errno 111] Connection refused'))",
            "Failed to establish a new connection: [Errno 111] Connection refused",
        ),
        ("a" * 400 + " and the reason at last", "and the reason at last"),
        ("first line\n<html>", "first line"),
        ("", "OSError"),
    ],
)
def test_reasons_come_whole(text, expected):
    reason = store.reason_of(OSError(text))
    assert reason.endswith(expected)
    assert len(reason) <= 310
    assert "u:p" not in reason
