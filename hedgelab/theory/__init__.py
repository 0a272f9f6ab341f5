"""Hedging without noise: closed forms, loss landscapes, and the exact optimum of any SAE on a finite population."""

from hedgelab.theory.landscape import best_mixture, hedging_lowers_loss, tied_loss
from hedgelab.theory.optimise import Minimum, minimise
from hedgelab.theory.population import Population
from hedgelab.theory.single_latent import (
    SingleLatentMinimum,
    hedging_pull,
    minima,
    minimum,
    pair_component,
    principal_component,
)

__all__ = [
    "Minimum",
    "Population",
    "SingleLatentMinimum",
    "best_mixture",
    "hedging_lowers_loss",
    "hedging_pull",
    "minima",
    "minimise",
    "minimum",
    "pair_component",
    "principal_component",
    "tied_loss",
]
