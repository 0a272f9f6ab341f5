"""Runs, tracked in MLflow: the logger, the callbacks that fill a run, and what reads runs back.

Names are imported when first asked for: listing runs needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hedgelab.tracking.logger import MLflowTracker as MLflowTracker
    from hedgelab.tracking.progress import StepProgressBar as StepProgressBar
    from hedgelab.tracking.record import MemberRecord as MemberRecord
    from hedgelab.tracking.record import RunRecord as RunRecord

_HOMES = {"MLflowTracker": "logger", "MemberRecord": "record", "RunRecord": "record", "StepProgressBar": "progress"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"hedgelab.tracking.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hedgelab.tracking' has no attribute '{name}'")
