"""Delivers what a run has to say, off the training path, and never raises: what cannot be sent waits in the spool."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from hedgelab.tracking.spool import MOST_POINTS, Artifact, Metrics, Operation, Point, Spool, is_refusal, pages, send
from hedgelab.tracking.store import reason_of

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_logger = logging.getLogger(__name__)
_MOST_QUEUED = 20
_SAMPLE_SECONDS = 10.0
_RETRY_SECONDS = 15.0
_MOST_RETRY_SECONDS = 240.0
_PATIENCE = 5.0
"""A caller waits so long for the store. One that has died refuses at once; one that hangs is given up after a minute."""


class RunWriter:
    """Sends what a run has to say, in order, from a thread of its own.

    Operations queue in memory. When the store fails or takes longer than a caller can wait, or the queue grows long, they
    move to the spool; from then on all that comes goes behind it, and the thread sends the spool, after 15 seconds first, then
    after twice as long each time up to four minutes. What a full disk does not take stays in memory (files cannot).
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
        self._sample, self._repeats = sample, repeats
        self._points: deque[tuple[int, int, Mapping[str, float]]] = deque()
        self._queue: deque[Operation] = deque()
        self._waiting = bool(spool)  # the spool holds something that must be sent before what is in memory
        self._spilled = self._lost = 0  # operations that went to the spool; files that a full disk did not take
        self._hangs = False
        self._retry_at, self._retry_seconds = 0.0, _RETRY_SECONDS
        self._sending = threading.Lock()  # held by whoever talks to the store
        self._order = threading.RLock()  # held for moments: guards what is above
        self._settled = threading.Condition(self._order)
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._warned: set[str] = set()

    @property
    def unkept(self) -> str | None:
        """What neither the store nor the disk has taken, in words; None if all is well."""
        waiting = len(self._queue) + self._lost
        return f"{waiting} operations ({self._lost} of them files)" if waiting else None

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Take points in, within microseconds; they are written later."""
        self._points.append((int(time.time() * 1000), step, metrics))
        if self._thread is None:
            self._start()
        if len(self._points) * len(metrics) >= self._buffer_points:
            self._wake.set()

    def deliver(self, operation: Operation) -> None:
        """Have an operation sent, or kept on disk where the store fails or takes too long."""
        with self._order:
            self._collect()
            self._queue.append(operation)
        self.settle()

    def settle(self) -> None:
        """Wait until all is with the store or on the disk; a store that has just failed, or hangs, is not waited for."""
        if self._thread is None:
            self._start()
        self._wake.set()
        with self._order:
            self._collect()
            if not self._hangs:
                done = self._settled.wait_for(lambda: self._failing or not (self._queue or self._waiting), _PATIENCE)
                self._hangs = not done
            if self._hangs or self._failing:
                self._spill()

    def flush(self) -> None:
        """Write everything that waits, trying the store even where it has just failed, for as long as that takes."""
        self._retry_at, self._waiting = 0.0, bool(self._spool)
        self._work()

    def close(self) -> None:
        """Stop the thread and flush, unless the store was found to hang; :meth:`add` starts it again."""
        if self._thread is not None:
            self._stop.set()
            self._wake.set()
            self._thread.join()
            self._thread = None
        if self._hangs:
            self._work()
        else:
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
                with self._order:
                    self._queue.append(self._sample())
            self._work()

    def _work(self) -> None:
        """Send all there is, what waits longest first, up to the first failure."""
        with self._sending:
            while (turn := self._next()) is not None:
                began = time.monotonic()
                try:
                    turn()
                except Exception as error:
                    self._note_failure(error, time.monotonic() - began)
                else:
                    self._hangs, self._retry_seconds = False, _RETRY_SECONDS

    def _next(self) -> Callable[[], None] | None:
        """What to do now: send the spool, or else what is first in memory."""
        with self._order:
            self._collect()
            if self._failing or (self._queue and isinstance(self._queue[0], Artifact) and self._spool):
                self._spill()  # a file goes behind other files that wait
            self._settled.notify_all()
            if self._failing or not (self._waiting or self._queue):
                return None
            return self._send_spool if self._waiting else partial(self._send_first, self._queue[0])

    def _send_first(self, operation: Operation) -> None:
        try:
            send(operation, self._client, self._run_id)
        except Exception as error:
            if not is_refusal(error):
                self._warn_of_store(error)
            with self._order:
                self._spill()
                if is_refusal(error) and not self._queue:
                    return  # the spool sets it aside
            raise
        with self._order:
            if self._queue and self._queue[0] is operation:  # else it took long, and is sent again from the spool
                self._queue.popleft()

    def _send_spool(self) -> None:
        spilled = self._spilled
        refused, failure = self._spool.replay(self._client)
        with self._order:
            self._waiting = self._spilled != spilled
        for line in refused:
            self._warn("refusal", "%s", line)
        if failure is not None:
            self._warn_of_store(failure)

    @property
    def _failing(self) -> bool:
        return time.monotonic() < self._retry_at

    def _collect(self) -> None:
        """Make operations of the points that came so far."""
        points: list[Point] = []
        while self._points:
            timestamp, step, metrics = self._points.popleft()
            points += [(key, value, timestamp, step) for key, value in metrics.items()]
        self._queue.extend(Metrics(some, self._repeats) for some in pages(points, MOST_POINTS))
        if len(self._queue) > _MOST_QUEUED:
            self._spill()

    def _spill(self) -> None:
        """Move the queue behind what waits on the disk, what is being sent included, as far as the disk takes it."""
        while self._queue:
            operation = self._queue[0]
            try:
                self._spool.append(operation)
            except OSError as error:
                self._warn(
                    "disk",
                    "nor does the disk (%s): what is unsent waits in memory and is lost if this process ends; free some space",
                    error.strerror or reason_of(error),
                )
                if not isinstance(operation, Artifact):
                    return
                self._lost += 1  # its file may be gone in a moment
            else:
                self._waiting = True
                self._spilled += 1
            self._queue.popleft()

    def _note_failure(self, error: Exception, seconds: float) -> None:
        self._warn_of_store(error)
        with self._order:
            self._hangs = self._hangs or seconds > _PATIENCE
            self._retry_at = time.monotonic() + self._retry_seconds
            self._retry_seconds = min(2 * self._retry_seconds, _MOST_RETRY_SECONDS)

    def _warn_of_store(self, error: Exception) -> None:
        self._warn(
            "store",
            "the tracking store does not take what is sent (%s); training goes on, and what is unsent waits in %s "
            "to be tried again, now and then or by `hedgelab sync`",
            reason_of(error),
            self._spool.path,
        )

    def _warn(self, about: str, message: str, *values: object) -> None:
        """Say something once."""
        if about not in self._warned:
            self._warned.add(about)
            _logger.warning(message, *values)
