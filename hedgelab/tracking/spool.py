"""What could not be sent to the tracking store, kept on disk until it can be.

A spool is one JSON-lines file a run, ``runs/spool/<run_id>.jsonl``, with the artifacts that it names in the folder
``runs/spool/<run_id>/``. Every line is one operation, in the order in which it was due::

    {"op": "metrics", "metrics": [[key, value, timestamp_ms, step], ...]}
    {"op": "params", "params": {...}}      {"op": "tags", "tags": {...}}
    {"op": "artifact", "source": "<path below the folder>", "artifact_path": "figures"}
    {"op": "status", "status": "FINISHED", "end_time": timestamp_ms}

Sending an operation twice does no harm (MLflow ignores a point that it has), so a line is only dropped after the store
has taken it. What the store will never take is set aside in ``<run_id>.refused``. A spool may come from elsewhere, with
a folder of runs: artifacts are taken from its own folder only, links not followed.

MLflow's own asynchronous logging loses what waits when a server dies, and raises at the end; hence this.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from hedgelab.errors import UserError
from hedgelab.tracking.store import reason_of

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

T = TypeVar("T")
Point = tuple[str, float, int, int]
"""A metric's key, value, timestamp in ms, and step."""
MOST_POINTS = 1000  # MLflow's limits for one call: of points, and of parameters and tags
_MOST_AT_ONCE = 100


@dataclass(frozen=True)
class Metrics:
    """Points of metrics, at most 1000.

    ``repeated`` ones come from a run that went on without knowing how far the store had got: what the store has is not sent.
    """

    metrics: list[Point]
    repeated: bool = False


@dataclass(frozen=True)
class Params:
    """Flat parameters, each short enough for MLflow."""

    params: dict[str, str]


@dataclass(frozen=True)
class Tags:
    """Tags of the run."""

    tags: dict[str, str]


@dataclass(frozen=True)
class Artifact:
    """A file, or a folder with all it holds, and the artifact folder it belongs in."""

    source: str
    artifact_path: str | None = None


@dataclass(frozen=True)
class Status:
    """How and when the run ended."""

    status: str
    end_time: int


Operation = Metrics | Params | Tags | Artifact | Status
_OPERATIONS: dict[str, type[Operation]] = {
    cls.__name__.lower(): cls for cls in (Metrics, Params, Tags, Artifact, Status)
}


def _name(operation: Operation) -> str:
    return type(operation).__name__.lower()


def send(operation: Operation, client: MlflowClient, run_id: str) -> None:
    """Write an operation to a run of the store."""
    from mlflow.entities import Metric, Param, RunTag

    match operation:
        case Metrics(points, repeated):
            known = last_steps(client.get_run(run_id)) if repeated else {}
            if unknown := [Metric(*point) for point in points if point[3] > known.get(point[0], -1)]:
                client.log_batch(run_id, metrics=unknown)
        case Params(params):
            for some in pages(list(params.items()), _MOST_AT_ONCE):
                client.log_batch(run_id, params=[Param(*pair) for pair in some])
        case Tags(tags):
            for some in pages(list(tags.items()), _MOST_AT_ONCE):
                client.log_batch(run_id, tags=[RunTag(*pair) for pair in some])
        case Artifact(source, artifact_path):
            upload = client.log_artifacts if Path(source).is_dir() else client.log_artifact
            upload(run_id, source, artifact_path)
        case Status(status, end_time):
            client.set_terminated(run_id, status=status, end_time=end_time)


class Spool:
    """The operations of one run that wait on disk, in the folder ``runs/spool``, for a store (None where unknown)."""

    def __init__(self, folder: Path, run_id: str, store: str | None = None) -> None:
        self.run_id, self._store = run_id, store
        self._about = folder / f"{run_id}.store"
        self.path = folder / f"{run_id}.jsonl"
        self.files = folder / run_id
        self.refused = folder / f"{run_id}.refused"
        self._lock = FileLock(folder / f".{run_id}.lock")  # held for moments
        self._turn = FileLock(folder / f".{run_id}.sending.lock")  # held by whoever sends what waits

    def __bool__(self) -> bool:
        return self.path.exists()

    @property
    def uri(self) -> str | None:
        """The store that the operations wait for, without credentials; None where unknown."""
        return self._about.read_text().strip() if self._about.exists() else None

    def append(self, operation: Operation) -> None:
        """Keep an operation, and a copy of the file that it speaks of."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if self._is_torn():  # a process was killed, or the disk was full, in the middle of a line
                self._replace(self._lines())
            line = self._encode(operation)
            if self._store is not None and not self.uri:  # absent, or left empty by a full disk
                self._about.write_text(self._store)
            with self.path.open("a") as file:
                file.write(line + "\n")

    def replay(self, client: MlflowClient) -> tuple[list[str], Exception | None]:
        """Send what waits, in order; where the store fails, the rest stays.

        Files are a matter of their own: where they cannot be uploaded, as happens to those who may only log metrics, they
        stay, all else is sent, and the error is returned. So is what the store refuses for good, a line each.
        """
        done = 0
        kept: list[str] = []
        refused: list[str] = []
        failure: Exception | None = None
        with self._turn:
            with self._lock:
                lines = self._lines()
            try:
                for operation in self._decode(lines):
                    try:
                        if isinstance(operation, Artifact) and failure is not None:
                            raise failure
                        send(operation, client, self.run_id)
                    except Exception as error:
                        if is_refusal(error):
                            refused.append(self._refuse(operation, lines[done], error))
                        elif isinstance(operation, Artifact):
                            failure = error
                            kept.append(lines[done])
                        else:
                            raise
                    done += 1
            finally:
                with self._lock:
                    self._replace(kept + self._lines()[done:])
        return refused, failure

    def last_steps(self) -> dict[str, int]:
        """The last step of each metric that waits."""
        steps: dict[str, int] = {}
        for operation in self._decode(self._lines()):
            for key, _, _, step in operation.metrics if isinstance(operation, Metrics) else ():
                steps[key] = max(step, steps.get(key, step))
        return steps

    def _refuse(self, operation: Operation, line: str, error: Exception) -> str:
        with self.refused.open("a") as file:
            file.write(line + "\n")
        return f"the tracking store refuses {_name(operation)} ({reason_of(error)}); kept in {self.refused}, the rest is sent"

    def _is_torn(self) -> bool:
        if not self:
            return False
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
        fields: dict[str, Any] = {"op": _name(operation), **asdict(operation)}
        if isinstance(operation, Metrics):  # values as text: JSON has no word for nan and inf
            fields["metrics"] = [(key, repr(value), time, step) for key, value, time, step in operation.metrics]
        elif isinstance(operation, Artifact):
            source = Path(operation.source)
            fields["source"] = f"{uuid.uuid4().hex}/{source.name}"
            (self.files / fields["source"]).parent.mkdir(parents=True)
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, self.files / fields["source"])
        return json.dumps(fields)

    def _decode(self, lines: list[str]) -> Iterator[Operation]:
        for number, line in enumerate(lines, start=1):
            try:
                fields = json.loads(line)
                cls = _OPERATIONS[fields.pop("op")]
                if cls is Metrics:
                    points = fields["metrics"]
                    fields["metrics"] = [
                        (str(key), float(value), int(time), int(step)) for key, value, time, step in points
                    ]
                elif cls is Artifact:
                    fields["source"] = str(self._own_file(fields["source"]))
                yield cls(**fields)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                raise UserError(f"{self.path}, line {number}: damaged ({reason}); mend or delete it") from error

    def _own_file(self, name: str) -> Path:
        """A file or folder that the spool has kept; none that lies elsewhere, or leads there by a link."""
        path = self.files / name
        inside = path.resolve().is_relative_to(self.files.resolve())
        if not inside or any(one.is_symlink() for one in (path, *path.rglob("*"))):
            raise UserError(f"'{name}' is no file that was kept here")
        return path


def pages(items: list[T], most: int) -> list[list[T]]:
    """Items in lists of at most so many."""
    return [items[start : start + most] for start in range(0, len(items), most)]


def is_refusal(error: Exception) -> bool:
    """Whether a store will never take an operation, for what it says; not where it only cannot now, or lacks the run."""
    return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE" and "'active' state" not in str(error)


def last_steps(run: Run) -> dict[str, int]:
    """The last step of each metric that the store has of a run."""
    return {metric.key: int(metric.step) for metric in run.to_proto().data.metrics}
