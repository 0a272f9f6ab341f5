"""The real SAEBench on hedgelab's SAEs, its results in their runs.

SAEBench needs NumPy 1 and other versions than hedgelab does, so it runs in a Python of its own: SAEs are handed over as
SAELens folders, results come back as the JSON files that it writes.
"""

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
from hedgelab.tracking.models import link_metrics
from hedgelab.tracking.runs import FoundSAE
from hedgelab.tracking.store import ensure_store

PYTHON = "SAEBENCH_PYTHON"
"""Environment variable with the path of a Python that has sae-bench."""
_WORKER = Path(__file__).with_name("saebench_worker.py")
_RESULTS = "_eval_results.json"


def run_saebench(found: Sequence[FoundSAE]) -> int:
    """Run SAEBench on SAEs and put the scores into their runs as ``saebench/<evaluation>/...``."""
    from mlflow.entities import Metric

    if problem := hub_problem():
        raise UserError(f"--suite saebench: its data sets are on the Hugging Face hub, which cannot be had ({problem})")
    sources = [ActivationSource.load(one.folder) or ActivationSource() for one in found]
    for one, source in zip(found, sources, strict=True):
        if one.run is None or source.model is None:
            name = one.run.name if one.run else one.folder
            raise UserError(f"--suite saebench: {name}: give a run that says which language model it reads")
    models = sorted({str(source.model) for source in sources})
    if len(models) > 1:
        raise UserError(f"--suite saebench: runs on one language model at a time, got {', '.join(models)}")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        python = os.environ.get(PYTHON) or sys.executable
        command = [python, str(_WORKER), models[0].rsplit("/", 1)[-1], str(results)]
        for number, (one, source) in enumerate(zip(found, sources, strict=True)):
            target = Path(folder) / f"sae{number}"
            export_saelens(one.load(), target, source, "transformer_lens")
            command.append(f"{target.name}={target}")
        try:
            subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            *_, last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            advice = f"sae-bench needs an environment of its own (NumPy 1), whose python {PYTHON} names"
            raise UserError(f"--suite saebench: {python} failed: {last}; {advice}") from error
        client, now = ensure_store(), int(time.time() * 1000)
        for number, run in enumerate(one.run for one in found):
            assert run is not None
            scores = dict(read_results(results, f"sae{number}"))
            client.log_batch(run.run_id, metrics=[Metric(key, value, now, 0) for key, value in scores.items()])
            link_metrics(client, run.run_id)
            for file in results.rglob(f"sae{number}_*{_RESULTS}"):
                client.log_artifact(run.run_id, str(file), f"evaluation/saebench/{file.parent.name}")
            tqdm.write(f"evaluate: saebench: {len(scores)} scores of {run.name}")
    return 0


def read_results(folder: Path, name: str) -> Iterator[tuple[str, float]]:
    """Scores of one SAE from SAEBench's result files, named ``saebench/<evaluation>/<score>``."""
    for file in sorted(folder.rglob(f"{name}_*{_RESULTS}")):
        document = json.loads(file.read_text())
        evaluation = str(document.get("eval_type_id", file.parent.name))
        for scores in document.get("eval_result_metrics", {}).values():
            for key, value in scores.items():
                if type(value) in (int, float) and value >= 0:  # -1 means: not measured
                    yield f"saebench/{evaluation}/{key}", float(value)
