"""What a run has to say to the tracking store, kept on disk until the store has taken it.

A spool is one JSON-lines file a run, ``runs/spool/<run_id>.jsonl``, with the artifacts that it names in the folder
``runs/spool/<run_id>/``. Every line is one :class:`Operation`, in the order in which it was due::

    {"metrics": [[key, value, timestamp_ms, step], ...]}
    {"params": {...}}      {"tags": {...}}      {"dataset": {"name": …, "digest": …, "source_type": …, "source": …}}
    {"source": "<path below the folder>", "artifact_path": "figures"}      also with {"model": {…}}, if it is an SAE
    {"status": "FINISHED", "end_time": timestamp_ms}

Sending an operation twice does no harm (MLflow ignores a point that it has), so a line is only dropped after the store
has taken it. What the store will never take is set aside in ``<run_id>.refused``. A spool may come from elsewhere, with
a folder of runs: artifacts are taken from its own folder only, links not followed.

MLflow's own asynchronous logging loses what waits when a server dies, and raises at the end; hence this.
"""

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from hedgelab.errors import UserError
from hedgelab.tracking.models import link_metrics, log_model
from hedgelab.tracking.store import reason_of, sqlite_file

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

Point = tuple[str, float, int, int]
"""A metric's key, value, timestamp in ms, and step."""


@dataclass(frozen=True)
class Operation:
    """What a run has to say at one time: points of metrics, parameters, tags, a file or folder to keep, how the run ended.

    ``repeated`` points come from a run that went on without knowing how far the store had got: what the store has is not sent.
    """

    metrics: Sequence[Point] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    dataset: Mapping[str, str] = field(default_factory=dict)  # what the run is trained on, as MLflow describes data
    source: str | None = None
    artifact_path: str | None = None
    model: Mapping[str, str] = field(default_factory=dict)  # of an SAE in ``source``: its config, to be listed as a model
    status: str | None = None
    end_time: int | None = None
    has_model: bool = False  # the last values of the metrics are to be shown with the run's model
    repeated: bool = False

    def send(self, client: "MlflowClient", run_id: str) -> None:
        """Write it to a run of the store."""
        from mlflow.entities import Metric, Param, RunTag

        known = last_steps(client.get_run(run_id)) if self.repeated else {}
        points = [Metric(*point) for point in self.metrics if point[3] > known.get(point[0], -1)]
        params = [Param(*pair) for pair in self.params.items()]
        tags = [RunTag(*pair) for pair in self.tags.items()]
        if points or params or tags:
            client.log_batch(run_id, metrics=points, params=params, tags=tags)
        if self.dataset:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            context = InputTag("mlflow.data.context", "training")
            client.log_inputs(run_id, datasets=[DatasetInput(Dataset(**self.dataset), [context])])
        if self.source is not None:
            upload = client.log_artifacts if Path(self.source).is_dir() else client.log_artifact
            upload(run_id, self.source, self.artifact_path)
            if self.model:
                log_model(client, run_id, Path(self.source), self.artifact_path or "", self.model)
        if self.status is not None:
            client.set_terminated(run_id, status=self.status, end_time=self.end_time)
        if self.has_model:
            link_metrics(client, run_id)


class Spool:
    """The operations of one run that wait on disk, in the folder ``runs/spool``, for a store (None where unknown)."""

    def __init__(self, folder: Path, run_id: str, store: str | None = None) -> None:
        self.run_id, self._store = run_id, store
        self.takes_turns = sqlite_file(store or "") is not None
        self._about = folder / f"{run_id}.store"
        self.path = folder / f"{run_id}.jsonl"
        self.files = folder / run_id
        self.refused = folder / f"{run_id}.refused"
        self._lock_file = folder / f".{run_id}.lock"
        self._lock = FileLock(self._lock_file)  # held for moments

    def __bool__(self) -> bool:
        return self.path.exists()

    @property
    def uri(self) -> str | None:
        """The store that the operations wait for, without credentials; None where unknown."""
        return self._about.read_text().strip() if self._about.exists() else None

    def append(self, operation: Operation) -> None:
        """Keep an operation, and a copy of the file that it speaks of."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock.acquire(poll_interval=0.005):
            if self and self._is_torn():  # a process was killed, or the disk was full, in the middle of a line
                self._replace(self._lines())
            line = self._encode(operation)
            if self._store is not None and not self.uri:  # absent, or left empty by a full disk
                self._about.write_text(self._store)
            with self.path.open("a") as file:
                file.write(line + "\n")

    def replay(self, client: "MlflowClient", files: bool = True) -> tuple[list[str], Exception | None]:
        """Send what waits, in order; where the store fails, the rest stays.

        Files are a matter of their own: where they cannot be uploaded, as happens to those who may only log metrics, or are not
        to be (``files``), they stay, all else is sent, and the error is returned. So is what the store refuses for good, a line
        each.
        """
        if not self:
            return [], None
        sent: list[str] = []
        refused: list[str] = []
        failure: Exception | None = None
        with self._lock.acquire(poll_interval=0.005):
            lines = self._lines()
        try:
            for line, operation in zip(lines, self._decode(lines), strict=True):
                if operation.source and (failure or not files):
                    continue
                try:
                    operation.send(client, self.run_id)
                except Exception as error:
                    if is_refusal(error):
                        refused.append(self._refuse(line, error))
                    elif operation.source:
                        failure = error
                        continue
                    else:
                        raise
                sent.append(line)
        finally:
            with self._lock.acquire(poll_interval=0.005):
                left = self._lines()
                for line in sent:
                    if line in left:  # else another process has sent it too
                        left.remove(line)
                self._replace(left)
        return refused, failure

    def last_steps(self) -> dict[str, int]:
        """The last step of each metric that waits."""
        steps: dict[str, int] = {}
        for operation in self._decode(self._lines()):
            for key, _, _, step in operation.metrics:
                steps[key] = max(step, steps.get(key, step))
        return steps

    def close(self) -> None:
        """Leave nothing behind, if nothing waits."""
        if not self:
            self._lock_file.unlink(missing_ok=True)

    def _refuse(self, line: str, error: Exception) -> str:
        with self.refused.open("a") as file:
            file.write(line + "\n")
        kind = next(key for key in json.loads(line) if key != "op")
        return f"the tracking store refuses {kind} ({reason_of(error)}); kept in {self.refused}, the rest is sent"

    def _is_torn(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 1))
            return file.read() not in (b"", b"\n")

    def _lines(self) -> list[str]:
        """The operations that wait; one cut short as its process was killed, always the last, is left out."""
        return (self.path.read_text() if self else "").rpartition("\n")[0].splitlines()

    def _replace(self, lines: list[str]) -> None:
        if lines:
            partial = self.path.with_suffix(".partial")
            partial.write_text("\n".join(lines) + "\n")
            partial.replace(self.path)
        else:
            self.path.unlink(missing_ok=True)
            self._about.unlink(missing_ok=True)
            if not self.refused.exists():
                shutil.rmtree(self.files, ignore_errors=True)

    def _encode(self, operation: Operation) -> str:
        fields: dict[str, Any] = {key: value for key, value in vars(operation).items() if value}
        if operation.metrics:  # values as text: JSON has no word for nan and inf
            fields["metrics"] = [(key, repr(value), time, step) for key, value, time, step in operation.metrics]
        if operation.source:
            source = Path(operation.source)
            fields["source"] = f"{uuid.uuid4().hex}/{source.name}"
            (self.files / fields["source"]).parent.mkdir(parents=True)
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, self.files / fields["source"])
        return json.dumps(fields)

    def _decode(self, lines: list[str]) -> Iterator[Operation]:
        for number, line in enumerate(lines, start=1):
            try:
                fields = json.loads(line)
                fields.pop("op", None)  # its kind, which earlier releases wrote down
                if not fields:
                    raise UserError("says nothing")
                points = fields.get("metrics", ())
                fields["metrics"] = [(str(key), float(value), int(time), int(step)) for key, value, time, step in points]
                if "source" in fields:
                    fields["source"] = str(self._own_file(fields["source"]))
                yield Operation(**fields)
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                raise UserError(f"{self.path}, line {number}: damaged ({reason}); mend or delete it") from error

    def _own_file(self, name: str) -> Path:
        """A file or folder that the spool has kept; none that lies elsewhere, or leads there by a link."""
        path = self.files / name
        inside = path.resolve().is_relative_to(self.files.resolve())
        if not inside or any(one.is_symlink() for one in (path, *path.rglob("*"))):
            raise UserError(f"'{name}' is no file that was kept here")
        return path


def is_refusal(error: Exception) -> bool:
    """Whether a store will never take an operation, for what it says; not where it only cannot now, or lacks the run."""
    return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE" and "'active' state" not in str(error)


def last_steps(run: "Run") -> dict[str, int]:
    """The last step of each metric that the store has of a run."""
    return {metric.key: int(metric.step) for metric in run.to_proto().data.metrics}
