"""Figures: every function takes plain numbers and returns a matplotlib Figure; nothing touches pyplot's global state."""

from hedgelab.plots.cosines import cosine_heatmaps, decoder_bias
from hedgelab.plots.hedging import degree_and_baselines, projection_of_latents
from hedgelab.plots.training import cosines_over_training, firing_density, loss_terms

__all__ = [
    "cosine_heatmaps",
    "cosines_over_training",
    "decoder_bias",
    "degree_and_baselines",
    "firing_density",
    "loss_terms",
    "projection_of_latents",
]
