"""Checkpoints that survive whatever stops a run: whole or not there, checked when read, found again by config."""

from hedgelab.training.checkpoints.callback import RunCheckpoint, folder_of
from hedgelab.training.checkpoints.files import LAST, PREVIOUS, fault, newest_whole
from hedgelab.training.checkpoints.folder import RunFolder
from hedgelab.training.checkpoints.io import VerifiedCheckpointIO, use_verified_io
from hedgelab.training.checkpoints.stopping import stop_at_once

__all__ = [
    "LAST",
    "PREVIOUS",
    "RunCheckpoint",
    "RunFolder",
    "VerifiedCheckpointIO",
    "fault",
    "folder_of",
    "newest_whole",
    "stop_at_once",
    "use_verified_io",
]
