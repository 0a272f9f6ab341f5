"""Pure functions behind the metric classes; their modules also have sums of a batch (``*_update``) and types of results.

Latents are taken as codes or as dense tensors ``[batch, d_sae]``, decoders of any norms: folding happens inside.
"""

from hedgelab.metrics.functional.accumulate import as_codes as as_codes
from hedgelab.metrics.functional.accumulate import fold_decoder as fold_decoder
from hedgelab.metrics.functional.accumulate import orthonormal_basis as orthonormal_basis
from hedgelab.metrics.functional.basic import dead_latents as dead_latents
from hedgelab.metrics.functional.basic import density_histogram as density_histogram
from hedgelab.metrics.functional.basic import explained_variance as explained_variance
from hedgelab.metrics.functional.basic import firing_rates as firing_rates
from hedgelab.metrics.functional.basic import l0 as l0
from hedgelab.metrics.functional.basic import mean_squared_error as mean_squared_error
from hedgelab.metrics.functional.basic import norm_ratio as norm_ratio
from hedgelab.metrics.functional.basic import shrinkage as shrinkage
from hedgelab.metrics.functional.degree import hedging_degree as hedging_degree
from hedgelab.metrics.functional.error_spread import residual_hedging as residual_hedging
from hedgelab.metrics.functional.first_letter import first_letter_scores as first_letter_scores
from hedgelab.metrics.functional.first_letter import word_absorption as word_absorption
from hedgelab.metrics.functional.hierarchy import absorption_from_co_firing as absorption_from_co_firing
from hedgelab.metrics.functional.hierarchy import infer_parents as infer_parents
from hedgelab.metrics.functional.hierarchy import parent_encoder_components as parent_encoder_components
from hedgelab.metrics.functional.hierarchy import parents_best_f1 as parents_best_f1
from hedgelab.metrics.functional.loss_recovered import recovered_loss as recovered_loss
from hedgelab.metrics.functional.planted import PlantedHedging as PlantedHedging
from hedgelab.metrics.functional.planted import planted_hedging as planted_hedging
from hedgelab.metrics.functional.planted import share_beside as share_beside
from hedgelab.metrics.functional.probing import LinearProbe as LinearProbe
from hedgelab.metrics.functional.probing import f1_score as f1_score
from hedgelab.metrics.functional.probing import firing_magnitudes as firing_magnitudes
from hedgelab.metrics.functional.probing import k_sparse_probing as k_sparse_probing
from hedgelab.metrics.functional.probing import linear_probes as linear_probes
from hedgelab.metrics.functional.probing import logistic_regression as logistic_regression
from hedgelab.metrics.functional.probing import rank_latents as rank_latents
from hedgelab.metrics.functional.probing import roc_auc as roc_auc
from hedgelab.metrics.functional.projection import latent_projections as latent_projections
from hedgelab.metrics.functional.projection import nth_decoder_projection as nth_decoder_projection
from hedgelab.metrics.functional.recovery import CoFiring as CoFiring
from hedgelab.metrics.functional.recovery import co_firing as co_firing
from hedgelab.metrics.functional.recovery import decoder_cosines as decoder_cosines
from hedgelab.metrics.functional.recovery import decoder_geometry as decoder_geometry
from hedgelab.metrics.functional.recovery import detection_scores as detection_scores
from hedgelab.metrics.functional.recovery import encoder_cosines as encoder_cosines
from hedgelab.metrics.functional.recovery import match_features as match_features
from hedgelab.metrics.functional.recovery import mcc as mcc
from hedgelab.metrics.functional.recovery import mean_max_cosine as mean_max_cosine
from hedgelab.metrics.functional.recovery import nearest_detection_scores as nearest_detection_scores
from hedgelab.metrics.functional.recovery import uniqueness as uniqueness
from hedgelab.metrics.functional.true_hedging import decoder_coordinates as decoder_coordinates
from hedgelab.metrics.functional.true_hedging import encoder_coordinates as encoder_coordinates
from hedgelab.metrics.functional.true_hedging import hedging as hedging
from hedgelab.metrics.functional.true_hedging import regressed_hedging as regressed_hedging
from hedgelab.metrics.functional.true_hedging import regression_update as regression_update
from hedgelab.metrics.functional.true_hedging import tracked_features as tracked_features
