"""Figures: every function takes plain numbers and returns a matplotlib Figure; nothing touches pyplot's global state."""

from hedgelab.plots.cosines import cosine_heatmaps as cosine_heatmaps
from hedgelab.plots.cosines import decoder_bias as decoder_bias
from hedgelab.plots.hedging import degree_and_baselines as degree_and_baselines
from hedgelab.plots.hedging import projection_of_latents as projection_of_latents
from hedgelab.plots.training import cosines_over_training as cosines_over_training
from hedgelab.plots.training import firing_density as firing_density
from hedgelab.plots.training import loss_terms as loss_terms
