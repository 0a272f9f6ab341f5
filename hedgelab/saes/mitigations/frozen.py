"""Weights that stay at their random start, as controls: what does training them add?"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import Decoder, Target
from hedgelab.saes.losses import LossTerms
from hedgelab.saes.mitigations.base import Mitigation
from hedgelab.training.sharding import is_split


class FrozenDecoder(Mitigation):
    """Keep decoder rows at their random start, or near it: the controls of Korznikov et al. (2026, arXiv 2602.14111).

    A measure on which a frozen decoder scores as well as a trained one says little about the directions that were learned.

    Args:
        minimum_cosine: Null: rows do not move. Else (the paper: .8) the *soft-frozen* control: they train, and after each step
            a row whose cosine with its start is smaller is turned to the nearest direction that has it; its norm stays.
    """

    splits = fixed_shapes = True
    start: Tensor | None  # soft-frozen: where each row started, [d_sae, d_in]; zero before the first step

    def __init__(self, minimum_cosine: float | None = None) -> None:
        super().__init__()
        if minimum_cosine is not None and not 0 < minimum_cosine < 1:
            raise UserError(f"model.mitigations.minimum_cosine: must lie between 0 and 1, or be null, got {minimum_cosine}")
        self.minimum_cosine = minimum_cosine
        self.control = "frozen decoder" if minimum_cosine is None else "soft-frozen decoder"
        self.register_buffer("start", None)

    def check(self, sae: Any) -> None:
        """Freeze the rows, or make room for their start."""
        if self.minimum_cosine is None:
            sae.W_dec.requires_grad_(False)
        else:
            self.start = torch.zeros_like(sae.W_dec, requires_grad=False)

    @torch.no_grad()
    def terms(self, sae: Any, codes: Codes, decoder: Decoder, target: Target, errors: Iterable[Tensor]) -> dict[str, Tensor]:
        """No terms; rows without a start (all before the first step, new ones after widening) take the present direction."""
        if self.start is not None:
            if is_split(sae.W_dec):
                raise UserError("model.mitigations: FrozenDecoder's minimum_cosine cannot be used where latents are split")
            missing = ~self.start.any(1, keepdim=True)
            self.start.copy_(torch.where(missing, normalize(sae.W_dec, dim=1, eps=1e-30), self.start))
        return {}

    @torch.no_grad()
    def after_step(self, sae: Any, result: LossTerms) -> None:
        """Turn rows back into the cone about their start."""
        if self.start is not None and self.minimum_cosine is not None:
            sae.W_dec.copy_(turned_back(sae.W_dec, self.start, self.minimum_cosine))


class FrozenEncoder(Mitigation):
    """Keep encoder directions at their random start; biases and decoder train (Korznikov et al. 2026, arXiv 2602.14111)."""

    fixed_shapes = True
    control = "frozen encoder"

    def check(self, sae: Any) -> None:
        """Freeze them."""
        getattr(sae, "inner", sae).W_enc_rows.requires_grad_(False)


def turned_back(rows: Tensor, start: Tensor, minimum_cosine: float) -> Tensor:
    """Rows ``[n, d]``, those outside the cone about their unit ``start`` turned to its nearest direction; norms stay.

    A row that points away from its start, to rounding, goes back to it.

    >>> turned_back(torch.tensor([[0.0, 2.0], [1.0, 0.1]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 0.8)
    tensor([[1.6000, 1.2000],
            [1.0000, 0.1000]])
    """
    norms = rows.norm(dim=1, keepdim=True)
    along = (rows * start).sum(1, keepdim=True)
    aside = rows - along * start
    aside = aside / aside.norm(dim=1, keepdim=True).maximum(1e-6 * norms)
    edge = normalize(minimum_cosine * start + (1 - minimum_cosine**2) ** 0.5 * aside, dim=1, eps=1e-30)
    return torch.where(along < minimum_cosine * norms, norms * edge, rows)
