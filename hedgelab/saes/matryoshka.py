"""Matryoshka SAEs: nested prefixes of latents, each of which must reconstruct on its own."""

from collections.abc import Callable, Hashable, Iterable
from itertools import pairwise
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from hedgelab.batch import Batch
from hedgelab.errors import UserError, whole_number
from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import Decoder, Errors, Target
from hedgelab.saes.balance import asymmetry, outside_span
from hedgelab.saes.base import SAE
from hedgelab.saes.flat import FlatSAE
from hedgelab.saes.io import load_sae
from hedgelab.saes.losses import LossTerms
from hedgelab.saes.mitigations.base import Mitigation, Mitigations
from hedgelab.training.sharding import is_split


def _of_inner(name: str) -> Any:
    """The inner SAE's attribute or method of this name, to use and to set."""
    return property(lambda sae: getattr(sae.inner, name), lambda sae, value: setattr(sae.inner, name, value))


class MatryoshkaSAE(SAE):
    """Wrap an SAE so that each nested prefix of its latents reconstructs on its own (SPEC section 3).

    Level ℓ reconstructs from the first ``levels[ℓ]`` latents; the loss is ``Σ_ℓ w_ℓ (MSE_ℓ + penalty_ℓ)`` with
    ``w_ℓ = beta^(L - ℓ)``: 0 is the ordinary SAE, 1 the plain matryoshka SAE (Bussmann et al. 2025), values between balance
    hedging against absorption (Chanin et al. 2025, section 6). Above 1 the loss is divided by the number of levels.

    Beyond the paper, and derived in :mod:`hedgelab.saes.balance`: with ``credit`` an inner level need not explain what outer
    latents explain already, so its target is ``x - credit · (1 - P) (x̂_L - x̂_ℓ)``, where the outer levels' part is detached and
    P projects on the span of the level's own decoder rows; with ``adaptive`` the inner levels' weights are found in training.

    Args:
        d_in: Width of the activations (linked from the data).
        inner: The SAE inside, or what makes it from ``d_in``: its width, activation, penalty, initialisation and optimiser.
        levels: Sizes of the nested prefixes, rising; the last is the inner SAE's ``d_sae``.
        beta: Factor from each level's weight to the next inner one's.
        detached: Inner levels feel no gradient from outer ones (the limit of a large β); each level then pays the penalty of
            its own new latents only.
        auxiliary_per_level: Dead latents of each level predict that level's residual, instead of all the last one's.
        credit: Share of what outer latents explain outside a level's own span that the level is spared, 0 (plain) to 1.
            A level of at least ``d_in`` latents spans everything, and stays plain.
        adaptive: Let inner levels' weights move, from those of β, to where their latents neither hedge nor are absorbed on
            average: logarithms are parameters, their gradient the measured asymmetry. Meant for Adam, which ignores its scale.
        credit_start: Step from which ``credit`` counts. Without it, random levels learn to put general features first; where
            features are few enough to be orthogonal, credit from half-time on then does best.
        mitigations: What changes training further (:mod:`hedgelab.saes.mitigations`). Those that only encode or add terms may
            be the inner SAE's as well.

    Attributes:
        level_weights: Weight of each level's loss, innermost first; set from β, free to be set otherwise.
        level_names: What the terms of each level's loss end in: ``level128`` where it is the first 128 latents.
    """

    per_member = ("level_weights", "credit")
    full_precision = ("log_factors",)

    d_sae, W_enc, b_enc, W_dec, b_dec = map(_of_inner, ("d_sae", "W_enc", "b_enc", "W_dec", "b_dec"))
    steps_done, dead_latents = map(_of_inner, ("steps_done", "dead_latents"))
    before_optimizer_step, optimizer = map(_of_inner, ("before_optimizer_step", "optimizer"))
    lr_scheduler, gradient_clip_norm = map(_of_inner, ("lr_scheduler", "gradient_clip_norm"))

    def __init__(
        self,
        d_in: int,
        inner: Callable[[int], FlatSAE],
        levels: list[int],
        beta: float = 1.0,
        detached: bool = False,
        auxiliary_per_level: bool = False,
        credit: float = 0.0,
        adaptive: bool = False,
        credit_start: int = 0,
        mitigations: list[Mitigation] | None = None,
    ) -> None:
        super().__init__()
        self.inner = inner if isinstance(inner, FlatSAE) else inner(d_in)
        self.d_in, d_sae = d_in, self.inner.d_sae
        levels = [whole_number("model.levels", level) for level in levels]
        mistakes = {
            f"inner: has d_in = {self.inner.d_in}, the activations {d_in}": self.inner.d_in != d_in,
            f"levels: must be rising sizes of at least 1, got {levels}": not levels or levels != sorted(set(levels)),
            f"levels: the last must be the inner d_sae = {d_sae}, got {levels}": levels[-1:] != [d_sae],
            f"beta: must be 0 or a finite positive number, got {beta}; see model.detached": not 0 <= beta < inf,
            f"beta: has no meaning with model.detached: true, got {beta}": detached and beta != 1,
            f"credit: must lie between 0 and 1, got {credit}": not 0 <= credit <= 1,
            f"credit: has no meaning with model.detached: true, got {credit}": detached and credit,
            "adaptive: needs a beta above 0 to start from, and detached: false": adaptive and (detached or not beta),
        }
        for mistake, made in mistakes.items():
            if made:
                raise UserError(f"model.{mistake}")
        self.levels, self.beta = levels, beta
        share = 1 / len(levels) if beta > 1 else 1.0
        self.level_weights = [share * beta**outer for outer in reversed(range(len(levels)))]
        self.detached, self.auxiliary_per_level, self.adaptive = detached, auxiliary_per_level, adaptive
        self.credit, self.credit_start = float(credit), whole_number("model.credit_start", credit_start, 0)
        self.log_factors = nn.Parameter(torch.zeros(len(levels) - 1)) if adaptive else None
        self.level_names = [f"level{size}" for size in levels]
        for kind in (type(one) for one in self.inner.mitigations.all()):
            if kind.target is not Mitigation.target or kind.codes_and_decoder is not Mitigation.codes_and_decoder:
                raise UserError(f"model.inner.mitigations: {kind.__name__} concerns levels; move it to model.mitigations")
        self.mitigations = Mitigations(mitigations)
        self.mitigations.check(self)

    def level_slices(self) -> list[slice]:
        """Each level's own new latents, counted in :meth:`latent_order`."""
        return [slice(a, b) for a, b in pairwise([0, *self.levels])]

    def latent_order(self) -> Tensor | None:
        """The latents in the order in which levels are cut, ``[d_sae]`` int64: level ℓ has the first ``levels[ℓ]`` of them.

        None where that is the SAE's own order, as it is without a mitigation that sorts.
        """
        return next((order for one in self.mitigations.all() if (order := one.order()) is not None), None)

    def encode(self, x: Tensor) -> Codes:
        """Latents of activations ``x [..., d_in]``, as used for inference and measuring."""
        return self.inner.encode(self.mitigations.encoded(self.inner, x, self.inner.selection))

    def loss(self, batch: Batch | Tensor) -> LossTerms:
        """Every level's weighted squared error and penalty: ``Σ_ℓ w_ℓ (MSE_ℓ + penalty_ℓ) + auxiliary`` (SPEC section 3).

        Mitigations may change it, and add terms.
        """
        batch = self.as_batch(batch)
        x = self.mitigations.encoded(self.inner, batch.x, lambda: self.inner.training_selection(batch))
        codes, penalty = self.inner.activate(batch._replace(x=x))
        target = Target(batch.x, self.levels, self.detached, batch.weight)
        prepared = self.mitigations.prepared(self, codes, self.inner.decoder(), target)
        ordered, _, target = prepared
        losses, errors = self.level_errors(*prepared)
        terms = self.adaptation(ordered, batch.weight)
        order = self.latent_order()
        penalty = penalty if penalty is None or order is None else penalty[order]
        slices = [slice(a, b) for a, b in pairwise([0, *target.levels])]
        for name, weight, own, mse in zip(self.level_names, self.current_weights(), slices, losses, strict=True):
            if isinstance(weight, float) and not weight:
                continue
            terms[f"mse/{name}"] = weight * mse
            if penalty is not None:
                own_alone = target.detach is True or (target.detach and own is not slices[-1])
                paid = ops.total(penalty, own if own_alone else slice(own.stop))
                terms[f"{self.inner.penalty_name}/{name}"] = weight * paid
        revived: Iterable[tuple[Tensor, slice | Tensor | None, str]] = [(errors[-1], None, "auxiliary")]
        if self.auxiliary_per_level:
            own_latents = slices if order is None else [order[own] for own in slices]
            revived = zip(errors, own_latents, [f"auxiliary/{name}" for name in self.level_names], strict=True)
        for error, among, name in revived:
            if (auxiliary := self.inner.auxiliary_loss(batch, error, among)) is not None:
                terms[name] = auxiliary
        flat = Target(batch.x, (self.d_sae,), weight=batch.weight)
        terms |= self.inner.mitigations.terms(self.inner, codes, self.inner.decoder(), flat, errors[-1:])
        terms |= self.mitigations.terms(self, *prepared, errors)
        return LossTerms(terms, codes, errors[-1])

    def initialize(self, first: Batch, feature_directions: Tensor | None) -> None:
        """As the inner SAE; with weights from an SAE on disk, its mitigations' counts too where both have the same ones."""
        self.inner.initialize(first, feature_directions)
        if (folder := self.inner.init.weights) is not None:
            self.mitigations.take_over(getattr(load_sae(folder), "mitigations", Mitigations()))

    @torch.no_grad()
    def after_step(self, result: LossTerms) -> None:
        """Advance what counts steps, of the inner SAE and of the mitigations."""
        self.inner.after_step(result)
        self.mitigations.after_step(self, result)

    def step_key(self, rows: int) -> tuple[Hashable, ...] | None:
        """That of the inner SAE with the levels' weights; None where they adapt, and with credit."""
        inner = self.inner.step_key(rows)
        if inner is None or self.credit or self.adaptive or not all(one.fixed_shapes for one in self.mitigations.all()):
            return None
        return *inner, *self.level_weights

    def current_weights(self) -> list[Any]:
        """Weight of each level's loss as of now, innermost first: numbers, or with ``adaptive`` scalar tensors."""
        if self.log_factors is None:
            return list(self.level_weights)
        *inner, last = self.level_weights
        return [*(w * f for w, f in zip(inner, self.log_factors.detach().exp(), strict=True)), last]

    def adaptation(self, codes: Codes, weight: Tensor | None) -> dict[str, Tensor]:
        """With ``adaptive``, a term of value 0 whose gradient moves each inner level's weight against its asymmetry."""
        if self.log_factors is None:
            return {}
        if is_split(self.W_dec):
            raise UserError("model.adaptive: cannot be used where latents are split over processes, switch it off")
        signals = torch.stack([asymmetry(codes, size, weight, self.ranks) for size in self.levels[:-1]])
        return {"balance": ((self.log_factors - self.log_factors.detach()) * signals.to(self.log_factors)).sum()}

    def training_numbers(self) -> dict[str, float]:
        """With ``adaptive`` the weights of inner levels as ``level_weight/...``; those of the inner SAE and of mitigations."""
        weights = zip(self.level_names[:-1], self.current_weights()[:-1], strict=True) if self.adaptive else ()
        own = {f"level_weight/{name}": float(weight) for name, weight in weights}
        return {**own, **self.inner.training_numbers(), **self.mitigations.numbers()}

    def level_errors(self, codes: Codes, decoder: Decoder, target: Target) -> Errors:
        """Squared error of each level, and the errors; those of inner levels after their credit."""
        if self.steps_done < self.credit_start or (isinstance(self.credit, float) and not self.credit):
            return ops.level_errors(codes, decoder, target)
        if is_split(self.W_dec):
            raise UserError("model.credit: cannot be used where latents are split over processes, set it to 0")
        x, levels = target.x, target.levels
        with torch.no_grad():
            *inner, last = ops.level_errors(codes.detach(), decoder, target)[1]
            spared = [outside_span(last - error, decoder.W_dec[:size]) for size, error in zip(levels, inner)]  # noqa: B905
        parts = [codes.prefix(size) for size in levels[:-1]]
        wanted = [x - self.credit * part for part in spared]
        found = [
            ops.level_errors(part, decoder, target._replace(x=goal, levels=(self.d_sae,)))
            for part, goal in zip([*parts, codes], [*wanted, x], strict=True)
        ]
        return [losses[0] for losses, _ in found], [errors[0] for _, errors in found]
