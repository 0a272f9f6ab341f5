"""Delivers what a run has to say, off the training path, and never raises: what cannot be sent is spooled."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hedgelab.tracking.spool import Metrics, Operation, Point, Spool

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_logger = logging.getLogger(__name__)
_MAX_POINTS_PER_CALL = 1000
_SAMPLE_SECONDS = 10.0
_RETRY_SECONDS = 15.0
_in_turn = threading.BoundedSemaphore(4)
"""A group has dozens of writers, more than a store's connection pool holds; SQLite takes one at a time anyway."""


class RunWriter:
    """Buffers metric points, and writes them in batches from a thread of its own.

    :meth:`add` costs microseconds; everything else goes through :meth:`deliver`, at once, in the caller's thread.
    When the store fails, operations go to the spool, and the store is tried again every 15 seconds and at
    every :meth:`flush`; order is kept, as nothing is sent past a spool that waits.

    Args:
        client: Client of the tracking store.
        run_id: The run to write to.
        spool: Where unsent operations wait.
        buffer_points: Points that trigger a write at once. A backlog of 20 times as many, from a store slower than
            training, goes to the spool, which bounds the memory taken.
        flush_seconds: Longest time that a point waits.
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
    ) -> None:
        self._client, self._run_id, self._spool = client, run_id, spool
        self._buffer_points, self._flush_seconds = buffer_points, flush_seconds
        self._sample = sample
        self._pending: deque[tuple[int, int, Mapping[str, float]]] = deque()
        self._points_in = self._points_out = 0  # two counters, each written by one thread only
        self._delivery = threading.RLock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._retry_at = 0.0
        self._warned = False

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
            if self._spool and time.monotonic() >= self._retry_at:
                self._replay()
            if self._spool:
                self._spool.append(operation)
                return
            try:
                self._send(operation)
            except Exception as error:
                self._spool.append(operation)
                self._note_failure(error)

    def flush(self) -> None:
        """Writes everything that waits, trying the store even where it has just failed."""
        with self._delivery:
            self._retry_at = 0.0
            if self._spool:
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
            batch = Metrics(points[start : start + _MAX_POINTS_PER_CALL])
            if backlog:
                self._spool.append(batch)
            else:
                self.deliver(batch)

    def _replay(self) -> None:
        try:
            self._spool.replay(self._send)
        except Exception as error:
            self._note_failure(error)

    def _send(self, operation: Operation) -> None:
        with _in_turn:
            operation.send(self._client, self._run_id)

    def _note_failure(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        if not self._warned:
            self._warned = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            _logger.warning(
                "the tracking store does not take what is sent (%s); training goes on, and what is unsent waits in %s "
                "to be tried again",
                reason,
                self._spool.path,
            )
