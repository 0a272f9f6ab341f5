"""SAEs whose latents pay for being active, and the controller that finds the price at which as many are as is wanted."""

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hedgelab.batch import Batch
from hedgelab.errors import UserError, positive, whole_number
from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import JumpReLU, ReLU, Threshold
from hedgelab.saes.flat import FlatSAE
from hedgelab.saes.losses import LossTerms, warmed_up

AVERAGED_STEPS = 20  # over which L0 is averaged
RATE = 3e-3  # of the logarithm of the coefficient a step, where L0 is e times the target
DAMPING = 2.0  # of the same, for each change of L0 by a factor of e
LARGEST_STEP = 0.02
PENALTY_START = 30.0  # the quadratic penalty is to outweigh what λ = 1 is for the plain one


def steering_step(before: Tensor, now: Tensor, target: float) -> Tensor:
    """How much the logarithm of a sparsity coefficient changes, from the mean L0 one step ago and now.

    ``RATE · clip(log(now / target), -1, 1) + DAMPING · log(now / before)``, at most ``LARGEST_STEP`` in size: a controller
    whose integral part moves the coefficient while L0 is off the target, and whose proportional part takes some of that back
    while L0 approaches it, so that the coefficient does not run away in a long approach. It rests only where L0 is the target.

    >>> steering_step(torch.tensor(50.0), torch.tensor(50.0), 50.0).item()
    0.0
    >>> round(steering_step(torch.tensor(500.0), torch.tensor(500.0), 50.0).item(), 6)
    0.003
    """
    pull = RATE * (now / target).clamp_min(1e-6).log().clamp(-1, 1)
    return (pull + DAMPING * (now / before).clamp(1e-6, 1e6).log()).clamp(-LARGEST_STEP, LARGEST_STEP)


class PenalisedSAE(FlatSAE):
    """An SAE whose latents pay for being active; the coefficient may be steered to where a wanted number of them is.

    Subclasses have the arguments ``<norm>_coefficient`` and ``<norm>_warmup_steps``.

    Args:
        d_in: Width of the activations (linked from the data).
        d_sae: Number of latents.
        target_l0: Latents that should be active for an example, on average; None leaves the coefficient as it is.
        **kwargs: Arguments of :class:`~hedgelab.saes.flat.FlatSAE`.

    Attributes:
        log_factor: Logarithm of what the coefficient is multiplied by, a scalar; None where it is not steered.
        mean_l0: Running mean of L0 over about 20 steps, NaN before the first.
    """

    norm: ClassVar[str]
    log_factor: Tensor | None
    mean_l0: Tensor | None

    def __init__(self, d_in: int, d_sae: int, target_l0: float | None = None, **kwargs: Any) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        if target_l0 is not None and not 0 < target_l0 <= self.d_sae:
            raise UserError(f"model.target_l0: must be above 0 and at most d_sae = {self.d_sae}, got {target_l0}")
        self.target_l0 = target_l0
        self.register_buffer("log_factor", None)
        self.register_buffer("mean_l0", None)

    def start_coefficient(self, given: float | None, default: float = 1.0, is_steered: bool = True) -> float:
        """The coefficient as given; not given, it is an error without a target L0, and else starts at a default."""
        name = f"model.{self.norm}_coefficient"
        if self.target_l0 is None:
            if given is None:
                raise UserError(f"{name}: give it, or the L0 that it should lead to as model.target_l0")
            return positive(name, given, or_zero=True)
        if is_steered:
            self.log_factor = torch.zeros((), dtype=torch.float32)
            self.mean_l0 = torch.full((), torch.nan, dtype=torch.float32)
        return positive(name, default if given is None else given)

    @abstractmethod
    def current_coefficient(self) -> float:
        """The coefficient as of now, before steering."""

    def step_key(self, rows: int) -> tuple[Hashable, ...] | None:
        """The coefficient as of now."""
        key = super().step_key(rows)
        return None if key is None else (*key, self.current_coefficient())

    def factor(self, batch: Batch) -> Tensor | float:
        """What the coefficient is multiplied by as of now; 1 where it is not steered."""
        if self.log_factor is None:
            return 1.0
        if batch.weight is not None:
            reason = "a coefficient is not steered on populations"
            raise UserError(f"model.target_l0: needs data.sampling: samples, {reason}")
        return self.log_factor.exp()

    @torch.no_grad()
    def after_step(self, result: LossTerms) -> None:
        """Move the coefficient by how far the L0 of the global batch is from the target, once no warm-up raises it any more."""
        super().after_step(result)
        if self.target_l0 is None or self.log_factor is None or self.mean_l0 is None:
            return
        if self.steps_done > getattr(self, f"{self.norm}_warmup_steps"):
            l0 = self.ranks.mean(result.codes.active_per_example().to(self.mean_l0).mean())
            before = torch.where(self.mean_l0.isnan(), l0, self.mean_l0)
            now = before.lerp(l0, 1 / AVERAGED_STEPS)
            self.log_factor.add_(steering_step(before, now, self.target_l0))
            self.mean_l0.copy_(now)

    def training_numbers(self) -> dict[str, float]:
        """With a target L0 the coefficient that it has led to."""
        numbers = super().training_numbers()
        if self.log_factor is not None:
            name = f"{self.norm}_coefficient"
            numbers |= {name: getattr(self, name) * float(self.log_factor.exp())}
        return numbers


class VanillaSAE(PenalisedSAE):
    """ReLU latents with an L1 penalty weighted by decoder norms, so that rescaling cannot cheat it (SPEC section 2).

    Args:
        d_in: Width of the activations (linked from the data).
        d_sae: Number of latents.
        l1_coefficient: λ of the penalty ``λ · mean_b Σ_i a_i ‖W_dec[i]‖``; with ``target_l0`` where λ starts, 1 unless given.
        l1_warmup_steps: Steps over which λ rises linearly to its full value.
        l1_warmup_start: λ at the first step of the warm-up.
        target_l0: Steer λ to where this many latents are active for an example, on average (:mod:`hedgelab.saes.steering`).
        **kwargs: Arguments of :class:`~hedgelab.saes.flat.FlatSAE`.
    """

    penalty_name = norm = "l1"
    per_member = ("l1_coefficient",)

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        l1_coefficient: float | None = None,
        l1_warmup_steps: int = 0,
        l1_warmup_start: float = 0.0,
        target_l0: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, target_l0, **kwargs)
        self.l1_coefficient = self.start_coefficient(l1_coefficient)
        self.l1_warmup_steps = whole_number("model.l1_warmup_steps", l1_warmup_steps, 0)
        self.l1_warmup_start = positive("model.l1_warmup_start", l1_warmup_start, or_zero=True)

    def current_coefficient(self) -> float:
        """λ as of now, before steering."""
        return warmed_up(self.l1_coefficient, self.steps_done, self.l1_warmup_steps, self.l1_warmup_start)

    def selection(self) -> ReLU:
        """All latents with a positive pre-activation."""
        return ReLU()

    def penalty(self, codes: Codes, batch: Batch) -> Tensor:
        """``λ · mean_b a_i ‖W_dec[i]‖`` of each latent, ``[d_sae]``."""
        coefficient = self.current_coefficient()
        share = coefficient if batch.weight is not None else coefficient / batch.x.shape[0]
        norms: Tensor = self.decoder().W_dec.norm(dim=1)
        return share * self.factor(batch) * codes.sum_per_latent(batch.weight) * norms


class JumpReLUSAE(PenalisedSAE):
    """Latents that jump at learned thresholds, with an L0 penalty (Rajamanoharan et al. 2024, arXiv 2407.14435; SPEC §2).

    The thresholds θ themselves are trained, at ten times the optimiser's learning rate, and kept at 0 or above. Adam moves a
    parameter by about its learning rate a step, so a logarithm, as in the paper, stays where it starts in all but long runs.

    With ``target_l0`` L0* one of two things leads L0, the mean over the global batch of ``Σ_i 1[pre_i > θ_i]``, to it. With
    ``l0_control: coefficient`` λ is steered (:mod:`hedgelab.saes.steering`). With ``penalty`` the penalty is
    ``λ · (2 / L0*) (L0 - L0*)²`` (Gemma Scope 2, 2025), which ends above L0* by the share ``λ' / 4λ``, where λ' is what λ
    the plain penalty would need. In a matryoshka SAE L0 is that of all latents, and each level pays its latents' part.

    Args:
        d_in: Width of the activations (linked from the data).
        d_sae: Number of latents.
        l0_coefficient: λ of the penalty ``λ · mean_b Σ_i 1[pre_i > θ_i]``. With ``target_l0`` it may be left out: λ then starts
            at 1 where it is steered, and is 30 in the quadratic penalty.
        l0_warmup_steps: Steps over which λ rises linearly to its full value.
        threshold: Threshold of every latent at the start.
        bandwidth: Width ε of the rectangle kernel of the straight-through estimates.
        target_l0: Latents that should be active for an example, on average.
        l0_control: What leads there: the steered ``coefficient``, or the quadratic ``penalty``.
        **kwargs: Arguments of :class:`~hedgelab.saes.flat.FlatSAE`.
    """

    penalty_name = "l0_penalty"
    norm = "l0"
    per_member = ("l0_coefficient",)
    full_precision = ("theta",)
    lr_factors: ClassVar[dict[str, float]] = {"theta": 10.0}

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        l0_coefficient: float | None = None,
        l0_warmup_steps: int = 0,
        threshold: float = 0.01,
        bandwidth: float = 0.05,
        target_l0: float | None = None,
        l0_control: Literal["coefficient", "penalty"] = "coefficient",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, target_l0, **kwargs)
        if l0_control == "penalty" and target_l0 is None:
            raise UserError("model.l0_control: penalty pulls toward model.target_l0, give that too")
        self.l0_control, by_penalty = l0_control, l0_control == "penalty"
        default = PENALTY_START if by_penalty else 1.0
        self.l0_coefficient = self.start_coefficient(l0_coefficient, default, not by_penalty)
        self.l0_warmup_steps = whole_number("model.l0_warmup_steps", l0_warmup_steps, 0)
        self.threshold = positive("model.threshold", threshold)
        self.bandwidth = positive("model.bandwidth", bandwidth)
        self.theta = nn.Parameter(torch.full((d_sae,), float(threshold)))

    def current_coefficient(self) -> float:
        """λ as of now, before steering."""
        return warmed_up(self.l0_coefficient, self.steps_done, self.l0_warmup_steps)

    def thresholds(self) -> Tensor:
        """θ, what pre-activations must exceed, ``[d_sae]``."""
        return self.theta

    def selection(self) -> Threshold:
        """Latents above θ."""
        return Threshold(self.theta.detach())

    def training_selection(self, batch: Batch) -> JumpReLU:
        """The same, with straight-through gradients to θ."""
        return JumpReLU(self.theta, self.bandwidth, batch.weight)

    def penalty(self, codes: Codes, batch: Batch) -> Tensor:
        """``λ · mean_b 1[pre_i > θ_i]`` of each latent, with a straight-through gradient to θ, ``[d_sae]``.

        Of the quadratic penalty, each latent's part by how often it fires.
        """
        assert codes.rates is not None
        coefficient = self.current_coefficient()
        if self.target_l0 is None or self.l0_control == "coefficient":
            return coefficient * self.factor(batch) * codes.rates
        rates = codes.rates.detach()
        l0 = self.ranks.mean(ops.total(rates))
        off, steepness = l0 - self.target_l0, 2 * coefficient / self.target_l0
        value, slope = steepness * off.square(), 2 * steepness * off
        return value / l0.clamp_min(1e-30) * rates + slope * (codes.rates - rates)

    @torch.no_grad()
    def after_step(self, result: LossTerms) -> None:
        """Keep θ at 0 or above, below which negative pre-activations would pass."""
        super().after_step(result)
        self.theta.copy_(self.theta.relu())

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        given = dict(state)
        if (logarithm := given.pop(prefix + "log_threshold", None)) is not None:  # what releases up to 0.2 kept
            given[prefix + "theta"] = logarithm.exp()
        super()._load_from_state_dict(given, prefix, *rest)
