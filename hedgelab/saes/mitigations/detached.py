"""Inner levels that feel no gradient from outer ones, except from the outermost."""

from typing import Any

from hedgelab.errors import UserError
from hedgelab.kernels.values import Target
from hedgelab.saes.mitigations.base import Mitigation


class DetachedInnerLevels(Mitigation):
    """Level ℓ's error reaches its own new latents alone, the outermost level's reaches all latents.

    ``L = Σ_(ℓ<L) w_ℓ ‖sg(x_hat_(ℓ-1)) + Δ_ℓ - x‖² + w_L ‖x_hat_L - x‖²``, with ``Δ_ℓ`` what level ℓ adds and ``sg`` stopping
    gradients. Inner latents thus hedge less for the sake of levels between, and still learn to serve the whole SAE, which
    ``detached: true`` forbids them. The sparsity penalty of an inner level covers its own new latents, that of the last covers
    all. From LISTA-Matryoshka (chanind/claude-auto-research-synthsaebench, 2026).
    """

    needs_levels = fixed_shapes = True

    def check(self, sae: Any) -> None:
        """Refuse what detaches in another way."""
        if sae.detached:
            raise UserError("model.detached: detaches all levels already; set it to false, or remove DetachedInnerLevels")
        if sae.credit:
            raise UserError("model.credit: gives levels targets of their own; set it to 0, or remove DetachedInnerLevels")

    def target(self, sae: Any, target: Target) -> Target:
        """The same, detached for all levels but the last."""
        return target._replace(detach="all_but_last")
