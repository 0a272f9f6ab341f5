"""The Python door: ``import hedgelab`` costs nothing, and its ten-line scripts do what the commands do."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file

import hedgelab as hl
from hedgelab.cli import main
from tests.docs.generated import ROOT


def declared():
    """Names that type checkers see."""
    tree = ast.parse(Path(hl.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {alias.asname or alias.name for node in block.body for alias in node.names}


def test_every_name_is_there_and_type_checkers_see_it():
    assert declared() == set(hl.__all__)
    for name in hl.__all__:
        assert getattr(hl, name) is not None
        assert name in dir(hl)
    with pytest.raises(AttributeError, match=r"hedgelab has no 'TopK'; it has .*TopKSAE"):
        hl.TopK  # noqa: B018


def test_importing_it_imports_neither_torch_nor_lightning():
    code = "import sys, hedgelab; print(sorted({'torch', 'lightning', 'mlflow', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


CONFIG = """\
seed_everything: 0
trainer: {max_steps: 300, accelerator: cpu, logger: false}
data: {class_path: TensorActivations, init_args: {x: x.safetensors, batch_size: 256}}
model:
  class_path: TopKSAE
  init_args: {d_sae: 64, k: 4, optimizer: {class_path: torch.optim.Adam, init_args: {lr: 1.0e-3}}}
"""


def test_the_loop_of_the_readme_ends_where_hedgelab_fit_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    L.seed_everything(0, verbose=False)
    script = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[0]
    names = {}
    exec(script, names)
    save_file({"x": names["x"]}, "x.safetensors")
    Path("fit.yaml").write_text(CONFIG)
    assert main(["fit", "--config", "fit.yaml"]) == 0
    (fitted,) = [path for path in tmp_path.rglob("sae.safetensors") if path.parent.name != "my_sae"]
    torch.testing.assert_close(load_file(fitted), load_file("my_sae/sae.safetensors"), rtol=1e-5, atol=1e-6)
    held_out = names["data"].batch("val", 0)
    losses = [sae.loss(held_out).total.item() for sae in (hl.load(fitted.parent), hl.load("my_sae"))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[1] < float(held_out.x.square().sum(1).mean()) / 2
