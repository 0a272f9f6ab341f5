"""The vanilla SAE: ReLU and an L1 penalty."""

from typing import Any

from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.errors import positive, whole_number
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import ReLU
from hedgelab.saes.flat import FlatSAE
from hedgelab.saes.losses import warmed_up


class VanillaSAE(FlatSAE):
    """ReLU latents with an L1 penalty weighted by decoder norms, so that rescaling cannot cheat it (SPEC section 2).

    Args:
        d_in: Width of the activations (linked from the data).
        d_sae: Number of latents.
        l1_coefficient: λ of the penalty ``λ · mean_b Σ_i a_i ‖W_dec[i]‖``.
        l1_warmup_steps: Steps over which λ rises linearly to its full value.
        l1_warmup_start: λ at the first step of the warm-up.
        **kwargs: Arguments of :class:`~hedgelab.saes.flat.FlatSAE`.
    """

    penalty_name = "l1"
    per_member = ("l1_coefficient",)

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        l1_coefficient: float,
        l1_warmup_steps: int = 0,
        l1_warmup_start: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        self.l1_coefficient = positive("model.l1_coefficient", l1_coefficient, or_zero=True)
        self.l1_warmup_steps = whole_number("model.l1_warmup_steps", l1_warmup_steps, 0)
        self.l1_warmup_start = positive("model.l1_warmup_start", l1_warmup_start, or_zero=True)

    def selection(self) -> ReLU:
        """All latents with a positive pre-activation."""
        return ReLU()

    def penalty(self, codes: Codes, batch: Batch) -> Tensor:
        """``λ · mean_b a_i ‖W_dec[i]‖`` of each latent, ``[d_sae]``."""
        coefficient = warmed_up(self.l1_coefficient, self.steps_done, self.l1_warmup_steps, self.l1_warmup_start)
        share = coefficient if batch.weight is not None else coefficient / batch.x.shape[0]
        norms: Tensor = self.decoder().W_dec.norm(dim=1)
        return share * codes.sum_per_latent(batch.weight) * norms
