"""Where checkpoints were found before they moved to :mod:`hedgelab.training.checkpoints`."""

from hedgelab.training.checkpoints import RunCheckpoint, RunFolder, VerifiedCheckpointIO, newest_whole, use_verified_io

__all__ = ["RunCheckpoint", "RunFolder", "VerifiedCheckpointIO", "newest_whole", "use_verified_io"]
