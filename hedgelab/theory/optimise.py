"""The population optimum of any SAE: its own loss on the exact population, brought to convergence by L-BFGS."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from scipy.optimize import minimize
from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.saes.base import SAE
from hedgelab.theory.single_latent import Array


class Minimum(NamedTuple):
    """Where :func:`minimise` ended; at a kink of the loss the gradient does not vanish."""

    loss: float  # the training loss
    gradient: float  # largest absolute entry of its gradient
    evaluations: int


def minimise(sae: SAE, batch: Batch, descent_steps: int = 1000, learning_rate: float = 1e-3, iterations: int = 2000) -> Minimum:
    """Train an initialised SAE, in place, to a minimum of its loss on one batch: Adam into the basin, then L-BFGS to its floor.

    A loss with several minima keeps the one that its start leads to: Adam's small steps decide which, as in
    training. Work in float64 (``sae.double()``, ``data.dtype: float64``) for results beyond six digits. Penalties count in
    full from the start; dead-latent clocks and thresholds stand still. L-BFGS takes at most so many ``iterations``.
    """
    if sae.W_dec.dtype != batch.x.dtype:
        raise UserError(f"data.dtype: the SAE is {sae.W_dec.dtype} but the batch {batch.x.dtype}; make them the same")
    parameters = list(sae.parameters())
    sae.steps_done = 2**31  # after any warm-up
    descent = torch.optim.Adam(parameters, lr=learning_rate, fused=True)

    def loss_and_gradient() -> float:
        descent.zero_grad()
        loss = sae.loss(batch).total
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def flat(tensors: Iterable[Tensor]) -> Array:
        return torch.cat([tensor.detach().reshape(-1).double().cpu() for tensor in tensors]).numpy()

    def evaluate(weights: Array) -> tuple[float, Array]:
        pieces = torch.split(torch.from_numpy(weights), [parameter.numel() for parameter in parameters])
        with torch.no_grad():
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.copy_(piece.view(parameter.shape))
        loss = loss_and_gradient()
        return loss, flat(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)

    for _ in range(descent_steps):
        loss_and_gradient()
        descent.step()
    options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 30, "ftol": 0.0, "gtol": 1e-10}
    found = minimize(evaluate, flat(parameters), jac=True, method="L-BFGS-B", options=options)
    evaluate(found.x)
    return Minimum(float(found.fun), float(abs(found.jac).max()), descent_steps + int(found.nfev))
