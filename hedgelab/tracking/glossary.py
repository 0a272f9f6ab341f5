"""What the metrics of a run are called and mean; read by tables, reports and the README. Imports no torch."""

from __future__ import annotations

import re
from typing import NamedTuple

STAGES = ("test", "val")


class Term(NamedTuple):
    """One metric in words.

    Attributes:
        title: Short name for tables and axes.
        unit: What one of it is; empty for pure numbers.
        better: ``higher``, ``lower``, or empty where neither is good in itself.
        meaning: What it says.
    """

    title: str
    unit: str
    better: str
    meaning: str


GLOSSARY = {
    "loss": Term(
        "loss", "", "lower", "what training minimises: the sum of the terms below it, mean since the last report"
    ),
    "mse": Term("squared error", "", "lower", "‖x - x̂‖², summed over d_in, mean over examples"),
    "explained_variance": Term(
        "expl. var.", "", "higher", "1 - squared error / variance of the activations; 1 is perfect"
    ),
    "shrinkage": Term("shrinkage", "", "", "best scale of the reconstruction, inverted: below 1 it is too short"),
    "l0": Term("L0", "latents", "", "latents that fire on an example, mean"),
    "dead_latents": Term("dead", "latents", "lower", "latents that fired on no example of the pass"),
    "dead_fraction": Term("dead share", "", "lower", "the same as a share of d_sae"),
    "mcc": Term(
        "MCC",
        "",
        "higher",
        "mean absolute cosine of features with latents assigned one to one; 1 recovers all features",
    ),
    "mean_max_cosine": Term(
        "max cosine", "", "higher", "each feature's largest absolute cosine with any latent, mean over features"
    ),
    "mean_max_cosine_latents": Term(
        "max cosine of latents",
        "",
        "higher",
        "each latent's largest absolute cosine with any feature, mean over latents",
    ),
    "uniqueness": Term("uniqueness", "", "higher", "share of latents whose nearest feature no other latent has"),
    "tracked_features": Term("tracked", "features", "higher", "features that some live latent has as its nearest"),
    "detector_precision": Term(
        "precision", "", "higher", "of firings of a latent, the share where its feature is present"
    ),
    "detector_recall": Term("recall", "", "higher", "of examples with a feature, the share where its latent fires"),
    "detector_f1": Term("F1", "", "higher", "harmonic mean of precision and recall, mean over latents"),
    "hedging/decoder": Term(
        "hedging dec", "", "lower", "norm of the part of a decoder row along features that no latent tracks"
    ),
    "hedging/decoder_signed": Term(
        "hedging dec ±", "", "", "largest such component with its sign: > 0 for positive correlation"
    ),
    "hedging/encoder": Term("hedging enc", "", "lower", "the same of the encoder"),
    "hedging/encoder_signed": Term("hedging enc ±", "", "", "the same of the encoder, with its sign"),
    "absorption": Term(
        "absorption", "", "lower", "how much more often the parent's latent is silent when the child fires"
    ),
    "absorption_missed": Term(
        "absorption, plain", "", "lower", "how often the parent's latent is silent when the child fires"
    ),
    "absorption_encoder": Term("absorption enc", "", "", "parent's encoder along its child: < 0 absorbs, > 0 hedges"),
    "absorption_parents_f1": Term(
        "parents' F1",
        "",
        "higher",
        "F1 of the best detector of each parent feature, tracked or not",
    ),
    "hedging/degree": Term(
        "hedging degree", "", "lower", "how far old latents move into the span of new ones, above chance"
    ),
    "hedging/live_degree": Term("live degree", "", "lower", "the degree over old latents that fire"),
    "hedging/covariance_degree": Term(
        "degree vs covariance", "", "lower", "above subspaces drawn with the data's covariance"
    ),
    "hedging/foreign_degree": Term("degree vs foreign", "", "lower", "above the span of another seed's new latents"),
    "hedging/projection": Term("projection", "", "", "movement of old latents within the span of new ones, relative"),
    "hedging/baseline": Term("baseline", "", "", "the same within random subspaces"),
    "hedging/baseline_std": Term("baseline spread", "", "", "its standard deviation over draws"),
    "hedging/covariance_baseline": Term(
        "covariance baseline", "", "", "within random subspaces of the data's covariance"
    ),
    "hedging/foreign_baseline": Term("foreign baseline", "", "", "within the span of other seeds' new latents"),
    "hedging/noise_floor": Term("noise floor", "", "lower", "the projection of what merely reordering the data moves"),
    "hedging/noise_delta_norm": Term("noise movement", "", "lower", "how far reordering the data moves decoder rows"),
    "hedging/delta_norm": Term("movement", "", "", "‖Δ‖: how far old decoder rows moved, mean"),
    "hedging/mean_cosine": Term("old with old", "", "", "cosine of old rows in control and extended SAE, mean"),
    "hedging/rank": Term("rank", "", "", "dimension of the span of the new latents"),
    "hedging/residual_hedging": Term(
        "residual hedging",
        "",
        "lower",
        "norm of hedged components, from the spread of errors where a latent fires; 0: none",
    ),
    "hedging/residual_hedging_std": Term("its std. error", "", "", "standard error of residual hedging over examples"),
    "hedging/live_latents": Term("live old", "latents", "", "old latents that fire in both SAEs"),
    "hedging/live_new_latents": Term(
        "live new", "latents", "higher", "new latents that fire; without them a degree says nothing"
    ),
    "probing/f1_k*": Term(
        "probing F1", "", "higher", "F1 of a logistic regression on the k latents that tell classes apart"
    ),
    "probing/auc_k*": Term("probing AUC", "", "higher", "its area under the ROC curve"),
    "absorption/full": Term(
        "full absorption", "", "lower", "first-letter task: words whose letter only another latent carries"
    ),
    "absorption/fraction": Term(
        "absorption share", "", "lower", "first-letter task: the share of the letter that others carry"
    ),
    "absorption/split_latents": Term("splits", "latents", "lower", "latents that a letter is split into, mean"),
    "loss_recovered/recovered": Term(
        "loss recovered", "", "higher", "share of the model's loss kept with reconstructions put in"
    ),
    "loss_recovered/kl_recovered": Term(
        "KL recovered", "", "higher", "the same of the divergence from the model's predictions"
    ),
    "tpp/n*": Term(
        "TPP", "", "higher", "targeted probe perturbation: what ablating a class's latents does to it alone"
    ),
    "scr/n*": Term(
        "SCR", "", "higher", "spurious correlation removal: share of the bias that ablating latents removes"
    ),
    "geometry/near_duplicates": Term(
        "near duplicates", "", "lower", "latents with another at almost the same direction"
    ),
    "samples/s": Term("samples/s", "1/s", "higher", "examples a second in training, validation passes left out"),
    "data/tokens_per_s": Term("tokens/s", "1/s", "higher", "tokens a second of the language model beside training"),
    "b_dec_norm": Term("‖b_dec‖", "", "", "norm of the decoder bias"),
}
KEY_METRICS = (
    "explained_variance",
    "l0",
    "dead_latents",
    "mcc",
    "hedging/degree",
    "hedging/decoder_signed",
    "absorption",
)
_CLUTTER = re.compile(r"^(system/|data/norm/|latent\d+/|train/)|/level\d+$|^hedging/seed\d+/|_seed_std$")


def bare(metric: str) -> str:
    """A metric's name without the stage that it was measured in.

    >>> bare("val/l0"), bare("hedging/seed3/degree"), bare("hedging/degree_seed_std")
    ('l0', 'hedging/degree', 'hedging/degree')
    """
    name = re.sub(r"^(val|test|train|control)/", "", metric)
    return re.sub(r"_seed_std$", "", re.sub(r"/seed\d+/", "/", name))


def term(metric: str) -> Term | None:
    """What a logged metric means; None where the glossary does not say."""
    name = bare(metric)
    return GLOSSARY.get(name) or GLOSSARY.get(re.sub(r"\d+$", "*", name))


def title(metric: str) -> str:
    """A short name of a logged metric, its unit included.

    >>> title("val/explained_variance"), title("probing/f1_k5"), title("unheard/of")
    ('expl. var.', 'probing F1, 5', 'unheard/of')
    """
    known = term(metric)
    if known is None:
        return metric
    number = re.search(r"\d+$", bare(metric)) if bare(metric) not in GLOSSARY else None
    return known.title + (f", {number[0]}" if number else "")


def worth_showing(metrics: dict[str, float], most: int = 12) -> list[str]:
    """The metrics that tables show: best known first, one stage each, without losses, single latents and the machine."""
    found: dict[str, str] = {}
    for name in sorted(metrics, key=lambda one: (not one.startswith(STAGES), one)):
        if not _CLUTTER.search(name):
            found.setdefault(bare(name), name)
    order = {name: place for place, name in enumerate(dict.fromkeys([*KEY_METRICS, *GLOSSARY]))}
    return sorted(found.values(), key=lambda one: (order.get(bare(one), len(order)), one))[:most]
