import subprocess
import sys

import pytest

from hedgelab import __version__
from hedgelab.cli import COMMANDS, main


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_overview_lists_every_command(words, capsys):
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hedgelab {__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["runs", "--help"], ["ui", "--help"], ["fit", "--config=x"]])
def test_light_answers_import_neither_torch_nor_mlflow(words):
    code = f"import sys; from hedgelab.cli import main; main({words}); print(sorted({{'torch', 'mlflow'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_of_commands(capsys):
    assert main(["runs", "--help"]) == 0
    assert "--experiment NAME" in capsys.readouterr().out
    assert main(["ui", "--help"]) == 0
    assert "127.0.0.1" in capsys.readouterr().out
