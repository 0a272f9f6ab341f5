"""A loss that weighs examples by how badly they are reconstructed."""

from typing import Any

from hedgelab.errors import positive
from hedgelab.kernels.values import Target
from hedgelab.saes.mitigations.base import Mitigation


class TiltedLoss(Mitigation):
    """``Σ_b softmax_b(t L_b / mean L) L_b`` in place of ``mean_b L_b``, for each level; the weights have no gradient.

    ``L_b`` is the squared error of example b, over the global batch. Tilted empirical risk minimisation (Li et al. 2021, arXiv
    2007.01162); for SAEs in LISTA-Matryoshka (chanind/claude-auto-research-synthsaebench, 2026).

    Args:
        tilt: t, from 0 (plain mean) up; the larger, the more the worst examples count.
    """

    fixed_shapes = True

    def __init__(self, tilt: float = 2e-3) -> None:
        super().__init__()
        self.tilt = positive("model.mitigations.tilt", tilt, or_zero=True)

    def target(self, sae: Any, target: Target) -> Target:
        """The same, tilted."""
        return target._replace(tilt=self.tilt, ranks=sae.ranks)
