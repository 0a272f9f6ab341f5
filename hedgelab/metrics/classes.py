"""The metrics as torchmetrics classes: what each function of :mod:`.functional` gives, over all batches and ranks.

``update`` takes what the function takes, ``weight [batch]`` last: each example's probability; without it each weighs 1.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from inspect import signature
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional import basic, loss_recovered
from hedgelab.metrics.functional.accumulate import NO_FLOAT64, add_sum, as_codes
from hedgelab.metrics.functional.degree import DRAWS, DegreeScores, degree_update, hedging_degree
from hedgelab.metrics.functional.error_spread import BLOCKS, ResidualHedging, residual_hedging
from hedgelab.metrics.functional.hierarchy import infer_parents
from hedgelab.metrics.functional.recovery import co_firing_update
from hedgelab.metrics.functional.true_hedging import regression_update

ROWS = 8192  # examples that residual hedging keeps: memory grows with them, time with their square


class AdditiveMetric(Metric):
    """A metric whose states add up, so that it is the same on one rank or many.

    States are in no ``state_dict``; they stay float64, whatever precision the module gets, on the CPU where its device has none
    (MPS). Results keep their shapes (torchmetrics squeezes ``[1]``), and stay when more batches come unless ``copies`` is off.
    """

    is_differentiable = False
    full_state_update = False
    copies = True

    def add_sum(self, name: str, *shape: int) -> None:
        """Declare a state: zeros of the given shape in float64, summed over ranks."""
        self._add_zeros(name, torch.zeros((), dtype=torch.float64).expand(shape))

    def _add_zeros(self, name: str, like: Tensor) -> None:
        """Declare a state of this shape and precision. What it starts from is kept as one number: some states are large."""
        zero = torch.zeros((), dtype=like.dtype, device=like.device)
        self.add_state(name, zero, dist_reduce_fx="sum")
        self._defaults[name] = zero.expand(like.shape)
        setattr(self, name, torch.zeros(like.shape, dtype=like.dtype, device=like.device))

    def add_to(self, **amounts: Tensor | float) -> None:
        """Add the sums of a batch to the states of those names, in place: some are large."""
        for name, amount in amounts.items():
            state = getattr(self, name)
            add_sum(state, torch.as_tensor(amount, device=state.device))

    def totals(self) -> dict[str, Tensor]:
        """The states by name."""
        return {name: getattr(self, name) for name in self._defaults}

    def _wrap_compute(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        @wraps(compute)
        def boxed() -> SimpleNamespace:  # which torchmetrics does not look into; copies, as it makes them of states
            value = compute()
            return SimpleNamespace(value=apply_to_collection(value, Tensor, Tensor.clone) if self.copies else value)

        computed = super()._wrap_compute(boxed)
        return wraps(compute)(lambda: computed().value)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> Self:
        self._computed = None
        on_cpu = fn(torch.zeros(1)).device.type in NO_FLOAT64
        super()._apply(fn, tuple(self._defaults) if on_cpu else exclude_state)
        return self


class FunctionMetric(AdditiveMetric):
    """A metric whose ``update`` takes what the function ``sums_of`` takes, which returns a batch's sums in a NamedTuple.

    The result is the ``value()`` of all sums, or they themselves. ``empty`` are arguments without examples, or widths.
    """

    def __init__(self, sums_of: Callable[..., Any], *empty: int | Tensor | Codes, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zero = sums_of(*(torch.zeros(0, one) if isinstance(one, int) else one for one in empty))
        self.sums_of, self.sums = sums_of, type(zero)
        for name, value in zero._asdict().items():
            self._add_zeros(name, value)

    def update(self, *batch: Any, **named: Any) -> None:
        """Add a batch; arguments as the function of sums takes them."""
        self.add_to(**self.sums_of(*batch, **named)._asdict())

    def _filter_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # what a MetricCollection passes on
        return {name: kwargs[name] for name in signature(self.sums_of).parameters if name in kwargs}

    def compute(self) -> Any:
        """The result over everything seen."""
        sums = self.sums(**self.totals())
        return sums.value() if hasattr(sums, "value") else sums


def _nothing(width: int) -> Codes:
    """Sparse codes without examples, whose sums take no memory."""
    return Codes.from_topk(torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0), width)


class ValidationMetric(AdditiveMetric):
    """A metric of one's own, which every validation pass reports beside the others.

    A subclass with a ``name`` is known once it is imported: by an entry point of the group ``hedgelab.metrics``, or because a
    config names it. It is made with the widths ``d_in`` and ``d_sae``, declares its sums in ``__init__`` (:meth:`add_sum`),
    adds to them in ``update(batch, x_hat, codes)``, and ``compute`` returns a scalar, or scalars by name (``name/...``).
    """

    name: ClassVar[str] = ""
    declared: ClassVar[dict[str, type["ValidationMetric"]]] = {}

    def __init__(self, d_in: int, d_sae: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.d_in, self.d_sae = d_in, d_sae

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).get("name"):
            ValidationMetric.declared[cls.name] = cls


class ExplainedVariance(FunctionMetric):
    """Share of the variance that the reconstruction explains; see :func:`.functional.explained_variance`."""

    higher_is_better = True

    def __init__(self, d_in: int, **kwargs: Any) -> None:
        super().__init__(basic.explained_variance_update, d_in, d_in, **kwargs)


class MeanSquaredError(FunctionMetric):
    """Squared error, summed over d_in and averaged over examples; see :func:`.functional.mean_squared_error`."""

    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(basic.mean_squared_error_update, 1, 1, **kwargs)


class Shrinkage(FunctionMetric):
    """Relative reconstruction bias, below 1 when shrunk; see :func:`.functional.shrinkage`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(basic.shrinkage_update, 1, 1, **kwargs)


class NormRatio(FunctionMetric):
    """Mean norm of reconstructions relative to the activations'; see :func:`.functional.norm_ratio`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(basic.norm_ratio_update, 1, 1, **kwargs)


class L0(FunctionMetric):
    """Mean number of active latents an example; see :func:`.functional.l0`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(basic.l0_update, 1, **kwargs)


class FiringDensity(FunctionMetric):
    """Firing rates of ``d_sae`` latents, as :func:`.functional.firing_rates` gives and ``density_histogram`` takes them."""

    def __init__(self, d_sae: int, **kwargs: Any) -> None:
        super().__init__(basic.firing_update, d_sae, **kwargs)


class DeadLatents(FiringDensity):
    """Number of the ``d_sae`` latents that fired on no example seen; see :func:`.functional.dead_latents`."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """Dead latents over everything seen."""
        rates: Tensor = super().compute()
        return (~(rates > 0)).sum()


class FeatureDetection(FunctionMetric):
    """How often each of ``d_sae`` latents fires together with each of ``n`` features.

    Feed the result to :func:`.functional.detection_scores` (precision, recall, F1 of each latent for its feature) or to
    :func:`.functional.absorption_from_co_firing`. Holds ``8 · d_sae · n`` bytes.
    """

    def __init__(self, d_sae: int, n: int, **kwargs: Any) -> None:
        super().__init__(co_firing_update, _nothing(d_sae), _nothing(n), torch.zeros(0), **kwargs)


class FeatureRegression(FunctionMetric):
    """Sums behind true hedging where features overlap: the regression of ``n`` true activations on ``d_sae`` codes.

    Feed the result to :func:`.functional.regressed_hedging`. Holds ``8 · d_sae · (n + d_sae)`` bytes: .7 GB for 4096 latents
    and 16384 features; a batch takes ``batch · d_sae²`` multiplications more than :class:`FeatureDetection`'s.
    """

    def __init__(self, d_sae: int, n: int, **kwargs: Any) -> None:
        super().__init__(regression_update, _nothing(d_sae), _nothing(n), **kwargs)


class FeatureHierarchy(AdditiveMetric):
    """Which of ``n`` features is whose parent, inferred from firing; see :func:`.functional.infer_parents`.

    Holds ``8 · n²`` bytes. Batches with weights are taken for exact populations, which leave nothing to chance.
    """

    def __init__(self, n: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, shape in (("both", (n, n)), ("weight", ()), ("weighted", ())):
            self.add_sum(name, *shape)

    def update(self, features: Tensor | Codes, weight: Tensor | None = None) -> None:
        """Add a batch of firing magnitudes ``[batch, n]``."""
        counts = co_firing_update(features, features, weight)
        self.add_to(both=counts.both, weight=counts.weight, weighted=float(weight is not None))

    def compute(self) -> Tensor:
        """Parent of each feature over everything seen."""
        both, weight, weighted = self.totals().values()
        return infer_parents(both, weight, exact=bool(weighted > 0))


class LossRecovered(AdditiveMetric):
    """How much of a language model's loss an SAE's reconstruction recovers; see :func:`.functional.recovered_loss`.

    The ablations are the same for every SAE: their sums, :func:`.baseline_sums`, may be added (:meth:`add_to`) once for all.
    """

    higher_is_better = True

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
        return loss_recovered.recovered_loss(self.totals(), self.totals()["count"])


class HedgingDegree(FunctionMetric):
    """How much an SAE hedges, from its continuations with and without new latents; see :func:`.functional.hedging_degree`.

    ``update`` takes activations ``[batch, d_in]`` and the latents of both SAEs: they settle which latents live, and their
    covariance. The degree itself needs only the decoders; without batches all latents count as live.
    """

    higher_is_better = False

    def __init__(
        self,
        control: Tensor,
        extended: Tensor,
        reordered: Tensor | None = None,
        foreign: Sequence[Tensor] = (),
        draws: int = DRAWS,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(degree_update, control.shape[1], len(control), len(extended), **kwargs)
        decoders = control.detach(), extended.detach()
        self.degree = partial(hedging_degree, *decoders, reordered=reordered, foreign=foreign, draws=draws, seed=seed)

    def compute(self) -> DegreeScores:
        """The degree with its controls, over everything seen."""
        weight, total, products, old, new = super().compute()
        if not bool(weight > 0):
            return self.degree()
        mean, (among_new, added) = total / weight, new.tensor_split([len(old)])
        covariance = products / weight - mean.outer(mean)
        return self.degree(live=(old > 0) & (among_new > 0), live_new=added > 0, covariance=covariance)


class ResidualHedgingMetric(AdditiveMetric):
    """How much each latent of an SAE hedges, from held-out activations alone; see :func:`.functional.residual_hedging`.

    Holds the first ``rows`` examples of each rank with their codes, ``4 · rows · (2 d_in + 3 L0)`` bytes. Those of several
    ranks come in the order of updates, in each of them by rank: as one rank would have seen them.
    """

    higher_is_better = False
    ranks: Tensor  # one of each, so their number once they are synchronised
    sizes: list[Tensor]  # examples of each update
    x: list[Tensor]
    error: list[Tensor]
    active: list[Tensor]  # number of values stored of each example, then which latents' they are, then they themselves
    index: list[Tensor]
    values: list[Tensor]
    W_dec: Tensor

    def __init__(self, W_dec: Tensor, rows: int = ROWS, blocks: int = BLOCKS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows, self.blocks = rows, blocks
        self.register_buffer("W_dec", W_dec.detach().float(), persistent=False)
        self.add_state("ranks", torch.ones((), dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("sizes", "x", "error", "active", "index", "values"):
            self.add_state(name, [], dist_reduce_fx="cat")

    @property
    def held(self) -> int:
        """Examples kept so far on this rank."""
        return sum(map(len, self.x))

    def update(self, x: Tensor, reconstruction: Tensor, codes: Tensor | Codes) -> None:
        """Add a batch; ``x``, ``reconstruction``: ``[batch, d_in]``, with the latents that were decoded."""
        if (room := self.rows - self.held) > 0:
            self.x.append(x[:room].detach().float())
            self.error.append((x - reconstruction)[:room].detach().float())
            crow, index, values = as_codes(codes).part(slice(0, room)).detach().csr()
            self.sizes.append(crow.new_tensor([len(crow) - 1]))
            self.active.append(crow.diff())
            self.index.append(index)
            self.values.append(values.float())

    def compute(self) -> ResidualHedging:
        """Hedging over everything kept."""
        states = (self.sizes, self.x, self.error, self.active, self.index, self.values)
        sizes, x, error, active, index, values = (dim_zero_cat(state) for state in states)
        ranks = int(self.ranks)
        if ranks > 1 and len(sizes) % ranks == 0:
            rows = torch.split(torch.arange(len(x), device=x.device), sizes.tolist())
            updates = len(sizes) // ranks
            order = torch.cat([rows[rank * updates + update] for update in range(updates) for rank in range(ranks)])
            stored = torch.split(torch.arange(len(index), device=x.device), active.tolist())
            kept = torch.cat([stored[row] for row in order.tolist()])
            x, error, active, index, values = x[order], error[order], active[order], index[kept], values[kept]
        crow = torch.cat([active.new_zeros(1), active.cumsum(0)])
        return residual_hedging(x, error, Codes.from_csr(crow, index, values, len(self.W_dec)), self.W_dec, self.blocks)
