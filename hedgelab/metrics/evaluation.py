"""Everything a validation pass of an SAE measures, behind one ``update`` and one ``compute``."""

import warnings
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hedgelab.batch import Batch
from hedgelab.glossary import GROUP
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.ranks import ALONE, Ranks
from hedgelab.metrics import classes
from hedgelab.metrics.functional import hierarchy, planted, recovery, true_hedging
from hedgelab.metrics.functional.accumulate import as_codes
from hedgelab.metrics.functional.error_spread import BLOCKS, JOINT_LATENTS
from hedgelab.metrics.functional.true_hedging import MOST_PAIRS

MOST_PAIRS_EVERY_PASS = 2**24  # of latent and feature that are regressed in every pass, not in the last alone
MOST_INFERRED = 4096  # most features among which a hierarchy is inferred: its counts take 8 n² bytes


class SAEMetrics(nn.Module):
    """The metrics of one SAE over a validation pass, on any device and any number of ranks; ``README.md`` explains each.

    Always reconstruction, sparsity and the results of every :class:`.ValidationMetric`; with ``feature_directions [n, d_in]``
    also their recovery, detection and hedging, and absorption where they have a hierarchy: ``parents [n]`` (int64, -1 for
    none), inferred from up to 4096 features' firing unless given. Where features are planted, ``null_directions [m, d_in]`` are
    drawn like theirs: hedging along them is read beside chance. Detection is the mean over the latents assigned to a feature
    for the MCC, hedging over live latents, absorption over children. Hedging by regression (n > d_in) of more than 2²⁴ pairs of
    latent and feature is left out unless a pass is the ``last``: it takes a minute of a core at 4096 x 16384. The last pass
    measures residual hedging, too, on its first batches (8192 examples), of up to 4096 latents and where these have no weights.
    ``ranks`` are those over which the batches are split, and so the sums; None: all processes, where there are several.
    """

    feature_directions: Tensor | None
    parents: Tensor | None
    null_directions: Tensor | None

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        feature_directions: Tensor | None = None,
        parents: Tensor | None = None,
        null_directions: Tensor | None = None,
        ranks: Ranks | None = None,
        last: bool = True,
    ) -> None:
        super().__init__()
        if ranks is None:
            ranks = Ranks.of(None) if dist.is_available() and dist.is_initialized() else ALONE
        split: dict[str, Any] = {"sync_on_compute": ranks.size > 1, "process_group": ranks.group}
        self.explained_variance = classes.ExplainedVariance(d_in, **split)
        self.mse = classes.MeanSquaredError(**split)
        self.shrinkage = classes.Shrinkage(**split)
        self.norm_ratio = classes.NormRatio(**split)
        self.firing = classes.FiringDensity(d_sae, **split)
        for point in entry_points(group=GROUP):
            point.load()  # so that its metrics are declared
        self.own = nn.ModuleList(own(d_in, d_sae, **split) for own in classes.ValidationMetric.declared.values())
        self.residual: classes.ResidualHedgingMetric | None = None
        if last and d_sae <= JOINT_LATENTS:
            rows = max(1, classes.ROWS // ranks.size)
            self.residual = classes.ResidualHedgingMetric(torch.zeros(d_sae, d_in), rows, **split)
        self.truth = nn.ModuleDict()
        self.register_buffer("feature_directions", feature_directions, persistent=False)
        self.register_buffer("parents", parents, persistent=False)
        self.register_buffer("null_directions", null_directions, persistent=False)
        if feature_directions is None:
            return
        n = len(feature_directions)
        self.truth["detection"] = classes.FeatureDetection(d_sae, n, **split)
        if parents is None and n <= MOST_INFERRED:
            self.truth["hierarchy"] = classes.FeatureHierarchy(n, **split)
        self.leaves_hedging_out = n > d_in and not last and MOST_PAIRS_EVERY_PASS < d_sae * n <= MOST_PAIRS
        if n > d_in and d_sae * n <= MOST_PAIRS and not self.leaves_hedging_out:
            self.truth["regression"] = classes.FeatureRegression(d_sae, n, **split)
        elif n > d_in and not self.leaves_hedging_out:
            pairs = f"{n} overlapping features and {d_sae} latents are more than {MOST_PAIRS} pairs"
            warnings.warn(f"hedging/decoder: {pairs}; NaN", stacklevel=2)
        for metric in self.truth.values():
            metric.copies = False  # type: ignore[assignment]  # results are used at once, and some are large

    def update(self, batch: Batch, x_hat: Tensor, codes: Tensor | Codes) -> None:
        """Add a batch, its reconstruction ``[batch, d_in]`` and its latents."""
        x, features, weight = batch
        codes = as_codes(codes)
        for metric in (self.explained_variance, self.mse, self.shrinkage, self.norm_ratio):
            metric.update(x, x_hat, weight)
        self.firing.update(codes, weight)
        for own in self.own:
            own.update(batch, x_hat, codes)  # type: ignore[operator]
        kept = self.residual
        if kept is not None and weight is None and (not kept.held or kept.held + len(x) <= kept.rows):
            kept.update(x, x_hat, codes)  # whole batches, so that it is the same on any number of ranks
        if self.truth and features is None:
            raise ValueError("feature_directions are known, so every batch needs its features")
        for name, true in self.truth.items():
            true.update(*([] if name == "hierarchy" else [codes]), features, weight)  # type: ignore[operator]

    def compute(self, W_enc: Tensor, W_dec: Tensor) -> dict[str, Tensor]:
        """Scalars over everything seen, by name; weights ``[d_in, d_sae]`` and ``[d_sae, d_in]`` may have any norms."""
        rates = self.firing.compute()
        results = {name: getattr(self, name).compute() for name in ("explained_variance", "mse", "shrinkage", "norm_ratio")}
        dead = (rates == 0).double()
        results |= {"l0": rates.sum(), "dead_latents": dead.sum(), "dead_fraction": dead.mean()}
        for own in self.own:
            value = own.compute()  # type: ignore[operator]
            by_name = {f"/{key}": one for key, one in value.items()} if isinstance(value, Mapping) else {"": value}
            results |= {f"{own.name}{key}": one for key, one in by_name.items()}
        if self.residual is not None and self.residual.held >= 2 * BLOCKS:
            self.residual.W_dec = W_dec.detach().float()
            seen = self.residual.compute()
            if bool(seen.hedging.isfinite()):
                results |= {"hedging/residual_hedging": seen.hedging, "hedging/residual_hedging_std": seen.std}
        if self.feature_directions is not None:
            results |= self._of_features(self.feature_directions, W_enc, W_dec)
        return results

    def _of_features(self, directions: Tensor, W_enc: Tensor, W_dec: Tensor) -> dict[str, Tensor]:
        """Those that need known features."""
        found = {name: metric.compute() for name, metric in self.truth.items()}  # type: ignore[operator]
        counts, parents, sums = found["detection"], found.get("hierarchy", self.parents), found.get("regression")
        cosines = recovery.decoder_cosines(W_dec, directions)
        live, unique = counts.latents > 0, directions.shape[0] <= directions.shape[1]
        assigned = recovery.match_features(cosines)
        if bool(live.all()):  # the same assignment, which takes seconds where features are many
            tracked = recovery.strong_pairs(assigned.feature, cosines, true_hedging.TRACKING_COSINE)
        else:
            tracked = true_hedging.tracked_features(cosines, live)
        detection = recovery.detection_scores(counts, assigned.feature)
        nearest = recovery.nearest_detection_scores(counts, cosines)
        results = {
            "mcc": recovery.mcc(cosines, assigned),
            "mean_max_cosine": recovery.mean_max_cosine(cosines),
            "mean_max_cosine_latents": recovery.mean_max_cosine(cosines.T),
            "uniqueness": recovery.uniqueness(cosines),
            "tracked_features": (tracked.latent >= 0).sum().double(),
            **{f"detector_{name}": score.nanmean() for name, score in detection._asdict().items()},
            **{f"nearest_{name}": score.mean() for name, score in nearest._asdict().items()},
        }
        decoder = encoder = None
        if unique:
            reads = true_hedging.encoder_coordinates(W_enc, directions)
            writes = true_hedging.decoder_coordinates(W_dec, directions)
            decoder, encoder = (true_hedging.hedging(part, cosines, tracked, live) for part in (writes, reads))
        elif sums is not None:
            often = counts.latents >= true_hedging.FIRINGS if bool(sums.examples > 0) else live
            decoder = true_hedging.regressed_hedging(sums, W_dec, directions, cosines, tracked, often)
        for part, scores in () if self.leaves_hedging_out else (("decoder", decoder), ("encoder", encoder)):
            norm, largest = (torch.full_like(cosines[:, 0], torch.nan),) * 2 if scores is None else scores[1:]
            results[f"hedging/{part}"], results[f"hedging/{part}_signed"] = norm[live].nanmean(), largest[live].nanmean()
        if parents is not None and bool((parents >= 0).any()):
            if not unique:  # only now: of many features they are large
                reads = true_hedging.encoder_coordinates(W_enc, directions)
            absorbed = hierarchy.absorption_from_co_firing(counts, tracked.latent, parents)
            results["absorption"] = absorbed.excess.nanmean()
            results["absorption_missed"] = absorbed.missed.nanmean()
            results["absorption_encoder"] = hierarchy.parent_encoder_components(reads, tracked.latent, parents).nanmean()
            results["absorption_parents_f1"] = hierarchy.parents_best_f1(counts, parents).nanmean()
        if self.null_directions is not None and self.parents is not None:
            beside_chance = planted.planted_hedging(W_dec, directions, self.null_directions, self.parents, tracked, live)
            results |= {f"planted/{name}": value for name, value in beside_chance._asdict().items()}
        return results
