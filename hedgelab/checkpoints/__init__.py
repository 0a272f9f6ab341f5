"""Checkpoints that survive whatever stops a run: whole or not there, checked when read, found again by config."""

from hedgelab.checkpoints.callback import RunCheckpoint
from hedgelab.checkpoints.files import LAST, PREVIOUS, fault, newest_whole
from hedgelab.checkpoints.folder import RunFolder
from hedgelab.checkpoints.io import VerifiedCheckpointIO, use_verified_io
from hedgelab.checkpoints.stopping import stop_at_once

__all__ = [
    "LAST",
    "PREVIOUS",
    "RunCheckpoint",
    "RunFolder",
    "VerifiedCheckpointIO",
    "fault",
    "newest_whole",
    "stop_at_once",
    "use_verified_io",
]
