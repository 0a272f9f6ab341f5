"""Several SAEs trained on one stream of activations, each as if it were alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger
from torch import nn

from hedgelab.errors import UserError
from hedgelab.training.shell import TrainingShell
from hedgelab.training.steps import StepBatches

__all__ = ["SAEGroup", "StepBatches"]


class SAEGroup(TrainingShell):
    """Trains several SAEs, of any kinds, widths and seeds, on one stream; the result of each is what it were alone.

    Every member keeps its own optimiser, schedule, warm-ups, dead-latent clock and metrics. Members that are not
    initialised start from the first training batch.

    Args:
        members: The SAEs, by name.
        loggers: Each member's own logger, by name; None reports to the trainer's, the names in front of the numbers.

    Raises:
        UserError: No members, widths of activations that differ, or a name with a dot.
    """

    members: nn.ModuleDict

    def __init__(self, members: Mapping[str, Any], loggers: Mapping[str, Logger] | None = None) -> None:
        super().__init__()
        if not members:
            raise UserError("members: a group needs at least one SAE")
        widths = {name: sae.d_in for name, sae in members.items()}
        if len(set(widths.values())) > 1:
            raise UserError(f"members: all need the same d_in, got {widths}")
        if dotted := [name for name in members if "." in name]:
            raise UserError(f"members: a name must not contain a dot, got '{dotted[0]}'")
        self.members = nn.ModuleDict(members)
        self.member_loggers = dict(loggers or {})

    def saes(self) -> dict[str, Any]:
        """The members, by name."""
        return dict(self.members.items())
