"""The real SAEBench on hedgelab's SAEs, its results in their runs.

SAEBench needs NumPy 1 and other versions than hedgelab does, so it runs in a Python of its own: SAEs are handed over as
SAELens folders, results come back as the JSON files that it writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from hedgelab.data.llm.model import hub_problem
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.interop.saelens import export_saelens
from hedgelab.tracking.runs import FoundSAE
from hedgelab.tracking.store import ensure_store

PYTHON = "SAEBENCH_PYTHON"
"""Environment variable with the path of a Python that has sae-bench."""
EVALUATIONS = ("absorption", "sparse_probing", "scr", "tpp")
_WORKER = Path(__file__).with_name("saebench_worker.py")
_RESULTS = "_eval_results.json"


def run_saebench(found: Sequence[FoundSAE]) -> int:
    """Run SAEBench on SAEs and put the scores into their runs as ``saebench/<evaluation>/...``."""
    python = os.environ.get(PYTHON) or sys.executable
    _check_package(python)
    if problem := hub_problem():
        raise UserError(f"--suite saebench: its data sets are on the Hugging Face hub, which cannot be had ({problem})")
    sources = [_source(one) for one in found]
    models = sorted({str(source.model) for source in sources})
    if len(models) > 1:
        raise UserError(f"--suite saebench: runs on one language model at a time, got {', '.join(models)}")
    with tempfile.TemporaryDirectory() as folder:
        targets = {f"sae{number}": Path(folder) / f"sae{number}" for number in range(len(found))}
        for one, source, target in zip(found, sources, targets.values(), strict=True):
            export_saelens(one.load(), target, source, "transformer_lens")
        results = Path(folder) / "results"
        pairs = [f"{name}={target}" for name, target in targets.items()]
        command = [python, str(_WORKER), models[0].rsplit("/", 1)[-1], ",".join(EVALUATIONS), str(results), *pairs]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise UserError(f"--suite saebench: SAEBench failed: {lines[-1]}")
        for name, one in zip(targets, found, strict=True):
            count = _record(one, results, name)
            tqdm.write(f"evaluate: saebench: {count} scores of {one.run.name if one.run else one.folder}")
    return 0


def read_results(folder: Path, name: str) -> Iterator[tuple[str, float]]:
    """Scores of one SAE from SAEBench's result files, named ``saebench/<evaluation>/<score>``."""
    for file in sorted(folder.rglob(f"{name}_*{_RESULTS}")):
        document = json.loads(file.read_text())
        evaluation = str(document.get("eval_type_id", file.parent.name))
        for scores in document.get("eval_result_metrics", {}).values():
            for key, value in scores.items():
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if is_number and value >= 0:  # -1 means: not measured
                    yield f"saebench/{evaluation}/{key}", float(value)


def _record(one: FoundSAE, results: Path, name: str) -> int:
    """Put one SAE's scores and result files into its run; how many scores there are."""
    from mlflow.entities import Metric

    assert one.run is not None
    client, now = ensure_store(), int(time.time() * 1000)
    metrics = [Metric(key, value, now, 0) for key, value in dict(read_results(results, name)).items()]
    client.log_batch(one.run.run_id, metrics=metrics)
    for file in results.rglob(f"{name}_*{_RESULTS}"):
        client.log_artifact(one.run.run_id, str(file), f"evaluation/saebench/{file.parent.name}")
    return len(metrics)


def _source(one: FoundSAE) -> ActivationSource:
    if one.run is None:
        raise UserError(f"--suite saebench: {one.folder} has no run to put scores into; name a run")
    source = ActivationSource.load(one.folder)
    if source is None or source.model is None:
        raise UserError(f"--suite saebench: run {one.run.name} does not say which language model it reads")
    return source


def _check_package(python: str) -> None:
    """Raise a UserError unless that Python has what SAEBench needs."""
    names = ("sae_bench", "sae_lens", "transformer_lens")
    probe = f"import importlib.util as u; print(*[n for n in {names} if not u.find_spec(n)])"
    try:
        done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{PYTHON}: cannot run {python} ({error})") from error
    if missing := done.stdout.split():
        raise UserError(
            f"--suite saebench: {', '.join(missing)} not installed; install sae-bench in an environment of its own (it needs "
            f"NumPy 1) and set {PYTHON} to its python"
        )
