"""Runs read back from the store: listed, and found by what the user calls them. Imports no torch."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hedgelab.errors import UserError
from hedgelab.tracking.store import all_experiments, ensure_store, every, reason_of, sqlite_file, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    from hedgelab.saes import SAE

PARENT_TAG = "mlflow.parentRunId"
SAE_TAG = "weights_sha256"
_HAS_SAE = f"tags.{SAE_TAG} LIKE '%'"
_SAE_FILE, _ADDRESSES = "sae.json", ("models:/", "runs:/")  # of MLflow's
_PAGE = 100
CONTROL_TAG = "hedgelab.control"
"""Tag that says which control an SAE is: a frozen part, or the oracle of a toy."""
ORACLE_TAG = "hedgelab.oracle"
"""Tag of the run that holds the scores of a toy's oracle: which toy it is."""
REPORT_TAG = "hedgelab.report"
"""Tag of the run that holds an experiment's report; it is no run of anything."""


@dataclass(frozen=True)
class RunSummary:
    """One run as the store has it: its times (ISO 8601, UTC), flat parameters, the last value of each metric."""

    name: str
    run_id: str
    experiment: str
    status: str
    start: str
    duration_seconds: float | None
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    artifact_uri: str
    description: str | None = None
    parent: str | None = None


class FoundSAE(NamedTuple):
    """An SAE on disk, and the run that it comes from; None for a folder of the user's."""

    folder: Path
    run: RunSummary | None

    def load(self, class_path: str | None = None) -> "SAE":
        """The SAE, ready to measure; a class of the user's own is imported first."""
        from hedgelab.identity import imported
        from hedgelab.saes import load_sae

        import_class(class_path)
        if self.run is not None:
            imported(self.run.params.get("model.class_path", ""))
        return load_sae(self.folder).eval()


def import_class(path: str | None) -> None:
    """Import an SAE class of the user's own, so that files may name it."""
    from hedgelab.identity import imported

    if path is not None and imported(path) is None:
        raise UserError(f"--class: cannot import {path!r}; expected package.module.Class, its folder on PYTHONPATH")


def resolve_run(word: str, with_sae: bool = False) -> RunSummary:
    """The run that a word on the command line means.

    ``last`` is the newest run that is not part of another; else the word is a run's name (of several, the newest is meant),
    its id or the first characters of its id, or MLflow's address of a model or a run's artifact (``models:/…``, ``runs:/…``).
    ``with_sae`` looks only among runs that kept an SAE.
    """
    if word.startswith(_ADDRESSES):
        word = _run_of(word)
    wanted = [_HAS_SAE] if with_sae else []
    if word == "last":
        found = _newest(wanted, 1, own=True)
    else:
        found = [] if set(word) & set("'\\\n") else _newest([f"attributes.run_name = '{word}'", *wanted], 1)
        if not found and re.fullmatch(r"[0-9a-f]{4,32}", word):
            found = _newest([f"attributes.run_id LIKE '{word}%'", *wanted], 5)
    if len(found) > 1:
        fits = ", ".join(run.run_id[:12] for run in found)
        raise UserError(f"'{word}' is the beginning of several run ids ({fits}); give more characters")
    if not found:
        kind = "run that kept an SAE" if with_sae else "run"
        raise UserError(f"no {kind} '{word}' in the store; give 'last', or a name or id that `hedgelab runs` lists")
    return found[0]


def _run_of(address: str) -> str:
    """Id of the run that a model comes from, by its id, or by the name it is registered under; or that an artifact is of."""
    if address.startswith("runs:"):
        return address.removeprefix("runs:").strip("/").partition("/")[0]
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    client, _ = open_runs()
    try:
        found = get_model_name_and_version(client, address)  # type: ignore[no-untyped-call]
        source = client.get_model_version(*found).run_id if found[1:] else client.get_logged_model(*found).source_run_id
    except MlflowException as error:
        raise UserError(f"{address}: no such model ({reason_of(error)}); give models:/ID as the UI shows it") from error
    if not source:
        raise UserError(f"{address}: no run of hedgelab made this model; expected the model of a run that kept an SAE")
    return str(source)


def load(place: str | Path, cls: "type[SAE] | None" = None) -> "SAE":
    """Read back the SAE in a folder (:func:`hedgelab.saes.load_sae`), or at MLflow's ``models:/…`` or ``runs:/…``."""
    from hedgelab.saes import load_sae

    if not str(place).startswith(_ADDRESSES):
        return load_sae(place, cls)
    found = resolve_sae(str(place))
    return found.load() if cls is None else load_sae(found.folder, cls)


def resolve_sae(word: str) -> FoundSAE:
    """The SAE that a word on the command line means: a folder that holds one, or a run (see :func:`resolve_run`)."""
    folder = Path(word)
    for candidate in (folder, folder / "sae"):
        if (candidate / _SAE_FILE).is_file():
            return FoundSAE(candidate, None)
    if folder.is_dir():
        raise UserError(f"{folder}: holds no {_SAE_FILE}; expected a run's name or id, or a folder with an SAE")
    run = resolve_run(word, with_sae=True)
    return FoundSAE(artifact(run, "sae"), run)


def children(run: RunSummary, with_sae: bool = False, most: int | None = None) -> list[RunSummary]:
    """The runs right below a run, the oldest first, the last ``most``; with ``with_sae`` finished ones that kept an SAE."""
    wanted = ["attributes.status = 'FINISHED'", _HAS_SAE] if with_sae else []
    return _newest([f"tags.{PARENT_TAG} = '{run.run_id}'", *wanted], most)[::-1]


def artifact(run: RunSummary, path: str) -> Path:
    """A run's artifact on this machine: where it lies if it is here, else a copy."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar a file says nothing
    try:
        return Path(ensure_store().download_artifacts(run.run_id, path))
    except Exception as error:  # every artifact store has errors of its own
        reason = reason_of(error)
        raise UserError(f"run {run.run_id[:8]} ({run.name}): cannot get its artifact '{path}' ({reason})") from error


def open_runs() -> "tuple[MlflowClient, dict[str, str]]":
    """A client of the store, which must exist, and the names of its experiments by id."""
    database = sqlite_file(tracking_uri())
    if database is not None and not database.exists():
        raise UserError(f"MLFLOW_TRACKING_URI: no store at {database}; start a run with `hedgelab fit`, or set it")
    client = ensure_store()
    return client, all_experiments(client)


def list_runs(experiment: str | None = None, last: bool = False, limit: int = 20) -> list[RunSummary]:
    """The latest runs, newest first: of one experiment or of all, or only the last that is not part of another."""
    return _newest([], 1 if last else limit, own=last, experiment=experiment)


def run_with(tags: Mapping[str, str], experiment: str) -> RunSummary | None:
    """The newest run of an experiment that has these tags; None where there is none, or no such experiment or store yet."""
    with suppress(UserError):
        return next(iter(_newest([f"tags.{key} = '{value}'" for key, value in tags.items()], 1, experiment=experiment)), None)
    return None


def search_runs(client: "MlflowClient", wanted: str, experiments: Iterable[str] | None = None) -> "Iterator[Run]":
    """Runs that fit a filter in MLflow's language, the newest first, however many, in experiments of given ids or in all."""
    ids = list(all_experiments(client) if experiments is None else experiments)
    order = ["attributes.start_time DESC"]
    return every(lambda token: client.search_runs(ids, wanted, order_by=order, max_results=_PAGE, page_token=token))


def _newest(wanted: list[str], limit: int | None = None, own: bool = False, experiment: str | None = None) -> list[RunSummary]:
    """The newest runs that fit all filters; ``own`` ones stand below no other."""
    client, names = open_runs()
    if experiment is not None and experiment not in names.values():
        raise UserError(f"--experiment: no '{experiment}' in the store; it has {', '.join(sorted(names.values()))}")
    ids = [key for key, name in names.items() if experiment in (None, name)]
    found = search_runs(client, " AND ".join(wanted), ids)
    fitting = (run for run in found if not (own and {PARENT_TAG, REPORT_TAG, ORACLE_TAG} & set(run.data.tags)))
    return [_summary(run, names) for run in islice(fitting, limit)]


def _summary(run: "Run", experiments: dict[str, str]) -> RunSummary:
    info, data = run.info, run.data
    start = datetime.fromtimestamp(info.start_time / 1000, UTC).isoformat()
    return RunSummary(
        info.run_name, info.run_id, experiments[info.experiment_id], info.status, start,
        duration_seconds=None if info.end_time is None else (info.end_time - info.start_time) / 1000,
        params=dict(sorted(data.params.items())),
        tags={key: value for key, value in sorted(data.tags.items()) if not key.startswith("mlflow.")},
        metrics=dict(sorted(data.metrics.items())),
        artifact_uri=info.artifact_uri,
        description=data.tags.get("mlflow.note.content"),
        parent=data.tags.get(PARENT_TAG),
    )  # fmt: skip
