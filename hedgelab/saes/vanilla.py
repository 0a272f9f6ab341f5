"""The vanilla SAE: ReLU and an L1 penalty."""

from typing import Any

from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.errors import positive, whole_number
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import ReLU
from hedgelab.saes.losses import warmed_up
from hedgelab.saes.steering import PenalisedSAE


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
