"""Series of bounded length, however long the run: what figures at the end of training are drawn from."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ThinnedSeries(Generic[T]):
    """At most ``limit`` values over training steps, evenly thinned as more are offered."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.steps: list[int] = []
        self.values: list[T] = []
        self._stride, self._offers, self._offered = 1, 0, -1

    def offer(self, step: int, make: Callable[[], T]) -> None:
        """Keeps ``make()``, which is called only then, if this step's turn has come and it is later than all before."""
        if step <= self._offered:
            return
        if self._offers % self._stride == 0:
            self.steps.append(step)
            self.values.append(make())
            if len(self.steps) > self.limit:
                self.steps, self.values, self._stride = self.steps[::2], self.values[::2], 2 * self._stride
        self._offers, self._offered = self._offers + 1, step

    def state_dict(self) -> dict[str, Any]:
        """Plain state for a checkpoint."""
        counts = {"stride": self._stride, "offers": self._offers, "offered": self._offered}
        return {"steps": self.steps, "values": self.values, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.steps, self.values = list(state["steps"]), list(state["values"])
        self._stride, self._offers, self._offered = state["stride"], state["offers"], state["offered"]
