"""The metrics as torchmetrics classes: what each function of :mod:`.functional` gives, over all batches and ranks.

``update`` takes what the function takes, ``weight [batch]`` last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.additive import AdditiveMetric, FunctionMetric, ShapedMetric
from hedgelab.metrics.functional import basic, loss_recovered
from hedgelab.metrics.functional.accumulate import Ratio, as_codes
from hedgelab.metrics.functional.degree import DRAWS, DegreeScores, DegreeSums, degree_update, hedging_degree
from hedgelab.metrics.functional.error_spread import BLOCKS, ResidualHedging, residual_hedging
from hedgelab.metrics.functional.hierarchy import HierarchySums, hierarchy_update
from hedgelab.metrics.functional.recovery import co_firing_update
from hedgelab.metrics.functional.true_hedging import regression_update

ROWS = 8192
"""Examples that residual hedging keeps: memory grows with them, time with their square."""


class ExplainedVariance(FunctionMetric):
    """Share of the variance that the reconstruction explains; see :func:`.functional.explained_variance`."""

    higher_is_better = True

    def __init__(self, d_in: int, **kwargs: Any) -> None:
        functions = basic.explained_variance_update, basic.explained_variance_compute
        super().__init__(*functions, torch.zeros(0, d_in), torch.zeros(0, d_in), **kwargs)


class MeanSquaredError(FunctionMetric):
    """Squared error, summed over d_in and averaged over examples; see :func:`.functional.mean_squared_error`."""

    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        empty = torch.zeros(0, 1), torch.zeros(0, 1)
        super().__init__(basic.mean_squared_error_update, Ratio.value, *empty, **kwargs)


class Shrinkage(FunctionMetric):
    """Relative reconstruction bias, below 1 when shrunk; see :func:`.functional.shrinkage`."""

    higher_is_better = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(basic.shrinkage_update, Ratio.value, torch.zeros(0, 1), torch.zeros(0, 1), **kwargs)


class L0(FunctionMetric):
    """Mean number of active latents an example; see :func:`.functional.l0`."""

    higher_is_better = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(basic.l0_update, Ratio.value, torch.zeros(0, 1), **kwargs)


class DeadCount(NamedTuple):
    """Latents that fired on no example seen."""

    number: Tensor  # int64 scalar
    fraction: Tensor  # of all latents, float64 scalar


class DeadLatents(FunctionMetric):
    """Count and fraction of the ``d_sae`` latents that fired on no example seen; see :func:`.functional.dead_latents`."""

    higher_is_better = False

    def __init__(self, d_sae: int, **kwargs: Any) -> None:
        super().__init__(basic.firing_update, None, torch.zeros(0, d_sae), **kwargs)

    def compute(self) -> DeadCount:
        """Dead latents over everything seen."""
        dead = super().compute().fired == 0
        return DeadCount(dead.sum(), dead.double().mean())


class FiringDensities(NamedTuple):
    """How often latents fire."""

    rates: Tensor  # fraction of examples each latent fires on, [d_sae]
    histogram: basic.DensityHistogram  # latents by log10 of that rate


class FiringDensity(FunctionMetric):
    """Firing rate of each of ``d_sae`` latents, and their histogram over ascending ``edges`` in log10 of the rate."""

    higher_is_better = None

    def __init__(self, d_sae: int, edges: tuple[float, ...] = basic.LOG_DENSITY_EDGES, **kwargs: Any) -> None:
        super().__init__(basic.firing_update, None, torch.zeros(0, d_sae), **kwargs)
        self.edges = edges

    def compute(self) -> FiringDensities:
        """Rates and histogram over everything seen."""
        fired, weight = super().compute()
        return FiringDensities(fired / weight, basic.density_histogram(fired / weight, self.edges))


class FeatureDetection(FunctionMetric):
    """How often each of ``d_sae`` latents fires together with each of ``n`` features.

    Feed the result to :func:`.functional.detection_scores` (precision, recall, F1 of each latent for its feature) or to
    :func:`.functional.absorption_from_co_firing`. Holds ``8 · d_sae · n`` bytes.
    """

    higher_is_better = None

    def __init__(self, d_sae: int, n: int, **kwargs: Any) -> None:
        super().__init__(co_firing_update, None, torch.zeros(0, d_sae), torch.zeros(0, n), **kwargs)


class FeatureRegression(FunctionMetric):
    """Sums behind true hedging where features overlap: the regression of ``n`` true activations on ``d_sae`` codes.

    Feed the result to :func:`.functional.regressed_hedging`. Holds ``8 · d_sae · (n + d_sae)`` bytes: .7 GB for 4096 latents
    and 16384 features; a batch costs what :class:`FeatureDetection`'s does, and ``batch · d_sae²`` multiplications more.
    """

    higher_is_better = None

    def __init__(self, d_sae: int, n: int, **kwargs: Any) -> None:
        super().__init__(regression_update, None, torch.zeros(0, d_sae), torch.zeros(0, n), **kwargs)


class FeatureHierarchy(FunctionMetric):
    """Which of ``n`` features is whose parent, inferred from firing; see :func:`.functional.infer_parents`.

    Holds ``8 · n²`` bytes. Batches with weights are taken for exact populations, which leave nothing to chance.
    """

    higher_is_better = None

    def __init__(self, n: int, **kwargs: Any) -> None:
        super().__init__(hierarchy_update, HierarchySums.parents, torch.zeros(0, n), **kwargs)


class LossRecovered(AdditiveMetric):
    """How much of a language model's loss an SAE's reconstruction recovers; see :func:`.functional.recovered_loss`.

    The ablations are the same for every SAE: their sums, :func:`.baseline_sums`, may be added (:meth:`add_to`) once for all.
    """

    higher_is_better = True
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("count", *loss_recovered.LOSSES):
            self.add_sum(name)

    def update(self, tokens: Tensor, keep: Tensor, clean: Tensor, sae: Tensor, *ablations: Tensor) -> None:
        """Add contexts ``[n, length]``: tokens, and logits of the model untouched and with SAE, zeros and mean spliced in."""
        self.add_to(**loss_recovered.spliced_sums("sae", tokens, keep, clean, sae))
        if ablations:
            self.add_to(**loss_recovered.baseline_sums(tokens, keep, clean, *ablations))

    def compute(self) -> loss_recovered.RecoveredLoss:
        """Losses and shares over everything seen."""
        sums = {name: getattr(self, name) for name in loss_recovered.LOSSES}
        return loss_recovered.recovered_loss(sums, self.count)


class HedgingDegree(FunctionMetric):
    """How much an SAE hedges, from its continuations with and without new latents; see :func:`.functional.hedging_degree`.

    ``update`` takes activations ``[batch, d_in]`` and the latents of both SAEs: they settle which latents live, and their
    covariance. The degree itself needs only the decoders; without batches all latents count as live.
    """

    higher_is_better = False
    control: Tensor
    extended: Tensor
    reordered: Tensor | None
    foreign: Tensor | None

    def __init__(
        self,
        control: Tensor,
        extended: Tensor,
        reordered: Tensor | None = None,
        foreign: list[Tensor] | None = None,
        draws: int = DRAWS,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        empty = (torch.zeros(0, size) for size in (control.shape[1], len(control), len(extended)))
        super().__init__(degree_update, None, *empty, **kwargs)
        rows = {"control": control, "extended": extended, "reordered": reordered}
        for name, decoder in (rows | {"foreign": torch.stack(foreign) if foreign else None}).items():
            self.register_buffer(name, None if decoder is None else decoder.detach(), persistent=False)
        self.draws, self.seed = draws, seed

    def compute(self) -> DegreeScores:
        """The degree with its controls, over everything seen."""
        sums: DegreeSums = super().compute()
        width, seen = len(self.control), bool(sums.weight > 0)
        mean = sums.total / sums.weight
        return hedging_degree(
            self.control,
            self.extended,
            live=(sums.control_fired > 0) & (sums.extended_fired[:width] > 0) if seen else None,
            live_new=sums.extended_fired[width:] > 0 if seen else None,
            covariance=sums.products / sums.weight - mean.outer(mean) if seen else None,
            foreign=None if self.foreign is None else list(self.foreign),
            reordered=self.reordered,
            draws=self.draws,
            seed=self.seed,
        )


class ResidualHedgingMetric(ShapedMetric):
    """How much each latent of an SAE hedges, from held-out activations alone; see :func:`.functional.residual_hedging`.

    Holds the first ``rows`` examples of each rank with their codes: ``4 · rows · (2 d_in + d_sae)`` bytes.
    """

    higher_is_better = False
    x: list[Tensor]
    error: list[Tensor]
    codes: list[Tensor]
    W_dec: Tensor

    def __init__(self, W_dec: Tensor, rows: int = ROWS, blocks: int = BLOCKS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows, self.blocks = rows, blocks
        self.register_buffer("W_dec", W_dec.detach().float(), persistent=False)
        for name in ("x", "error", "codes"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, x: Tensor, reconstruction: Tensor, codes: Tensor | Codes) -> None:
        """Add a batch; ``x``, ``reconstruction``: ``[batch, d_in]``, with the latents that were decoded."""
        room = self.rows - sum(map(len, self.x))
        if room > 0:
            self.x.append(x[:room].detach().float())
            self.error.append((x - reconstruction)[:room].detach().float())
            self.codes.append(as_codes(codes).to_dense()[:room].detach().float())

    def compute(self) -> ResidualHedging:
        """Hedging over everything kept."""
        x, error, codes = (dim_zero_cat(state) for state in (self.x, self.error, self.codes))
        return residual_hedging(x, error, codes, self.W_dec, self.blocks)
