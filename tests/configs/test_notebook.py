"""The notebook runs from top to bottom and shows what it says; its stored outputs are those of a run."""

import ast
import contextlib
import io
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parents[2] / "configs/notebooks/first_steps.ipynb"
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def run(source, names):
    """What a notebook shows for a cell: what is printed, then the value of its last expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";") else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, str(NOTEBOOK), "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)
    return printed.getvalue() + ("" if value is None else repr(value))


def stored(cell):
    outputs = cell["outputs"]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "".join("".join(text) for text in texts if "Figure" not in "".join(text))


def test_it_runs_and_shows_what_is_stored_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert NOTEBOOK.stat().st_size < 60_000
    names = {"__name__": "notebook"}
    shown = 0
    for cell in cells:
        got = run("".join(cell["source"]), names)
        expected = stored(cell)
        if "L.Trainer" in "".join(cell["source"]):
            continue  # prints what Lightning likes
        assert NUMBER.sub("#", got).split() == NUMBER.sub("#", expected).split()
        numbers = [float(number) for number in NUMBER.findall(expected)]
        assert [float(number) for number in NUMBER.findall(got)] == pytest.approx(numbers, abs=0.02)
        shown += len(numbers)
    assert shown > 10
    plt.close("all")
    assert names["sae"].W_dec.shape == (1, 10)
    assert names["hedged"][2] == pytest.approx(0, abs=0.01)  # independent features
    assert names["hedged"] == sorted(names["hedged"])
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
