"""Delivers what a run has to say, off the training path, and never raises: what cannot be sent is spooled."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hedgelab.tracking.spool import Artifact, FilesLeftError, Metrics, Operation, Point, Spool, is_refusal
from hedgelab.tracking.store import reason_of

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_logger = logging.getLogger(__name__)
_MAX_POINTS_PER_CALL = 1000
_SAMPLE_SECONDS = 10.0
_RETRY_SECONDS = 15.0
_MOST_RETRY_SECONDS = 240.0
_PATIENCE = 5.0
"""A caller waits so long for the store. One that has died refuses at once; one that hangs is given up after a minute."""


class RunWriter:
    """Buffers metric points, and writes them in batches from a thread of its own, through which all else goes too.

    :meth:`add` costs microseconds. :meth:`deliver` waits until the store has taken the operation, but not for long: where
    the store hangs, the operation goes to the spool. When the store fails, so do all that come, and the store is tried
    again after 15 seconds, then after twice as long each time up to four minutes, and at every :meth:`flush`; order is
    kept, as nothing is sent past a spool that waits, unless only files do. What a full disk does not take either waits in
    memory (files cannot) and goes to the disk as soon as it can.

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
        self._points: deque[tuple[int, int, Mapping[str, float]]] = deque()
        self._points_in = self._points_out = 0  # the first is written by the caller of add only
        self._queue: deque[Operation] = deque()
        self._flying: Operation | None = None  # what is being sent, and its line in the spool if that took too long
        self._flying_line: str | None = None
        self._in_memory: deque[Operation] = deque()
        self._lost = 0
        self._only_files = False  # wait in the spool, so that nothing else need wait for them
        self._sending = threading.Lock()  # held by whoever talks to the store
        self._order = threading.RLock()  # held for moments: guards what is above
        self._empty = threading.Condition(self._order)
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._retry_at = 0.0
        self._retry_seconds = _RETRY_SECONDS
        self._hangs = False  # the last failure was long in coming
        self._warned: set[str] = set()

    @property
    def unkept(self) -> str | None:
        """What neither the store nor the disk has taken, in words; None if all is well."""
        waiting = len(self._in_memory)
        return f"{waiting + self._lost} operations ({self._lost} of them files)" if waiting or self._lost else None

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes points in; they are written later."""
        self._points.append((int(time.time() * 1000), step, metrics))
        self._points_in += len(metrics)
        if self._thread is None:
            self._start()
        if self._points_in - self._points_out >= self._buffer_points:
            self._wake.set()

    def deliver(self, operation: Operation) -> None:
        """Has an operation sent, or spooled where something waits already or the store takes too long."""
        self._enqueue(operation)
        self._settle()

    def settle(self) -> None:
        """Has everything that waits in memory written, to the store or to the disk; asks no store that has just failed."""
        with self._order:
            self._collect()
        self._settle()
        with self._order:
            self._empty_memory()

    def flush(self) -> None:
        """Writes everything that waits, trying the store even where it has just failed, for as long as that takes."""
        self._retry_at = 0.0
        self._work()

    def close(self) -> None:
        """Stops the thread and flushes, unless the store was found to hang; :meth:`add` starts it again."""
        if self._thread is not None:
            self._stop.set()
            self._wake.set()
            self._thread.join()
            self._thread = None
        if self._hangs:
            self._work()
        else:
            self.flush()

    # -- in the caller's thread --------------------------------------------------------------------

    def _start(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="hedgelab-tracking", daemon=True)
        self._thread.start()

    def _enqueue(self, operation: Operation) -> None:
        """Puts an operation behind all others."""
        with self._order:
            self._collect()
            if self._waiting:
                self._keep_queue()
                self._keep(operation)
            else:
                self._queue.append(operation)

    def _settle(self) -> None:
        """Waits until the queue is empty; what the store does not take in time is spooled."""
        if self._thread is None:
            self._start()
        self._wake.set()
        with self._order:
            if self._waiting or not self._empty.wait_for(lambda: not self._queue, _PATIENCE):
                self._keep_queue()

    # -- in the writer's thread, or whoever flushes ------------------------------------------------

    def _run(self) -> None:
        next_sample = time.monotonic() + 1.0
        while not self._stop.is_set():
            self._wake.wait(self._flush_seconds)
            self._wake.clear()
            if self._sample is not None and time.monotonic() >= next_sample:
                next_sample = time.monotonic() + _SAMPLE_SECONDS
                self._enqueue(self._sample())
            self._work()

    def _work(self) -> None:
        """Sends all there is, what waits longest first, up to the first failure."""
        with self._sending:
            with self._order:
                self._collect()
            if (self._waiting or self._spool) and time.monotonic() >= self._retry_at:
                self._replay()
            while (operation := self._next()) is not None:
                began, failure = time.monotonic(), None
                try:
                    operation.send(self._client, self._run_id)
                except Exception as error:
                    failure = error
                self._done(operation, failure, time.monotonic() - began)

    def _next(self) -> Operation | None:
        """The operation to send now, which stays in the queue meanwhile; None where there is none."""
        with self._order:
            if self._waiting:
                self._keep_queue()
            while self._queue and isinstance(self._queue[0], Artifact) and self._spool:
                self._keep(self._queue.popleft())  # behind other files that wait
            self._flying, self._flying_line = self._queue[0] if self._queue else None, None
            if self._flying is None:
                self._empty.notify_all()
            return self._flying

    def _done(self, operation: Operation, failure: Exception | None, seconds: float) -> None:
        """What comes of an operation that was sent: it leaves the queue, or goes to the spool with all behind it."""
        with self._order:
            if failure is not None and not is_refusal(failure):
                self._note_failure(failure, seconds)
                if isinstance(operation, Artifact) and self._queue and self._queue[0] is operation:
                    self._keep(self._queue.popleft())
                else:
                    self._keep_queue()
                return
            if not self._spool:
                self._retry_seconds, self._hangs = _RETRY_SECONDS, False
            if failure is not None:
                self._refuse(operation, failure)
            if self._queue and self._queue[0] is operation:
                self._queue.popleft()
            elif self._flying_line is not None:
                self._spool.discard(self._flying_line)

    def _replay(self) -> None:
        began = time.monotonic()
        try:
            try:
                self._spool.replay(lambda operation: operation.send(self._client, self._run_id), self._note_refusal)
            except FilesLeftError as left:
                with self._order:
                    self._only_files = self._spool.holds_only_files
                self._note_failure(left, time.monotonic() - began)
            while self._in_memory:
                operation = self._in_memory[0]
                operation.send(self._client, self._run_id)
                with self._order:
                    if self._in_memory and self._in_memory[0] is operation:
                        self._in_memory.popleft()
        except Exception as error:
            self._note_failure(error, time.monotonic() - began)
        else:
            if not self._spool:
                self._retry_seconds, self._hangs = _RETRY_SECONDS, False

    # -- under the lock ----------------------------------------------------------------------------

    def _collect(self) -> None:
        """Moves the points that came so far into the queue, or past it to the disk where they are too many."""
        points: list[Point] = []
        backlog = self._points_in - self._points_out > 20 * self._buffer_points
        while self._points:
            timestamp, step, metrics = self._points.popleft()
            self._points_out += len(metrics)
            points += [(key, value, timestamp, step) for key, value in metrics.items()]
        for start in range(0, len(points), _MAX_POINTS_PER_CALL):
            self._queue.append(Metrics(points[start : start + _MAX_POINTS_PER_CALL], self._repeats))
        if backlog:
            self._keep_queue()

    @property
    def _waiting(self) -> bool:
        """Whether anything must be sent before what comes now."""
        return bool(self._in_memory) or (bool(self._spool) and not self._only_files)

    def _keep_queue(self) -> None:
        """Moves the queue behind what waits, what is being sent right now included."""
        while self._queue:
            operation = self._queue.popleft()
            line = self._keep(operation)
            if operation is self._flying:
                self._flying_line = line
        self._empty.notify_all()

    def _keep(self, operation: Operation) -> str | None:
        """Puts an operation behind those that wait; its line in the spool, None where the disk is full."""
        self._empty_memory()
        if not self._in_memory:
            try:
                self._only_files = isinstance(operation, Artifact) and (self._only_files or not self._spool)
                return self._spool.append(operation)
            except OSError as error:
                self._note_full_disk(error)
        if isinstance(operation, Artifact):  # its file may be gone in a moment
            self._lost += 1
        else:
            self._in_memory.append(operation)
        return None

    def _empty_memory(self) -> None:
        """Moves what a full disk did not take to the disk, as far as it takes it now."""
        while self._in_memory:
            try:
                self._spool.append(self._in_memory[0])
                self._only_files = False
            except OSError:
                return
            self._in_memory.popleft()

    def _refuse(self, operation: Operation, error: Exception) -> None:
        try:
            self._note_refusal(self._spool.refuse(operation, error))
        except OSError as full:
            self._note_full_disk(full)

    # -- saying so, once ---------------------------------------------------------------------------

    def _note_failure(self, error: Exception, seconds: float) -> None:
        self._hangs = seconds > _PATIENCE
        self._retry_at = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, _MOST_RETRY_SECONDS)
        self._warn(
            "store",
            "the tracking store does not take what is sent (%s); training goes on, and what is unsent waits in %s "
            "to be tried again, now and then or by `hedgelab sync`",
            reason_of(error),
            self._spool.path,
        )

    def _note_refusal(self, refused: str) -> None:
        self._warn("refusal", "%s", refused)

    def _note_full_disk(self, error: OSError) -> None:
        self._warn(
            "disk",
            "nor does the disk (%s): what is unsent waits in memory and is lost if this process ends; free some space",
            error.strerror or reason_of(error),
        )

    def _warn(self, about: str, message: str, *values: object) -> None:
        """Says something once."""
        if about not in self._warned:
            self._warned.add(about)
            _logger.warning(message, *values)
