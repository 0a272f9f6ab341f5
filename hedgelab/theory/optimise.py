"""The population optimum of any SAE: its own loss on the exact population, brought to convergence by L-BFGS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import minimize
from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.saes.base import SAE
from hedgelab.theory.population import Array

_AFTER_WARMUP = 2**31


class Minimum(NamedTuple):
    """Where :func:`minimise` ended: the training loss, the largest absolute entry of its gradient, and evaluations taken.

    At a kink of the loss the gradient does not vanish.
    """

    loss: float
    gradient: float
    evaluations: int


def minimise(
    sae: SAE, batch: Batch, descent_steps: int = 1000, learning_rate: float = 1e-3, iterations: int = 2000
) -> Minimum:
    """Train an initialised SAE, in place, to a minimum of its loss on one batch: Adam into the basin, then L-BFGS to its floor.

    A loss with several minima keeps the one that its start leads to: Adam's small steps decide which, as in
    training. Work in float64 (``sae.double()``, ``data.dtype: float64``) for results beyond six digits. Penalties count in
    full from the start; dead-latent clocks and thresholds stand still.

    Args:
        sae: The SAE, initialised.
        batch: The population, or any batch.
        descent_steps: Steps of Adam.
        learning_rate: Of Adam.
        iterations: Most iterations of L-BFGS.

    Raises:
        UserError: SAE and batch are of different precision.
    """
    if sae.W_dec.dtype != batch.x.dtype:
        raise UserError(f"data.dtype: the SAE is {sae.W_dec.dtype} but the batch {batch.x.dtype}; make them the same")
    parameters = list(sae.parameters())
    sae.set_steps_done(_AFTER_WARMUP)
    descent = torch.optim.Adam(parameters, lr=learning_rate, fused=True)

    def loss_and_gradient() -> float:
        descent.zero_grad()
        loss = sae.loss(batch).total
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    for _ in range(descent_steps):
        loss_and_gradient()
        descent.step()

    def evaluate(weights: Array) -> tuple[float, Array]:
        _write(parameters, weights)
        loss = loss_and_gradient()
        return loss, _read([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])

    options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 30, "ftol": 0.0, "gtol": 1e-10}
    found = minimize(evaluate, _read(parameters), jac=True, method="L-BFGS-B", options=options)
    _write(parameters, found.x)
    return Minimum(float(found.fun), float(abs(found.jac).max()), descent_steps + int(found.nfev))


def _read(tensors: Sequence[Tensor]) -> Array:
    """All entries in one float64 vector."""
    return torch.cat([tensor.detach().reshape(-1).double().cpu() for tensor in tensors]).numpy()


@torch.no_grad()
def _write(parameters: Sequence[Tensor], weights: Array) -> None:
    """Put the entries of one vector into the parameters, whatever their layout in memory."""
    pieces = torch.split(torch.from_numpy(weights), [parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(piece.view(parameter.shape))
