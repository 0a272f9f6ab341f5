"""A warm parent that forks one process for every command line: a start costs milliseconds instead of seconds of imports.

Run as a script. Reads one JSON object a line: ``{"words": [...], "cwd": ..., "env": {...}, "out": file}`` is answered by
the process id of a child that runs ``hedgelab`` with these words, as another release where ``env`` has a ``RELEASE``, and in
the namespaces that the files ``inside`` stand for; ``{"wait": pid}`` by how that child ended.
"""

import ctypes
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

WARM = (
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.tracking",
    "hedgelab.cli.hedge",
    "hedgelab.metrics.evaluation",
    "hedgelab.plots",
)


class ForkServer:
    """The other side: starts the warm parent and talks to it."""

    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HEDGELAB_DEBUG": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout.readline() == "ready\n"

    def _ask(self, question):
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, words, folder, inside=(), **env):
        """Process id of ``hedgelab *words`` in a folder; what it prints is added to ``out.txt`` there."""
        out = str(Path(folder) / "out.txt")
        return self._ask({"words": words, "cwd": str(folder), "env": env, "out": out, "inside": list(inside)})

    def wait(self, pid):
        """How a process ended: its exit code, or minus the signal that killed it."""
        return self._ask({"wait": pid})

    def run(self, words, folder, inside=(), **env):
        """Exit code of ``hedgelab *words`` in a folder."""
        return self.wait(self.start(words, folder, inside, **env))

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def child(command):
    for namespace in command["inside"]:
        with open(namespace) as file:  # noqa: PTH123 (no path of this process' own)
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), "setns")
    os.chdir(command["cwd"])
    os.environ.update(command["env"])
    out = os.open(command["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.path[:0] = [str(Path(__file__).parent), command["cwd"]]
    if (release := command["env"].get("RELEASE")) is not None:
        for name, module in sys.modules.items():
            if name.partition(".")[0] == "hedgelab" and hasattr(module, "__version__"):
                module.__version__ = release
    import checkpointed

    from hedgelab.cli import main
    from hedgelab.cli.errors import guarded

    code = 99
    try:
        match command["words"]:
            case ["fits", name]:
                code = guarded(lambda: checkpointed.run(name, command["cwd"]))
            case words:
                code = main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve():
    import torch

    for module in WARM:
        import_module(module)
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            _, status = os.waitpid(command["wait"], 0)
            print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(command)
        print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    serve()
