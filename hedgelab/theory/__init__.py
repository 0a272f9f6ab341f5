"""Hedging without noise: closed forms, loss landscapes, and the exact optimum of any SAE on a finite population."""

from hedgelab.theory.optimise import Minimum as Minimum
from hedgelab.theory.optimise import minimise as minimise
from hedgelab.theory.single_latent import Population as Population
from hedgelab.theory.single_latent import SingleLatentMinimum as SingleLatentMinimum
from hedgelab.theory.single_latent import best_mixture as best_mixture
from hedgelab.theory.single_latent import hedging_lowers_loss as hedging_lowers_loss
from hedgelab.theory.single_latent import hedging_pull as hedging_pull
from hedgelab.theory.single_latent import minima as minima
from hedgelab.theory.single_latent import minimum as minimum
from hedgelab.theory.single_latent import pair_component as pair_component
from hedgelab.theory.single_latent import principal_component as principal_component
from hedgelab.theory.single_latent import tied_loss as tied_loss
