"""The JumpReLU SAE: a learned threshold for every latent."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hedgelab.batch import Batch
from hedgelab.errors import UserError, positive, whole_number
from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import JumpReLU, Threshold
from hedgelab.saes.losses import LossTerms, warmed_up
from hedgelab.saes.steering import PenalisedSAE

PENALTY_START = 30.0  # the quadratic penalty is to outweigh what λ = 1 is for the plain one


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
        self.l0_control = l0_control
        by_penalty = l0_control == "penalty"
        self.l0_coefficient = self.start_coefficient(l0_coefficient, PENALTY_START if by_penalty else 1.0, not by_penalty)
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
