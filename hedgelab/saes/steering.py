"""SAEs whose latents pay for being active, and the controller that finds the price at which as many are as is wanted."""

from abc import abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.errors import UserError, positive
from hedgelab.saes.flat import FlatSAE
from hedgelab.saes.losses import LossTerms

AVERAGED_STEPS = 20  # over which L0 is averaged
RATE = 3e-3  # of the logarithm of the coefficient a step, where L0 is e times the target
DAMPING = 2.0  # of the same, for each change of L0 by a factor of e
LARGEST_STEP = 0.02


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

    Subclasses have the arguments ``<norm>_coefficient`` and ``<norm>_warmup_steps``. ``target_l0`` is the number of latents
    that should be active for an example, on average; None leaves the coefficient as it is.
    """

    norm: ClassVar[str]
    log_factor: Tensor | None  # logarithm of what the coefficient is multiplied by, a scalar; None where it is not steered
    mean_l0: Tensor | None  # running mean of L0 over about 20 steps, NaN before the first

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
            raise UserError("model.target_l0: needs data.sampling: samples, a coefficient is not steered on populations")
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
