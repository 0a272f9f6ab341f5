"""The real SAEBench and sae-probes on hedgelab's SAEs, their results in the SAEs' runs.

SAEBench needs NumPy 1 and other versions than hedgelab does, so both run in a Python of their own: SAEs are handed over as
SAELens folders, results come back as the JSON files that they write. sae-probes (Kantamneni et al. 2025, arXiv 2502.16681)
brings its data sets along, and is run with several seeds, whose spread is its noise.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

from tqdm import tqdm

from hedgelab.data.llm.model import hub_problem
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.interop.saelens import export_saelens
from hedgelab.tracking.models import link_metrics
from hedgelab.tracking.runs import FoundSAE
from hedgelab.tracking.store import ensure_store

PYTHON = {"saebench": "SAEBENCH_PYTHON", "sae_probes": "SAE_PROBES_PYTHON"}
"""Environment variables with the path of a Python that has sae-bench, or sae-probes."""
_NEEDS = {"saebench": "sae-bench needs an environment of its own (NumPy 1)", "sae_probes": "pip install sae-probes"}
_WORKER = Path(__file__).with_name("saebench_worker.py")
_RESULTS = "_eval_results.json"


def run_bench(found: Sequence[FoundSAE], bench: str) -> int:
    """Run a benchmark on SAEs and put its scores into their runs, as ``saebench/<evaluation>/...`` or ``sae_probes/...``."""
    from mlflow.entities import Metric

    if (problem := hub_problem()) and bench == "saebench":
        raise UserError(f"--suite saebench: its data sets are on the Hugging Face hub, which cannot be had ({problem})")
    sources = [ActivationSource.load(one.folder) or ActivationSource() for one in found]
    for one, source in zip(found, sources, strict=True):
        if one.run is None or source.model is None:
            name = one.run.name if one.run else one.folder
            raise UserError(f"--suite {bench}: {name}: give a run that says which language model it reads")
    models = sorted({str(source.model) for source in sources})
    if len(models) > 1:
        raise UserError(f"--suite {bench}: runs on one language model at a time, got {', '.join(models)}")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        python = os.environ.get(PYTHON[bench]) or sys.executable
        command = [python, str(_WORKER), bench, models[0].rsplit("/", 1)[-1], str(results)]
        for number, (one, source) in enumerate(zip(found, sources, strict=True)):
            target = Path(folder) / f"sae{number}"
            export_saelens(one.load(), target, source, "transformer_lens")
            command.append(f"{target.name}={target}")
        try:
            environment = {**os.environ, **({"HF_HUB_OFFLINE": "1"} if problem else {})}  # the model may be there
            subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True, env=environment)
        except (OSError, subprocess.CalledProcessError) as error:
            *_, last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            advice = f"{_NEEDS[bench]}, whose python {PYTHON[bench]} names"
            raise UserError(f"--suite {bench}: {python} failed: {last}; {advice}") from error
        client, now = ensure_store(), int(time.time() * 1000)
        for number, run in enumerate(one.run for one in found):
            assert run is not None
            scores = dict((read_results if bench == "saebench" else read_probes)(results, f"sae{number}"))
            client.log_batch(run.run_id, metrics=[Metric(key, value, now, 0) for key, value in scores.items()])
            link_metrics(client, run.run_id)
            for file in results.rglob(f"sae{number}_*{_RESULTS}"):
                client.log_artifact(run.run_id, str(file), f"evaluation/saebench/{file.parent.name}")
            if (folder_of_probes := results / f"sae{number}").is_dir():
                client.log_artifact(run.run_id, str(folder_of_probes), "evaluation/sae_probes")
            tqdm.write(f"evaluate: {bench}: {len(scores)} scores of {run.name}")
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


def read_probes(folder: Path, name: str) -> Iterator[tuple[str, float]]:
    """Scores of one SAE from sae-probes' files, a folder a seed: means over data sets (``sae_probes/f1_k1``) and noise."""
    of_seeds: dict[str, list[float]] = {}
    for seed in sorted((folder / name).iterdir()):
        rows = [row for file in sorted(seed.rglob("*.json")) for row in json.loads(file.read_text())]
        for kind, k in product(("f1", "auc"), sorted({row["k"] for row in rows})):
            mean = fmean(row[f"test_{kind}"] for row in rows if row["k"] == k)
            of_seeds.setdefault(f"sae_probes/{kind}_k{k}", []).append(mean)
    for score, values in of_seeds.items():
        yield score, fmean(values)
        if len(values) > 1:
            yield f"{score}_noise", stdev(values) / len(values) ** 0.5
