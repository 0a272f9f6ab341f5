"""The Lightning logger of every run: MLflow, written off the training path, losing nothing when the store fails."""

import atexit
import getpass
import hashlib
import logging
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from hedgelab.errors import Stopped, UserError
from hedgelab.tracking import store
from hedgelab.tracking.history import ThinnedSeries
from hedgelab.tracking.params import MAX_VALUE, clean_key, dataset_of, flatten
from hedgelab.tracking.provenance import SystemSampler
from hedgelab.tracking.runs import PARENT_TAG
from hedgelab.tracking.spool import Operation, Spool, last_steps
from hedgelab.tracking.writer import RunWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_logger = logging.getLogger(__name__)
_KEPT_LOSSES = 1000
_MOST_TAG = 5000  # MLflow's limit for a tag's value


class MLflowTracker(Logger):
    """Logs a run to MLflow: parameters, tags, metrics, artifacts, system metrics.

    The run is created at first use, on rank zero only. Metric points are buffered and written in batches by a thread.
    Whatever the store does not take waits in ``runs/spool/<run_id>.jsonl`` and is tried again; training never stops for it.

    Args:
        experiment: Name of the MLflow experiment, created if absent.
        run_name: Name of the run; None lets MLflow invent one.
        tags: Tags of the run.
        description: Text shown at the head of the run's page.
        uri: Tracking URI; None takes ``MLFLOW_TRACKING_URI``, or ``runs/mlflow.db``.
        buffer_points: Metric points that are written together.
        run_id: Run to go on with; None starts one.
        on_unreachable: What to do where a tracking server cannot be reached at the start: ``fail``, or ``local`` to go on in
            the store ``runs/mlflow.db``, from which ``hedgelab sync`` sends the run later. (A server that dies later stops
            nothing either way.)
        system_metrics: Whether the run shows what the machine is doing meanwhile.

    Raises:
        UserError: At first use: the store cannot be reached, the experiment is deleted, or there is no such run.
    """

    def __init__(
        self,
        experiment: str = "hedgelab",
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
        description: str | None = None,
        uri: str | None = None,
        buffer_points: int = 500,
        run_id: str | None = None,
        on_unreachable: Literal["fail", "local"] = "fail",
        system_metrics: bool = True,
    ) -> None:
        super().__init__()
        if buffer_points < 1:
            raise UserError(f"trainer.logger.buffer_points: must be at least 1, got {buffer_points}")
        self._experiment, self.run_name, self._run_id = experiment, run_name, run_id
        self._tags = {**({} if description is None else {"mlflow.note.content": description}), **(tags or {})}
        self._uri = uri or store.tracking_uri()
        self._buffer_points, self._system_metrics = buffer_points, system_metrics
        self._client: MlflowClient | None = None
        self._writer: RunWriter | None = None
        self._params: dict[str, str] = {}
        self._goes_on = self._has_model = False
        self._on_unreachable = on_unreachable
        self._logged_to: dict[str, int] = {}  # the last step of each metric that a run which goes on has already
        self.losses: ThinnedSeries[dict[str, float]] = ThinnedSeries(_KEPT_LOSSES)
        """What was logged as ``train/...``, thinned: the history behind the figure of loss terms."""

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self._experiment

    @property
    def version(self) -> str | None:
        """Id of the run; None on other ranks than zero."""
        return self.run_id

    @property
    def run_id(self) -> str | None:
        """Id of the run, which is created if need be; None on other ranks than zero."""
        if getattr(rank_zero_only, "rank", 0) == 0:
            self._open()
        return self._run_id

    @property
    def save_dir(self) -> str:
        """Folder of the store: checkpoints go to ``<experiment>/<run_id>/checkpoints`` below it."""
        return str(store.runs_dir(self._uri))

    @property
    @rank_zero_experiment
    def experiment(self) -> "MlflowClient":
        """The MLflow client; once this was read, the store has the run, and all that was logged, unless it fails."""
        self._open().send()
        assert self._client is not None
        return self._client

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Takes metric points in, within microseconds; they are written within three seconds."""
        step = step or 0
        values = {clean_key(key): float(value) for key, value in metrics.items()}
        if "train/loss" in values:
            self.losses.offer(step, lambda: {key: value for key, value in values.items() if key.startswith("train/")})
        writer = self._writer or self._open()
        if self._logged_to:
            values = {key: value for key, value in values.items() if step > self._logged_to.get(key, -1)}
        writer.add(values, step)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Logs parameters, flattened with dots.

        A value beyond MLflow's limit becomes the artifact ``params/<key>.txt``. MLflow never changes a parameter, so
        one that differs when a run is resumed is kept as the tag ``resumed_with.<key>``.
        """
        writer = self._open()
        flat = flatten(params)
        for key, value in flat.items():
            if len(value) > MAX_VALUE:
                file = f"params/{key.replace('/', '_')}.txt"
                self.log_text(value, file)
                flat[key] = f"see artifact {file}, sha256 {hashlib.sha256(value.encode()).hexdigest()}"
        changed = {key: value for key, value in flat.items() if self._params.get(key, value) != value}
        fresh = {key: value for key, value in flat.items() if key not in self._params}
        self._params |= fresh
        if fresh:
            writer.keep(Operation(params=fresh))
        if "data.class_path" in fresh:
            writer.keep(Operation(dataset=dataset_of(fresh)))
        self.log_tags({f"resumed_with.{key}": value for key, value in changed.items()})

    @rank_zero_only
    def log_tags(self, tags: Mapping[str, Any]) -> None:
        """Sets tags of the run."""
        if tags:
            cut = {clean_key(key): str(value)[:_MOST_TAG] for key, value in tags.items()}
            self._open().keep(Operation(tags=cut))

    @rank_zero_only
    def log_config(self, text: str) -> None:
        """Logs the resolved config as artifact ``config.yaml``, and its hash as the tag ``config_hash``."""
        self.log_text(text, "config.yaml")
        self.log_tags({"config_hash": hashlib.sha256(text.encode()).hexdigest()[:16]})

    @rank_zero_only
    def log_artifact(self, path: str | Path, artifact_path: str | None = None, model: Mapping[str, Any] | None = None) -> None:
        """Logs a file, or what a folder holds, below a path; an SAE of config ``model`` is also listed as a model."""
        self._has_model |= model is not None
        self._open().keep(Operation(source=str(path), artifact_path=artifact_path, model=flatten(model or {})))

    @rank_zero_only
    def log_text(self, text: str, artifact_file: str) -> None:
        """Logs text as an artifact, such as ``config.yaml`` or ``notes/first.md``."""
        self._log_made(artifact_file, lambda file: file.write_text(text))

    @rank_zero_only
    def log_figure(self, figure: "Figure", artifact_file: str) -> None:
        """Logs a figure as an artifact, such as ``figures/decoder.png``."""
        self._log_made(artifact_file, figure.savefig)

    def go_on_with(self, run_id: str) -> None:
        """Log to a run that was cut short, and what it has already not again.

        A run that goes on repeats the steps since its last checkpoint, with the same outcome; what was logged of them
        before the end stays as it is.
        """
        self._run_id, self._goes_on = run_id, True

    def child(self, run_name: str, tags: dict[str, str]) -> "MLflowTracker":
        """A logger of a new run below this one, in the same experiment."""
        below = {PARENT_TAG: self.run_id or "", **tags}
        if store.INTENDED in self._tags:
            below[store.INTENDED] = self._tags[store.INTENDED]
        return MLflowTracker(
            self._experiment, run_name, below, uri=self._uri, buffer_points=self._buffer_points, system_metrics=False,
            on_unreachable=self._on_unreachable,
        )  # fmt: skip

    @rank_zero_only
    def save(self) -> None:
        """Writes everything that waits, to the store or to the disk."""
        if self._writer is not None:
            self._writer.keep()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes everything that waits and ends the run: FINISHED, FAILED, or KILLED where a signal stopped it.

        Raises:
            UserError: Neither the store nor the disk has taken all of it.
        """
        if self._writer is None:
            return
        killed = isinstance(sys.exception(), (KeyboardInterrupt, SIGTERMException, Stopped))
        final = "KILLED" if killed else {"success": "FINISHED", "failed": "FAILED"}.get(status, status.upper())
        self._writer.keep(Operation(status=final, end_time=int(time.time() * 1000), has_model=self._has_model))
        self._writer.close()
        if (unkept := self._writer.unkept) is not None and sys.exception() is None:
            where = store.without_credentials(self._uri)
            lost = f"{unkept} of run {self._run_id} are lost: neither {where} nor the disk takes them"
            raise UserError(f"trainer.logger: {lost}; free some space, then --resume logs them again")

    def __getstate__(self) -> dict[str, Any]:
        """Travels to another process as a logger of the same run, without client and thread."""
        return {**self.__dict__, "_client": None, "_writer": None}

    def _log_made(self, artifact_file: str, write: Callable[[Path], Any]) -> None:
        target = Path(artifact_file)
        with tempfile.TemporaryDirectory() as folder:
            write(file := Path(folder) / target.name)
            self.log_artifact(file, None if target.parent == Path() else str(target.parent))

    def _open(self) -> RunWriter:
        """Open the run, at the first call."""
        if self._writer is not None:
            return self._writer
        client, reachable = self._open_store()
        run: Run | None = None
        if self._run_id is None:
            run = self._start_run(client)
            self._run_id = str(run.info.run_id)
        elif reachable:
            run = self._continue_run(client, self._run_id)
        spool = Spool(store.runs_dir(self._uri) / "spool", self._run_id, store.without_credentials(self._uri))
        began = int(time.time() * 1000)
        if run is not None:
            began, self._params = run.info.start_time, dict(run.data.params)
        if run is not None and self._goes_on:
            waiting, there = spool.last_steps(), last_steps(run)
            self._logged_to = {key: max(waiting.get(key, -1), there.get(key, -1)) for key in {*waiting, *there}}
        sampler = SystemSampler(began) if self._system_metrics else None
        self._client = client
        self._writer = RunWriter(client, self._run_id, spool, self._buffer_points, sample=sampler, repeats=run is None)
        atexit.register(self._writer.close)  # for a process that ends without finalize
        return self._writer

    def _open_store(self) -> "tuple[MlflowClient, bool]":
        """A client of the store that the run goes to, and whether the store can be reached.

        A run that goes on may have begun in the local store while its server could not be reached, and stays there. One
        that began on a server which cannot be reached now goes on all the same: what is logged waits in the spool.
        """
        is_file = store.sqlite_file(self._uri) is not None
        try:
            client = store.ensure_store(self._uri)
            if is_file or not self._goes_on or not _is_local(self._run_id):
                return client, True
        except UserError as error:
            if self._on_unreachable == "fail" or is_file:
                raise
            reason = str(error).partition("; start")[0].removeprefix("MLFLOW_TRACKING_URI: ")
            if self._run_id is not None and not _is_local(self._run_id):
                from mlflow.tracking import MlflowClient

                _logger.warning("%s: what is logged waits in runs/spool/ for `hedgelab sync`", reason)
                return MlflowClient(tracking_uri=self._uri), False
            _logger.warning("%s: the run goes to runs/mlflow.db; send it later with `hedgelab sync`", reason)
            self._tags[store.INTENDED] = store.without_credentials(self._uri)
        self._uri = store.local_uri()
        return store.ensure_store(self._uri), True

    def _start_run(self, client: "MlflowClient") -> "Run":
        from mlflow.exceptions import MlflowException

        name = self._experiment
        if client.get_experiment_by_name(name) is None:
            kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI's view of training runs
            try:
                client.create_experiment(name, store.artifact_location(self._uri, name), kind)
            except MlflowException:
                if client.get_experiment_by_name(name) is None:  # else another process was quicker
                    raise
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None, "it was there or has just been made"
        if experiment.lifecycle_stage != "active":
            where = store.without_credentials(self._uri)
            raise UserError(f"trainer.logger.experiment: '{name}' is deleted in {where}; restore it, or take another name")
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container may run under a number that has no name
            user = str(os.getuid())
        tags = {"mlflow.user": user, "mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
        return client.create_run(experiment.experiment_id, run_name=self.run_name, tags={**tags, **self._tags})

    def _continue_run(self, client: "MlflowClient", run_id: str) -> "Run":
        from mlflow.exceptions import MlflowException

        where = store.without_credentials(self._uri)
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if "database is locked" in str(error):
                raise
            raise UserError(f"trainer.logger.run_id: no run '{run_id}' in {where}; see `hedgelab runs`") from error
        if run.info.lifecycle_stage != "active":
            hint = f"restore it there (`mlflow runs restore --run-id {run_id}`), or leave out --resume to train anew"
            raise UserError(f"trainer.logger.run_id: run '{run_id}' is deleted in {where}: {hint}")
        client.update_run(run_id, status="RUNNING")
        return run


def _is_local(run_id: str | None) -> bool:
    """Whether the store in the working directory has a run."""
    from mlflow.exceptions import MlflowException

    client = store.local_store()
    try:
        return client is not None and run_id is not None and bool(client.get_run(run_id))
    except MlflowException:
        return False
