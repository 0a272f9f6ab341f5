"""Delivers what a run has to say, off the training path, and never raises: what cannot be sent is spooled."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hedgelab.tracking.spool import Artifact, Metrics, Operation, Point, Spool

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_logger = logging.getLogger(__name__)
_MAX_POINTS_PER_CALL = 1000
_SAMPLE_SECONDS = 10.0
_RETRY_SECONDS = 15.0
_MOST_RETRY_SECONDS = 240.0
_in_turn = threading.BoundedSemaphore(4)
"""A group has dozens of writers, more than a store's connection pool holds; SQLite takes one at a time anyway."""


class RunWriter:
    """Buffers metric points, and writes them in batches from a thread of its own.

    :meth:`add` costs microseconds; everything else goes through :meth:`deliver`, at once, in the caller's thread.
    When the store fails, operations go to the spool, and the store is tried again after 15 seconds, then after twice as
    long each time up to four minutes, and at every :meth:`flush`; order is kept, as nothing is sent past a spool that
    waits. What a full disk does not take either waits in memory (files cannot) and goes to the disk as soon as it can.

    Args:
        client: Client of the tracking store.
        run_id: The run to write to.
        spool: Where unsent operations wait.
        buffer_points: Points that trigger a write at once. A backlog of 20 times as many, from a store slower than
            training, goes to the spool, which bounds the memory taken.
        flush_seconds: Longest time that a point waits.
        repeats: Points may be repetitions (see :class:`~hedgelab.tracking.spool.Metrics`).
        sample: Called from the thread every ten seconds, for points to write along (system metrics).
    """

    def __init__(
        self,
        client: MlflowClient,
        run_id: str,
        spool: Spool,
        buffer_points: int = 500,
        flush_seconds: float = 3.0,
        sample: Callable[[], Metrics] | None = None,
        repeats: bool = False,
    ) -> None:
        self._client, self._run_id, self._spool = client, run_id, spool
        self._buffer_points, self._flush_seconds = buffer_points, flush_seconds
        self._sample = sample
        self._repeats = repeats
        self._in_memory: deque[Operation] = deque()
        self._lost = 0
        self._pending: deque[tuple[int, int, Mapping[str, float]]] = deque()
        self._points_in = self._points_out = 0  # two counters, each written by one thread only
        self._delivery = threading.RLock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._retry_at = 0.0
        self._retry_seconds = _RETRY_SECONDS
        self._warned: set[str] = set()

    @property
    def unkept(self) -> str | None:
        """What neither the store nor the disk has taken, in words; None if all is well."""
        waiting = len(self._in_memory)
        return f"{waiting + self._lost} operations ({self._lost} of them files)" if waiting or self._lost else None

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes points in; they are written later."""
        self._pending.append((int(time.time() * 1000), step, metrics))
        self._points_in += len(metrics)
        if self._thread is None:
            self._start()
        if self._points_in - self._points_out >= self._buffer_points:
            self._wake.set()

    def deliver(self, operation: Operation) -> None:
        """Sends an operation now, or spools it."""
        with self._delivery:
            if self._waiting and time.monotonic() >= self._retry_at:
                self._replay()
            if self._waiting:
                self._keep(operation)
                return
            try:
                operation.send(self._client, self._run_id)
                self._retry_seconds = _RETRY_SECONDS
            except Exception as error:
                self._keep(operation)
                self._note_failure(error)

    def settle(self) -> None:
        """Has everything that waits in memory written, to the store or to the disk; asks no store that has just failed."""
        with self._delivery:
            self._write_pending()
            self._empty_memory()

    def flush(self) -> None:
        """Writes everything that waits, trying the store even where it has just failed."""
        with self._delivery:
            self._retry_at = 0.0
            if self._waiting:
                self._replay()
            self._write_pending()

    def close(self) -> None:
        """Stops the thread and flushes; :meth:`add` starts it again."""
        if self._thread is not None:
            self._stop.set()
            self._wake.set()
            self._thread.join()
            self._thread = None
        self.flush()

    def _start(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="hedgelab-tracking", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        next_sample = time.monotonic() + 1.0
        while not self._stop.is_set():
            self._wake.wait(self._flush_seconds)
            self._wake.clear()
            if self._sample is not None and time.monotonic() >= next_sample:
                next_sample = time.monotonic() + _SAMPLE_SECONDS
                self.deliver(self._sample())
            with self._delivery:
                self._write_pending()

    def _write_pending(self) -> None:
        points: list[Point] = []
        backlog = self._points_in - self._points_out > 20 * self._buffer_points
        while self._pending:
            timestamp, step, metrics = self._pending.popleft()
            self._points_out += len(metrics)
            points += [(key, value, timestamp, step) for key, value in metrics.items()]
        for start in range(0, len(points), _MAX_POINTS_PER_CALL):
            batch = Metrics(points[start : start + _MAX_POINTS_PER_CALL], self._repeats)
            if backlog:
                self._keep(batch)
            else:
                self.deliver(batch)

    @property
    def _waiting(self) -> bool:
        """Whether anything must be sent before what comes now."""
        return bool(self._spool) or bool(self._in_memory)

    def _keep(self, operation: Operation) -> None:
        """Puts an operation behind those that wait."""
        self._empty_memory()
        if not self._in_memory:
            try:
                self._spool.append(operation)
                return
            except OSError as error:
                self._note_full_disk(error)
        if isinstance(operation, Artifact):  # its file may be gone in a moment
            self._lost += 1
        else:
            self._in_memory.append(operation)

    def _empty_memory(self) -> None:
        """Moves what a full disk did not take to the disk, as far as it takes it now."""
        while self._in_memory:
            try:
                self._spool.append(self._in_memory[0])
            except OSError:
                return
            self._in_memory.popleft()

    def _replay(self) -> None:
        try:
            self._spool.replay(lambda operation: operation.send(self._client, self._run_id))
            while self._in_memory:
                self._in_memory[0].send(self._client, self._run_id)
                self._in_memory.popleft()
            self._retry_seconds = _RETRY_SECONDS
        except Exception as error:
            self._note_failure(error)

    def _note_failure(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, _MOST_RETRY_SECONDS)
        self._warn(
            "store",
            "the tracking store does not take what is sent (%s); training goes on, and what is unsent waits in %s "
            "to be tried again, now and then or by `hedgelab sync`",
            _reason(error),
            self._spool.path,
        )

    def _note_full_disk(self, error: OSError) -> None:
        self._warn(
            "disk",
            "nor does the disk (%s): what is unsent waits in memory and is lost if this process ends; free some space",
            error.strerror or _reason(error),
        )

    def _warn(self, about: str, message: str, *values: object) -> None:
        """Says something once."""
        if about not in self._warned:
            self._warned.add(about)
            _logger.warning(message, *values)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
