"""What could not be sent to the tracking store, kept on disk until it can be.

A spool is one JSON-lines file per run, ``runs/spool/<run_id>.jsonl``, with the artifacts it names in the folder
``runs/spool/<run_id>/``. Every line is one operation, in the order in which it was due::

    {"op": "metrics", "metrics": [[key, value, timestamp_ms, step], ...]}
    {"op": "params", "params": {...}}      {"op": "tags", "tags": {...}}
    {"op": "artifact", "source": "<path below the folder>", "artifact_path": "figures"}
    {"op": "status", "status": "FINISHED", "end_time": timestamp_ms}

Sending an operation twice does no harm (MLflow ignores a metric point that it has), so a line is only dropped after
the store has taken it. One that the store refuses for what it says, and always will, is set aside in
``<run_id>.refused``, so that it keeps nothing else from being sent.

MLflow's own asynchronous logging loses what waits when a server dies, and raises at the end; hence this.

A spool may come from elsewhere, with a folder of runs: artifacts are taken from its own folder only, links not followed.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from filelock import FileLock

from hedgelab.errors import UserError
from hedgelab.tracking.store import reason_of

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

Point = tuple[str, float, int, int]
"""A metric's key, value, timestamp in ms, and step."""


@dataclass(frozen=True)
class Metrics:
    """Points of metrics; at most 1000, MLflow's limit for one call.

    Attributes:
        metrics: The points.
        repeated: They may be repetitions, by a run that went on without knowing how far the store had got: those no
            later than what the store has are not sent.
    """

    op: ClassVar[str] = "metrics"
    metrics: list[Point]
    repeated: bool = False

    def send(self, client: MlflowClient, run_id: str) -> None:
        """Writes all points in one call."""
        from mlflow.entities import Metric

        points = self.metrics
        if self.repeated:
            known = last_steps(client.get_run(run_id))
            points = [point for point in points if point[3] > known.get(point[0], -1)]
        if points:
            client.log_batch(run_id, metrics=[Metric(*point) for point in points])


@dataclass(frozen=True)
class Params:
    """Flat parameters, each short enough for MLflow."""

    op: ClassVar[str] = "params"
    params: dict[str, str]

    def send(self, client: MlflowClient, run_id: str) -> None:
        """Writes them, 100 a call (MLflow's limit)."""
        from mlflow.entities import Param

        entities = [Param(key, value) for key, value in self.params.items()]
        for start in range(0, len(entities), 100):
            client.log_batch(run_id, params=entities[start : start + 100])


@dataclass(frozen=True)
class Tags:
    """Tags of the run."""

    op: ClassVar[str] = "tags"
    tags: dict[str, str]

    def send(self, client: MlflowClient, run_id: str) -> None:
        """Writes them, 100 a call (MLflow's limit)."""
        from mlflow.entities import RunTag

        entities = [RunTag(key, value) for key, value in self.tags.items()]
        for start in range(0, len(entities), 100):
            client.log_batch(run_id, tags=entities[start : start + 100])


@dataclass(frozen=True)
class Artifact:
    """A file, or a folder with all it holds, and the artifact folder it belongs in."""

    op: ClassVar[str] = "artifact"
    source: str
    artifact_path: str | None = None

    def send(self, client: MlflowClient, run_id: str) -> None:
        """Uploads the file or the content of the folder."""
        upload = client.log_artifacts if Path(self.source).is_dir() else client.log_artifact
        upload(run_id, self.source, self.artifact_path)


@dataclass(frozen=True)
class Status:
    """How and when the run ended."""

    op: ClassVar[str] = "status"
    status: str
    end_time: int

    def send(self, client: MlflowClient, run_id: str) -> None:
        """Ends the run."""
        client.set_terminated(run_id, status=self.status, end_time=self.end_time)


Operation = Metrics | Params | Tags | Artifact | Status
_OPERATIONS: dict[str, type[Operation]] = {cls.op: cls for cls in (Metrics, Params, Tags, Artifact, Status)}


class FilesLeftError(Exception):
    """Files could not be uploaded, although the store took everything else."""


class Spool:
    """The operations of one run that wait on disk.

    Args:
        folder: The spool folder, ``runs/spool``.
        run_id: MLflow's id of the run.
        store: Tracking URI of the store that the operations wait for, without credentials; None where unknown.
    """

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
        """The store that the operations wait for; None where unknown."""
        return self._about.read_text().strip() if self._about.exists() else None

    @property
    def holds_only_files(self) -> bool:
        """Whether nothing waits but files."""
        with self._lock:
            lines = self._lines() if self else []
        return all(line.startswith('{"op": "artifact"') for line in lines)

    def append(self, operation: Operation) -> str:
        """Keeps an operation, and a copy of the file it speaks of; the line that was written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if isinstance(operation, Artifact):
                operation = self._keep_file(operation)
            self._drop_torn_line()
            if self._store is not None and not self.uri:  # absent, or left empty by a full disk
                self._about.write_text(self._store)
            line = _encode(operation)
            with self.path.open("a") as file:
                file.write(line + "\n")
        return line

    def discard(self, line: str) -> None:
        """Forgets an operation that was sent after all, unless it is being sent again by now."""
        with suppress(TimeoutError), self._turn.acquire(timeout=0), self._lock:
            if self and line in (lines := self._lines()):
                lines.remove(line)
                self._drop(lines)

    def refuse(self, operation: Operation, error: Exception) -> str:
        """Sets aside an operation that the store will never take; what is to be said of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self.refused.open("a") as file:
            if isinstance(operation, Artifact) and not Path(operation.source).is_relative_to(self.files):
                operation = self._keep_file(operation)
            file.write(_encode(operation) + "\n")
        return (
            f"the tracking store refuses {operation.op} ({reason_of(error)}); kept in {self.refused}, the rest is sent"
        )

    def last_steps(self) -> dict[str, int]:
        """The last step of each metric that waits."""
        steps: dict[str, int] = {}
        for operation in self._decode(self._lines()) if self else ():
            if isinstance(operation, Metrics):
                for key, _, _, step in operation.metrics:
                    steps[key] = max(step, steps.get(key, step))
        return steps

    def replay(self, send: Callable[[Operation], None], tell: Callable[[str], None] = lambda line: None) -> None:
        """Sends what waits, in order; what ``send`` fails at by raising, and all after it, stays.

        Files are a matter of their own: where they cannot be uploaded, as happens to those who may only log metrics, they
        stay and the rest is sent.

        Args:
            send: Sends one operation.
            tell: Told of each operation that is refused and set aside.

        Raises:
            UserError: A line is damaged.
            FilesLeftError: All but files was sent.
        """
        if not self:
            return
        with self._turn:
            with self._lock:
                lines = self._lines() if self else []  # another process may have sent them meanwhile
            done, kept, failure = 0, [], None
            try:
                for operation in self._decode(lines):
                    if isinstance(operation, Artifact) and failure is not None:
                        kept.append(lines[done])
                    else:
                        try:
                            send(operation)
                        except Exception as error:
                            if is_refusal(error):
                                tell(self.refuse(operation, error))
                            elif isinstance(operation, Artifact):
                                failure = error
                                kept.append(lines[done])
                            else:
                                raise
                    done += 1
            finally:
                with self._lock:
                    if self:
                        self._drop(kept + self._lines()[done:])
        if failure is not None:
            raise FilesLeftError(reason_of(failure)) from failure

    def _keep_file(self, artifact: Artifact) -> Artifact:
        source, name = Path(artifact.source), uuid.uuid4().hex
        target = self.files / name / source.name
        target.parent.mkdir(parents=True)
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
        return Artifact(f"{name}/{source.name}", artifact.artifact_path)

    def _drop_torn_line(self) -> None:
        """Remove an operation that was cut short, which the next one would run into."""
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 1))
            if file.read(1) not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)

    def _lines(self) -> list[str]:
        """The operations that wait; one cut short as its process was killed, always the last, is left out."""
        whole, _, _ = self.path.read_text().rpartition("\n")
        return whole.splitlines()

    def _decode(self, lines: list[str]) -> Iterator[Operation]:
        for number, line in enumerate(lines, start=1):
            try:
                yield self._operation(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                raise UserError(f"{self.path}, line {number}: damaged ({reason}); mend or delete it") from error

    def _operation(self, fields: dict[str, Any]) -> Operation:
        cls = _OPERATIONS[fields.pop("op")]
        if cls is Artifact:
            fields["source"] = str(self._own_file(fields["source"]))
        elif cls is Metrics:
            fields["metrics"] = [
                (str(key), float(value), int(time), int(step)) for key, value, time, step in fields["metrics"]
            ]
        return cls(**fields)

    def _own_file(self, name: str) -> Path:
        """A file or folder that the spool has kept.

        Raises:
            UserError: It lies elsewhere, or leads there by a link.
        """
        path = self.files / name
        inside = path.resolve().is_relative_to(self.files.resolve())
        if not inside or any(one.is_symlink() for one in (path, *path.rglob("*"))):
            raise UserError(f"'{name}' is no file that was kept here")
        return path

    def _drop(self, remaining: list[str]) -> None:
        if remaining:
            partial = self.path.with_suffix(".partial")
            partial.write_text("\n".join(remaining) + "\n")
            partial.replace(self.path)
        else:
            self.path.unlink()
            self._about.unlink(missing_ok=True)
            if not self.refused.exists():
                shutil.rmtree(self.files, ignore_errors=True)


def spools(folder: Path) -> list[Spool]:
    """What waits in a spool folder, the longest waiting first."""
    return [Spool(folder, path.stem) for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_ctime)]


def is_refusal(error: Exception) -> bool:
    """Whether a store will never take an operation, for what it says; not where it only cannot now, or lacks the run."""
    return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE" and "'active' state" not in str(error)


def last_steps(run: Run) -> dict[str, int]:
    """The last step of each metric that the store has of a run."""
    return {metric.key: int(metric.step) for metric in run.to_proto().data.metrics}


def _encode(operation: Operation) -> str:
    fields: dict[str, Any] = {"op": operation.op, **asdict(operation)}
    if isinstance(operation, Metrics):  # values as text: JSON has no word for nan and inf
        fields["metrics"] = [(key, repr(value), time, step) for key, value, time, step in operation.metrics]
    return json.dumps(fields)
