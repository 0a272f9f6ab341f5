"""Keeps what a run has to say on the disk, sends it to the store off the training path, and never raises."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hedgelab.tracking.spool import Operation, Point, Spool
from hedgelab.tracking.store import reason_of

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_logger = logging.getLogger(__name__)
_SAMPLE_SECONDS = 10.0
_RETRY_SECONDS = 15.0
_MOST_RETRY_SECONDS = 240.0
_TURN, _TURN_SECONDS = threading.Lock(), 60.0
"""Held by the run of this process that writes to an SQLite file: dozens at once exhaust MLflow's pool of connections."""
_PATIENCE = 5.0  # a store that fails after more seconds hangs, and the end of a run does not wait for it again


class RunWriter:
    """Sends what a run has to say, in order, from a thread of its own.

    Every operation is first kept in the run's spool, so that callers never wait for the store; the thread sends the spool. A
    store that fails is tried again after 15 seconds first, then after twice as long each time up to four minutes. What a full
    disk does not take waits in memory; but a file, which may be gone in a moment, is lost where the store does not take it
    either.
    """

    def __init__(
        self,
        client: "MlflowClient",
        run_id: str,
        spool: Spool,
        buffer_points: int = 500,
        flush_seconds: float = 3.0,
        sample: Callable[[], Operation] | None = None,
        repeats: bool = False,
    ) -> None:
        self._client, self._run_id, self._spool = client, run_id, spool
        self._buffer_points, self._flush_seconds = buffer_points, flush_seconds
        self._sample, self._repeats = sample, repeats
        self._points: deque[tuple[int, int, Mapping[str, float]]] = deque()
        self._unkept: list[Operation] = []  # what a full disk has not taken
        self._lost = 0  # files that neither the disk nor the store has taken
        self._kept, self._sent = int(bool(spool)), 0  # how often something came, and how much of that was sent
        self._hangs = False
        self._retry_at = self._files_at = 0.0
        self._retry_seconds = _RETRY_SECONDS
        self._sending = threading.Lock()  # held by whoever talks to the store
        self._order = threading.RLock()  # held for moments: guards what is above
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._warned: set[str] = set()

    @property
    def unkept(self) -> str | None:
        """What neither the store nor the disk has taken, in words; None if all is well."""
        waiting = len(self._unkept) + self._lost
        return f"{waiting} operations ({self._lost} of them files)" if waiting else None

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Take points in, within microseconds; they are written later."""
        self._points.append((int(time.time() * 1000), step, metrics))
        if self._thread is None:
            self._start()
        if len(self._points) * len(metrics) >= self._buffer_points:
            self._wake.set()

    def keep(self, *operations: Operation) -> None:
        """Have the points that came so far, and then operations, kept on the disk, and sent soon."""
        self._keep(*operations)
        if any(one.source for one in self._unkept):
            self.send()
            with self._order:
                left = [one for one in self._unkept if not one.source]
                self._lost += len(self._unkept) - len(left)
                self._unkept = left
        if self._thread is None:
            self._start()
        self._wake.set()

    def send(self, again: bool = False) -> None:
        """Send all there is, what waits longest first, up to the first failure; ``again`` asks a store that has just failed."""
        with self._sending:
            self._keep()
            if again:
                self._retry_at, self._files_at, self._sent = 0.0, 0.0, -1
            while self._sent < self._kept and time.monotonic() >= self._retry_at:
                began = time.monotonic()
                try:
                    self._send()
                    self._hangs, self._retry_seconds = False, _RETRY_SECONDS
                except Exception as error:
                    self._warn_of_store(error)
                    self._hangs = self._hangs or time.monotonic() - began > _PATIENCE
                    self._retry_at = time.monotonic() + self._retry_seconds
                    self._retry_seconds = min(2 * self._retry_seconds, _MOST_RETRY_SECONDS)

    def close(self) -> None:
        """Stop the thread and send what waits, unless the store was found to hang; :meth:`add` starts it again."""
        if self._thread is not None:
            self._stop.set()
            self._wake.set()
            self._thread.join()
            self._thread = None
        self.send(again=not self._hangs)
        self._spool.close()

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
                self._keep(self._sample())
            self.send()

    def _keep(self, *operations: Operation) -> None:
        with self._order:
            points: list[Point] = []
            while self._points:
                timestamp, step, metrics = self._points.popleft()
                points += [(key, value, timestamp, step) for key, value in metrics.items()]
            if points:
                self._unkept.append(Operation(points, repeated=self._repeats))
            self._unkept += operations
            self._kept += bool(self._unkept)
            try:
                while self._unkept:
                    self._spool.append(self._unkept[0])
                    self._unkept.pop(0)
            except OSError as error:
                full = f"the disk does not take what is logged ({error.strerror or reason_of(error)})"
                until = "it waits in memory until the tracking store has it, and is lost if this process ends before that"
                self._warn("disk", f"{full}: {until}; free some space")

    def _send(self) -> None:
        """Send the spool, and then what is only in memory, in the run's turn."""
        if self._spool.takes_turns and not _TURN.acquire(timeout=_TURN_SECONDS):
            raise TimeoutError("other runs of this process are still being sent")
        try:
            came = self._kept
            refused, failure = self._spool.replay(self._client, files=time.monotonic() >= self._files_at)
            for line in refused:
                self._warn("refusal", line)
            if failure is not None:
                self._warn_of_store(failure)
                self._files_at = time.monotonic() + _MOST_RETRY_SECONDS
            for operation in list(self._unkept):
                operation.send(self._client, self._run_id)
                with self._order:
                    if operation in self._unkept:  # else the disk has taken it meanwhile
                        self._unkept.remove(operation)
            self._sent = came
        finally:
            if self._spool.takes_turns:
                _TURN.release()

    def _warn_of_store(self, error: Exception) -> None:
        refuses = f"the tracking store does not take what is sent ({reason_of(error)}); training goes on"
        again = "to be tried again, now and then or by `hedgelab sync`"
        self._warn("store", f"{refuses}, and what is unsent waits in {self._spool.path} {again}")

    def _warn(self, about: str, message: str) -> None:
        """Say something once."""
        if about not in self._warned:
            self._warned.add(about)
            _logger.warning(message)
