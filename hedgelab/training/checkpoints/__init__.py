"""Checkpoints that survive whatever stops a run: complete or not there, checked when read, found again by config."""

from hedgelab.training.checkpoints.callback import RunCheckpoint, folder_of
from hedgelab.training.checkpoints.files import LAST, PREVIOUS, VerifiedCheckpointIO, newest_whole, use_verified_io
from hedgelab.training.checkpoints.folder import RunFolder

__all__ = [
    "LAST", "PREVIOUS", "RunCheckpoint", "RunFolder", "VerifiedCheckpointIO", "folder_of", "newest_whole", "use_verified_io",
]  # fmt: skip
