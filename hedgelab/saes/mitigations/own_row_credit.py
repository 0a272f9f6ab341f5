r"""Own-row credit: off its own direction, a decoder row learns from the error of the whole SAE.

*What hedging is in a decoder row.* Level ℓ reconstructs ``x̂_ℓ`` from its first m_ℓ latents, with error ``e_ℓ = x̂_ℓ - x``. Row
i of the decoder gets the gradient ``Σ_ℓ w_ℓ A_iᵀ e_ℓ`` (times 2 / batch) over the levels that contain latent i, where ``A_i``
are the latent's activations over the batch. An inner level's error contains every feature whose latent lies further out; the
part of it that goes with ``A_i``, ``A_iᵀ e_ℓ``, is what row i takes up of such features when they are correlated with its own:
hedging. The error of the whole SAE, ``e_L``, contains only what no latent explains.

*Along and off.* Split the row's gradient with ``P_i = d̂_i d̂_iᵀ``, where ``d̂_i`` is the row's own direction. Along it, the row
must scale as its level needs: ``e_ℓ``. Off it, what outer latents explain is not its to learn: ``e_L``. With a share s of it,

    A_iᵀ (P_i e_ℓ + (1 - P_i) ((1 - s) e_ℓ + s e_L))  =  A_iᵀ e_ℓ + s (1 - P_i) A_iᵀ (x̂_L - x̂_ℓ),

since ``e_L - e_ℓ = x̂_L - x̂_ℓ``. So the term's gradient is ``s (1 - P_i) Σ_ℓ w_ℓ A_iᵀ (e_L - e_ℓ)`` over inner levels that
contain the latent, and its value is 0. The encoder, the biases and the values of latents keep the plain gradient.

*Why it is no descent of a loss, and where it rests.* The correction is no gradient of any function of the decoder alone. At
rest, off its own direction every row is uncorrelated with the *whole* SAE's error, as in an SAE without levels; its length is
as its levels need. :attr:`MatryoshkaSAE.credit` projects off the span of all the level's rows instead, which leaves nothing
where a level has ``d_in`` latents or more and takes a QR decomposition a step; here each row has a span of its own.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.errors import UserError, whole_number
from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.reference import tilted
from hedgelab.kernels.sparse import level_upstream
from hedgelab.kernels.values import Decoder, Target
from hedgelab.saes.mitigations.base import Mitigation
from hedgelab.training.sharding import is_split


class OwnRowCredit(Mitigation):
    """Decoder rows of inner levels learn from the whole SAE's error off their own direction; derived in this module.

    Any width and level weights do; where inner levels are detached, a row gets the credit of its own level alone.

    Args:
        share: Share of the whole SAE's error, 0 (plain matryoshka) to 1.
        start: Step from which it counts. From random starts, levels find general features first without it.
    """

    needs_levels = splits = True

    def __init__(self, share: float = 1.0, start: int = 0) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise UserError(f"model.mitigations.share: must lie between 0 and 1, got {share}")
        self.share = float(share)
        self.start = whole_number("model.mitigations.start", start, 0)

    def check(self, sae: Any) -> None:
        """Refuse credit off the span of whole levels beside it: their errors are not those that this works with."""
        if sae.credit:
            raise UserError("model.credit: cannot be used together with OwnRowCredit; set it to 0")

    def terms(self, sae: Any, codes: Codes, decoder: Decoder, target: Target, errors: Iterable[Tensor]) -> dict[str, Tensor]:
        """A term of value 0 whose gradient to ``W_dec`` is the credit."""
        *inner, last = errors
        if sae.steps_done < self.start or not inner:
            return {}
        size = target.levels[-2]

        def inner_rows(rows: Tensor) -> Tensor:
            """Rows of latents of inner levels; where latents are split, all of this process's: the others' gradient is 0."""
            return rows.to_local() if is_split(rows) else rows[:size]  # type: ignore[attr-defined]

        rows = inner_rows(decoder.W_dec)
        with torch.no_grad():
            weights = [torch.as_tensor(w, dtype=last.dtype, device=last.device) for w in sae.current_weights()[:-1]]
            examples = target.weight
            if target.tilt:
                examples = tilted(torch.stack([error.square().sum(1) for error in (*inner, last)]), target)[:-1]
            spared = torch.stack([last - error for error in inner])
            upstream = level_upstream(torch.stack(weights), spared, examples, bool(target.detach))
            gradient = inner_rows(ops.decoder_gradient(codes, upstream, target.levels[:-1])).to(rows)
            own = normalize(rows, dim=1, eps=1e-30)
            credit = self.share * (gradient - (gradient * own).sum(1, keepdim=True) * own)
        return {"own_row_credit": ((rows - rows.detach()) * credit).sum()}
