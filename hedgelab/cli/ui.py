"""``hedgelab ui``: the MLflow UI on the store that runs are written to, opened on the training runs of the last experiment."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from hedgelab.cli.light import LightParser
from hedgelab.errors import UserError, stop_at_once
from hedgelab.tracking.charts import page
from hedgelab.tracking.store import check_database, ensure_store, sqlite_file, tracking_uri, without_credentials

_PATIENCE = 5.0


def run(command: str, words: list[str]) -> int:
    """Serve the UI until Ctrl-C; a store that is a server already has its own, whose address is printed."""
    options = LightParser(command).parse(words)
    uri = tracking_uri()
    if uri.startswith(("http://", "https://")):
        print(f"The MLflow UI is the tracking server itself: {without_credentials(uri).rstrip('/')}{page(options.run)}")
        return 0
    database = sqlite_file(uri)
    if database is None:
        ensure_store(uri)
    elif not database.exists():
        raise UserError(f"no runs yet in {database}; train one with 'hedgelab fit', or set MLFLOW_TRACKING_URI")
    else:
        check_database(database)
    check_port(options.host, options.port)
    print(f"MLflow UI on {without_credentials(uri)}")
    address = f"http://{options.host}:{options.port}{page(options.run)}"
    print(f"open {address}  (takes some seconds; Ctrl-C ends it)", flush=True)
    with suppress(KeyboardInterrupt), stop_at_once():
        return serve(server_command(uri, options.host, options.port))
    return 0


def serve(command: list[str]) -> int:
    """Run a server that starts processes of its own, and give its exit code; all of them end when this function does."""
    server = subprocess.Popen(command, start_new_session=True)
    try:
        while True:  # a signal that comes just before a wait without end would be noticed after it
            with suppress(subprocess.TimeoutExpired):
                return server.wait(_PATIENCE)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):  # none is left, or some are
                os.killpg(server.pid, number)
                server.wait(_PATIENCE)


def server_command(uri: str, host: str, port: int) -> list[str]:
    """The command that serves the UI of a store."""
    options = ["--workers", "1", "--backend-store-uri", uri, "--host", host, "--port", str(port)]
    return [sys.executable, "-m", "mlflow", "ui", *options]


def check_port(host: str, port: int) -> None:
    """See that an address can be listened on."""
    if not 0 < port < 65536:
        raise UserError(f"--port: expected a number from 1 to 65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise UserError(f"--port: cannot listen on {host}:{port} ({error.strerror}); try --port {port + 1}") from error
