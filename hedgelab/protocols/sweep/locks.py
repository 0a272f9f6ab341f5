"""No cell of a sweep is trained by two processes at once: each holds a lock on the cells that it trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from filelock import BaseFileLock, FileLock, Timeout

FOREVER = -1.0


class CellLocks:
    """Locks on cells, as files in ``runs/locks/``; the operating system ends them with this process, however that ends.

    Use it as a context, which gives the locks back at its end.

    Args:
        folder: Where the lock files are.
        ids: Stable ids of the cells.
    """

    def __init__(self, folder: Path, ids: Sequence[str]) -> None:
        self._folder, self._ids = (
            folder,
            sorted(ids),
        )  # in one order everywhere, so that two processes never wait in a circle
        self._held: list[BaseFileLock] = []

    def take(self, patience: float) -> bool:
        """Lock all cells.

        Args:
            patience: Seconds to wait for each that another process holds; :data:`FOREVER` for no end.

        Returns:
            Whether that worked; where not, none is locked.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in self._ids:
            lock = FileLock(self._folder / f"{name}.lock")
            try:
                lock.acquire(timeout=patience)
            except Timeout:
                self.release()
                return False
            except (OSError, NotImplementedError):  # a file system without locks
                continue
            self._held.append(lock)
        return True

    def release(self) -> None:
        """Let other processes have the cells."""
        while self._held:
            self._held.pop().release()

    def __enter__(self) -> CellLocks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
