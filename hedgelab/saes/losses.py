"""What a training step computes: the named terms of a loss, and small helpers of theirs."""

from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes


@dataclass(frozen=True)
class LossTerms:
    """The named terms of one batch's loss, and what they were computed from."""

    terms: dict[str, Tensor]  # scalars that carry their coefficients
    codes: Codes  # the selected latents
    error: Tensor  # x_hat - x of the whole SAE, detached, [batch, d_in]

    @cached_property
    def total(self) -> Tensor:
        """The loss: the sum of all terms."""
        return reduce(add, self.terms.values())


def warmed_up(coefficient: float, step: int, warmup_steps: int, start: float = 0.0) -> float:
    """A coefficient that rises linearly from ``start`` to its full value over ``warmup_steps`` steps.

    >>> [warmed_up(2.0, step, 4) for step in (0, 2, 4, 9)]
    [0.0, 1.0, 2.0, 2.0]
    """
    return coefficient if step >= warmup_steps else start + (coefficient - start) * step / warmup_steps


THRESHOLD_RATE = 0.01


def followed(threshold: Tensor, smallest: Tensor) -> Tensor:
    """An inference threshold moved toward the smallest kept activation of a batch; from NaN it jumps there.

    Where a batch kept nothing (``smallest`` is infinite) it stays.
    """
    moved = torch.where(threshold.isnan(), smallest, threshold.lerp(smallest, THRESHOLD_RATE))
    return torch.where(smallest.isinf(), threshold, moved)


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least summed distance to the rows of ``x [batch, d_in]`` (Weiszfeld's iteration), ``[d_in]``."""
    points = x.double()
    median = points.mean(0)
    for _ in range(iterations):
        inverse = 1 / torch.linalg.vector_norm(points - median, dim=1).clamp_min(1e-12)
        previous, median = median, inverse @ points / inverse.sum()
        if torch.linalg.vector_norm(median - previous) <= tolerance * torch.linalg.vector_norm(median):
            break
    return median.to(x.dtype)
