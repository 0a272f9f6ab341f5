"""Evaluations at work: suites made, SAEs scored, everything put into their runs."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hedgelab import __version__
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm import LLMDataModule
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.protocols.evaluation.general import DensitySuite, GeometrySuite, ValidationRows
from hedgelab.protocols.evaluation.loss import LossSuite
from hedgelab.protocols.evaluation.options import EvaluationOptions
from hedgelab.protocols.evaluation.reader import ModelReader
from hedgelab.protocols.evaluation.scores import Scores, Suite
from hedgelab.protocols.evaluation.texts import SCRSuite, TPPSuite
from hedgelab.protocols.evaluation.tokens import AbsorptionSuite, ProbingSuite
from hedgelab.saes import SAE
from hedgelab.tracking.store import ensure_store

_TAG = "evaluated"


@dataclass(frozen=True)
class Subject:
    """An SAE to be scored.

    Attributes:
        name: What it is called, different from all others.
        sae: The SAE, ready to measure.
        run_id: The run that gets its scores.
        done: Fingerprints of the suites that were run on it before, by suite.
        before: Its scores from then, among its other metrics.
    """

    name: str
    sae: SAE
    run_id: str
    done: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)


def make_suites(
    names: Sequence[str], options: EvaluationOptions, data: ActivationDataModule, known: ActivationSource | None
) -> list[Suite]:
    """The named suites; none of them touches a model or text before it is asked to score."""
    rows = ValidationRows(data, options.rows)
    made: dict[str, Callable[[], Suite]] = {
        "density": lambda: DensitySuite(rows),
        "geometry": lambda: GeometrySuite(rows),
    }
    if isinstance(data, LLMDataModule):
        reader = ModelReader(data, known)
        rows.read_from(reader)
        made["absorption"] = lambda: AbsorptionSuite(reader, options.letters)
        made["loss_recovered"] = lambda: LossSuite(reader, options.loss_contexts)
        if (words := options.words) is not None:
            made["probing"] = lambda: ProbingSuite(reader, words, options.ks)
        if (topics := options.topics) is not None:
            made["tpp"] = lambda: TPPSuite(reader, topics, options.silenced)
        if (removal := options.removal) is not None:
            made["scr"] = lambda: SCRSuite(reader, removal, options.silenced)
    return [made[name]() for name in names]


def fingerprint(suite: str, options: EvaluationOptions, overrides: Mapping[str, Any] | None = None) -> str:
    """Changes with whatever a suite's scores depend on beside the SAE and its own data; ``overrides``: of that data."""
    of = {
        "density": ["rows"], "geometry": ["rows"], "probing": ["words", "ks"], "absorption": ["letters"],
        "loss_recovered": ["loss_contexts"], "tpp": ["topics", "silenced"], "scr": ["removal", "silenced"],
    }  # fmt: skip
    values = asdict(options)
    parts = [__version__, {key: values[key] for key in of[suite]}, *([overrides] if overrides else [])]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def evaluate(
    subjects: Sequence[Subject],
    suites: Sequence[Suite],
    options: EvaluationOptions,
    announce: Callable[[str], None],
    overrides: Mapping[str, Any] | None = None,
    uri: str | None = None,
) -> dict[str, dict[str, float]]:
    """Score every SAE by every suite; each result is in the SAE's run as soon as it is there.

    A suite that was run on an SAE before, with the same options and overrides of its data, is not run again.

    Returns:
        The metrics of each SAE, by its name.
    """
    results: dict[str, dict[str, float]] = {subject.name: {} for subject in subjects}
    by_name = {subject.name: subject for subject in subjects}
    for suite in suites:
        mark = fingerprint(suite.name, options, overrides)
        missing = {s.name: s.sae for s in subjects if s.done.get(suite.name) != mark}
        for subject in subjects:
            if subject.name not in missing:
                kept = {key: value for key, value in subject.before.items() if key.startswith(f"{suite.name}/")}
                results[subject.name] |= kept
        if not missing:
            announce(f"{suite.name}: was done before")
            continue
        start, count = time.monotonic(), 0
        for name, scores in suite.score(missing):
            record(by_name[name].run_id, suite.name, mark, scores, uri)
            results[name] |= scores.metrics
            count += 1
        announce(f"{suite.name}: {count} SAE{'s' if count > 1 else ''} in {time.monotonic() - start:.0f} s")
    return results


def record(run_id: str, suite: str, mark: str, scores: Scores, uri: str | None = None) -> None:
    """Put a suite's scores into a run; the tag that says so comes last."""
    from mlflow.entities import Metric

    client, now = ensure_store(uri), int(time.time() * 1000)
    client.log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in scores.metrics.items()])
    with tempfile.TemporaryDirectory() as folder:
        for name, text in scores.tables.items():
            file = Path(folder) / "evaluation" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        for name, draw in scores.figures.items():
            file = Path(folder) / "figures" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            draw().savefig(file)
        client.log_artifacts(run_id, folder)
    client.set_tag(run_id, f"{_TAG}.{suite}", mark)


def done_before(tags: Mapping[str, str]) -> dict[str, str]:
    """Fingerprints of the suites that a run's tags tell of."""
    return {key.removeprefix(f"{_TAG}."): value for key, value in tags.items() if key.startswith(f"{_TAG}.")}


def check_widths(subjects: Sequence[Subject], data: ActivationDataModule) -> None:
    """Raise a UserError where an SAE does not fit the activations."""
    for subject in subjects:
        if subject.sae.d_in != data.d_in:
            raise UserError(
                f"{subject.name}: reads activations of width {subject.sae.d_in}, data gives {data.d_in}; set data"
            )
