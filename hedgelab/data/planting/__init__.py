"""Known features planted in activations: truth about hedging where the activations are real."""

from hedgelab.data.planting.datamodule import PlantedActivations
from hedgelab.data.planting.directions import Directions, MatchedDirections, PrincipalDirections, RandomDirections
from hedgelab.data.planting.events import Events, LatentEvents, PlantedParents, TokenEvents

__all__ = [
    "Directions", "Events", "LatentEvents", "MatchedDirections", "PlantedActivations", "PlantedParents",
    "PrincipalDirections", "RandomDirections", "TokenEvents",
]  # fmt: skip
