"""The adapter to SAEBench, with a package of the same calls in its place: hand-over, results, one clear line otherwise."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.interop import saebench
from hedgelab.saes import TopKSAE, VanillaSAE, save_sae
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.runs import resolve_run, resolve_sae

from .conftest import peer_python

_EVALUATION = """
import dataclasses, json, os
@dataclasses.dataclass
class {config}:
    model_name: str
    llm_batch_size: int
    llm_dtype: str
    {more}
def run_eval(config, selected_saes, device, output_path, force_rerun=False, {flags}):
    name = {name}
    os.makedirs(output_path, exist_ok=True)
    for label, sae in selected_saes:
        path = os.path.join(output_path, label + "_custom_sae_eval_results.json")
        scores = {{"score": float(sae.d_sae), "none": -1, "model": config.model_name}}
        json.dump({{"eval_type_id": name, "eval_result_metrics": {{"mean": scores}}}}, open(path, "w"))
"""
_FLAGS = "clean_up_activations=False, save_activations=True"
_STANDINS = {
    "absorption": ("AbsorptionEvalConfig", "'absorption'", "", ""),
    "sparse_probing": ("SparseProbingEvalConfig", "'sparse_probing'", "", _FLAGS),
}
_SAE_LENS = """
import json, os
class SAE:
    @classmethod
    def load_from_disk(cls, folder, device):
        sae = cls()
        config = json.load(open(os.path.join(folder, "cfg.json")))
        sae.d_sae, sae.kind = config["d_sae"], config["architecture"]
        sae.cfg = type("Config", (), {"architecture": staticmethod(lambda: sae.kind)})
        return sae
    def fold_W_dec_norm(self):
        assert self.kind != "topk"
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder with packages that are called as sae_bench and sae_lens are."""
    root = tmp_path / "site"
    for module, (config, name, more, flags) in _STANDINS.items():
        folder = root / "sae_bench" / "evals" / module
        folder.mkdir(parents=True)
        (folder / "main.py").write_text(_EVALUATION.format(config=config, name=name, more=more, flags=flags))
    for name, text in (("sae_lens", _SAE_LENS), ("transformer_lens", "")):
        (root / name).mkdir()
        (root / name / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv(saebench.PYTHON["saebench"], sys.executable)
    monkeypatch.setattr(saebench, "hub_problem", lambda: None)
    return root


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Make a run that keeps an SAE."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def make(name, sae, source):
        tracker = MLflowTracker(run_name=name)
        folder = tmp_path / name / "sae"
        save_sae(sae, folder)
        if source is not None:
            source.save(folder)
        tracker.log_artifact(folder, "sae")
        tracker.log_tags({"weights_sha256": name})
        tracker.finalize("success")
        return resolve_sae(tracker.run_id)

    return make


SOURCE = ActivationSource(model="org/gemma-2-2b", hook="model.layers.2", layer=2)


@pytest.mark.slow
def test_scores_come_back_into_each_run(package, run, capsys):
    torch.manual_seed(0)
    found = [run("one", TopKSAE(6, 8, 2), SOURCE), run("two", VanillaSAE(6, 12, 0.1), SOURCE)]
    assert saebench.run_bench(found, "saebench") == 0
    for one, d_sae in zip(found, (8, 12), strict=True):
        metrics = resolve_run(one.run.run_id).metrics
        names = {f"saebench/{name}/score" for name in ("absorption", "sparse_probing")}
        assert {key for key in metrics if key.startswith("saebench")} == names
        assert {metrics[name] for name in names} == {d_sae}
    assert capsys.readouterr().out.count("evaluate: saebench: 2 scores of") == 2


_PROBES = """
import json, pathlib
def run_sae_evals(sae, model_name, hook_name, reg_type, setting, ks=None, binarize=False, results_path="results",
                  model_cache_path=None, datasets=None, device="cuda", mean_diff_normalization="mean", seed=42):
    assert hook_name == "blocks.2.hook_resid_post" and model_name == "gemma-2-2b"
    for number, dataset in enumerate(("5_a", "6_b")):
        folder = pathlib.Path(results_path) / f"sae_probes_{model_name}" / f"{setting}_setting"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"k": k, "dataset": dataset, "test_f1": 0.5 + 0.2 * number, "test_auc": seed / 100} for k in ks]
        (folder / f"{dataset}_{hook_name}__{reg_type}.json").write_text(json.dumps(rows))
"""


@pytest.mark.slow
def test_sae_probes_is_run_with_several_seeds(package, run, monkeypatch):
    (package / "sae_probes.py").write_text(_PROBES)
    found = [run("one", TopKSAE(6, 8, 2), SOURCE)]
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("SAE_PROBES_PYTHON", "no-such-python")
        with pytest.raises(UserError, match=r"--suite sae_probes: no-such-python failed: .*; pip install sae-probes"):
            saebench.run_bench(found, "sae_probes")
    assert saebench.run_bench(found, "sae_probes") == 0
    metrics = resolve_run(found[0].run.run_id).metrics
    assert metrics["sae_probes/f1_k1"] == pytest.approx(0.6)
    assert metrics["sae_probes/f1_k1_noise"] == pytest.approx(0)
    assert metrics["sae_probes/auc_k16"] == pytest.approx(0.43)
    assert metrics["sae_probes/auc_k16_noise"] == pytest.approx(0.01 / 3**0.5)


@pytest.mark.slow
def test_what_is_missing_is_one_line(package, run, monkeypatch):
    found = [run("one", TopKSAE(6, 8, 2), SOURCE)]
    with pytest.raises(UserError, match="give a run that says which language model it reads"):
        saebench.run_bench([run("other", TopKSAE(6, 8, 2), None)], "saebench")
    with pytest.raises(UserError, match="one language model at a time"):
        saebench.run_bench([*found, run("b", TopKSAE(6, 8, 2), ActivationSource(model="c", layer=1))], "saebench")
    monkeypatch.setattr(saebench, "hub_problem", lambda: "no route")
    with pytest.raises(UserError, match=r"on the Hugging Face hub, which cannot be had \(no route\)"):
        saebench.run_bench(found, "saebench")
    monkeypatch.setattr(saebench, "hub_problem", lambda: None)
    monkeypatch.setenv("PYTHONPATH", os.devnull)
    with pytest.raises(UserError, match=r"No module named 'sae_lens'; sae-bench needs an environment of its own"):
        saebench.run_bench(found, "saebench")
    monkeypatch.setenv(saebench.PYTHON["saebench"], "no-such-python")
    with pytest.raises(UserError, match=r"no-such-python failed: .*whose python SAEBENCH_PYTHON names"):
        saebench.run_bench(found, "saebench")


@pytest.mark.slow
def test_the_real_package_has_what_the_one_in_its_place_has():
    """By its source alone: to import it takes another NumPy."""
    python = peer_python()
    where = "import importlib.util as u; s = u.find_spec('sae_bench'); print(s.origin if s else '')"
    found = python and subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    if not found:
        pytest.skip("sae-bench is not installed; set HEDGELAB_PEER_PYTHON to an interpreter that has its files")
    for module, (config, name, more, flags) in _STANDINS.items():
        folder = Path(found).parent / "evals" / module
        ours = ast.parse(_EVALUATION.format(config=config, name=name, more=more, flags=flags))
        theirs = ast.parse((folder / "main.py").read_text())
        assert arguments(ours, "run_eval") <= arguments(theirs, "run_eval")
        assert fields(ours, config) <= fields(ast.parse((folder / "eval_config.py").read_text()), config)


def arguments(tree, name):
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return {one.arg for one in function.args.args}


def fields(tree, name):
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    return {node.target.id for node in found.body if isinstance(node, ast.AnnAssign)}


def test_only_measured_scores_are_read(tmp_path):
    (tmp_path / "sae0_x_eval_results.json").write_text(
        '{"eval_type_id": "absorption", "eval_result_metrics": {"a": {"x": 0.5, "y": -1, "z": "text"}, "b": {"w": 2}}}'
    )
    (tmp_path / "sae01_x_eval_results.json").write_text('{"eval_result_metrics": {"a": {"x": 9}}}')
    assert dict(saebench.read_results(tmp_path, "sae0")) == {"saebench/absorption/x": 0.5, "saebench/absorption/w": 2.0}
