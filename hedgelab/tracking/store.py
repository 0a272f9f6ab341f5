"""Where runs are kept: an MLflow store, by default one SQLite file under ``runs/`` with the artifacts beside it.

Importing this module is cheap (neither torch nor mlflow).
"""

import logging
import os
import re
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from filelock import FileLock

from hedgelab.errors import UserError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_SQLITE = "sqlite:///"
_CONNECT_SECONDS = 3.0
_BUSY_SECONDS = 30  # for which a database that another process has locked is waited for
_MOST_SHOWN = 300
# How HTTP libraries name what went wrong: the last cause, its object left out.
_CAUSED = re.compile(r".*Caused by \w+\((?P<quote>['\"]?)(?:(?:<[^>]*>|\w+\([^)]*\)): )?(?P<reason>.+?)(?P=quote)\)+")
# MLflow's defaults (7 retries with exponential pauses, 120 s each) hold a call for minutes when a server has died.
_HTTP_REQUEST = {"MAX_RETRIES": "1", "BACKOFF_FACTOR": "1", "TIMEOUT": "20"}
INTENDED = "hedgelab.intended_for"
"""Tag of a run in the local store: the server that could not be reached when it began."""
_REMEDIES = {
    "error code 40[13]": "the server wants to know who you are: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN",
    "^server": "start the server, or unset it for runs/mlflow.db, or train with trainer.logger.on_unreachable=local and "
    "send the runs later with `hedgelab sync`",
    "locked": "another process holds it: end that one, set it to another store, or unset it for runs/mlflow.db",
    "is full|No space": "free some space, or set it to another store",
    "": "check the file and its folder, or unset it for runs/mlflow.db",
}


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI`` where set, else an SQLite file ``runs/mlflow.db`` in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or local_uri()


def local_uri() -> str:
    """The store in the working directory, whatever ``MLFLOW_TRACKING_URI`` says."""
    return f"{_SQLITE}{Path.cwd() / 'runs' / 'mlflow.db'}"


def without_credentials(text: str) -> str:
    """A tracking URI, or text with one in it, as it may be shown and written down."""
    return re.sub(r"://[^/\s]+@", "://", text)


def reason_of(error: BaseException) -> str:
    """What an error of a store says, in a line without credentials.

    The text of an error may be a page of HTML, repeat the address, or name its cause last, after the names of several objects.

    >>> reason_of(OSError("Max retries exceeded (Caused by NewConnectionError('<urllib3.C at 0x1>: Connection refused'))"))
    'Connection refused'
    """
    lines = (str(error).strip() or type(error).__name__).splitlines()
    line = next((line for line in lines if line.startswith("(sqlite3.")), lines[0])  # SQLAlchemy may put advice first
    if caused := _CAUSED.search(line):
        line = caused["reason"]
    line = without_credentials(line)
    return line if len(line) <= _MOST_SHOWN else f"{line[: _MOST_SHOWN // 2]} … {line[-_MOST_SHOWN // 2 :]}"


def same_store(uri: str, other: str) -> bool:
    """Whether two tracking URIs lead to the same store."""
    first, second = (without_credentials(one).rstrip("/") for one in (uri, other))
    return first == second or (sqlite_file(first) is not None and sqlite_file(first) == sqlite_file(second))


def sqlite_file(uri: str) -> Path | None:
    """Absolute path of the database file behind an SQLite URI; None for any other store."""
    return Path(uri.removeprefix(_SQLITE)).absolute() if uri.startswith(_SQLITE) else None


def runs_dir(uri: str) -> Path:
    """Folder for what lies beside the store (artifacts, checkpoints, spool): the database's, else ``runs/``."""
    database = sqlite_file(uri)
    return database.parent if database else Path.cwd() / "runs"


def artifact_location(uri: str, experiment: str) -> str | None:
    """Artifact folder of an experiment in an SQLite store; None leaves the choice to the server."""
    if sqlite_file(uri) is None:
        return None
    name = experiment.replace("/", "_").replace("\\", "_")
    return (runs_dir(uri) / "artifacts" / (name if name.strip(".") else name.replace(".", "_"))).as_uri()


def local_store() -> "MlflowClient | None":
    """A client of the store in the working directory, where there is one."""
    uri = local_uri()
    return ensure_store(uri) if Path(uri.removeprefix(_SQLITE)).exists() else None


def ensure_store(uri: str | None = None) -> "MlflowClient":
    """A client of the store; an SQLite file that is not there is made first, by one of the processes that ask at once."""
    address = uri = uri or tracking_uri()
    database = sqlite_file(uri)
    try:
        if database is not None:
            create_database(database)
            check_database(database)
            address = f"{_SQLITE}{database}?timeout={_BUSY_SECONDS}"
        elif uri.startswith("sqlite"):
            raise ValueError("a database is given as sqlite:///path, relative to the working folder or from the root")
        elif urlparse(uri).scheme in ("http", "https"):
            for name, value in _HTTP_REQUEST.items():
                os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
            import requests

            # Does anything answer at all? The request goes where MLflow's go: through the proxies that the environment names.
            # Who answers late, or with a certificate that MLflow may be told to trust, is for MLflow to judge.
            with suppress(requests.exceptions.SSLError, requests.exceptions.ReadTimeout):
                requests.head(uri, timeout=_CONNECT_SECONDS, allow_redirects=False)
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what it logs in pages, it also raises
        client = MlflowClient(tracking_uri=address)
        client.search_experiments(max_results=1)
    except UserError:
        raise
    except Exception as error:
        raise UserError(unusable(uri, reason_of(error))) from error
    return client


def all_experiments(client: "MlflowClient") -> dict[str, str]:
    """Names of the active experiments by id, however many: a store gives them in pages."""
    found = every(lambda token: client.search_experiments(page_token=token))
    return {experiment.experiment_id: experiment.name for experiment in found}


def every(page_of: Callable[[str | None], Any]) -> Iterator[Any]:
    """All that a store gives in pages, each made from the token that the page before it ended with."""
    token = None
    while token != "":
        page = page_of(token)
        yield from page
        token = page.token or ""


def unusable(uri: str, reason: str) -> str:
    """Why a store cannot be used, and what to do, in a line."""
    if denied := re.search(r"error code 40[13]\b", reason):
        reason = denied[0]
    subject = f"{'file' if uri.startswith('sqlite') or '://' not in uri else 'server'}: {reason}"
    remedy = next(remedy for pattern, remedy in _REMEDIES.items() if re.search(pattern, subject))
    return f"MLFLOW_TRACKING_URI: cannot use the store {without_credentials(uri)} ({reason}); {remedy}"


def check_database(database: Path) -> None:
    """See that a file is a database of MLflow, without MLflow."""
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True, timeout=0)) as connection:
            # Not read only: where a writer was killed, this rolls back what it left unfinished.
            connection.execute("SELECT 1 FROM experiments")
    except sqlite3.Error as error:
        if "locked" not in str(error):
            raise UserError(unusable(f"{_SQLITE}{database}", reason_of(error))) from error


def create_database(database: Path) -> None:
    """Creates MLflow's SQLite database unless it exists; the file appears whole or not at all.

    MLflow takes seconds to make an empty database, so the first one of each version of MLflow is kept in the user's cache
    folder, and later ones are copies of it.
    """
    if database.exists():
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        template = cache / "hedgelab" / f"mlflow-{version('mlflow')}.db"
        _make_once(template, _make_database)
    except (OSError, RuntimeError):  # this user has no cache folder, or may not write there
        _make_once(database, _make_database)
    else:
        try:
            _make_once(database, partial(shutil.copyfile, template))
        except sqlite3.Error:
            with suppress(UserError):
                check_database(template)
                raise
            template.unlink(missing_ok=True)  # it is damaged
            _make_once(database, _make_database)


def _make_once(database: Path, make: Callable[[Path], object]) -> None:
    """Has one of many processes make a database, with artifacts beside it; the others wait."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):
        unfinished = database.with_name(f".{database.name}.{uuid.uuid4().hex}")
        try:
            if not database.exists():
                make(unfinished)
                with closing(sqlite3.connect(unfinished)) as connection, connection:
                    location = f"{(database.parent / 'artifacts').as_uri()}/0"
                    connection.execute("UPDATE experiments SET artifact_location = ?", (location,))
                unfinished.replace(database)
        finally:
            unfinished.unlink(missing_ok=True)


def _make_database(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what it logs in pages, it also raises
    SqlAlchemyStore(f"{_SQLITE}{path}", path.parent.as_uri()).engine.dispose()  # type: ignore[no-untyped-call]
