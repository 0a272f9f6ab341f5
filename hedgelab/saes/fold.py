"""Folding decoder norms: every decoder comparison is made between folded weights."""

from typing import NamedTuple

from torch import Tensor


class FoldedWeights(NamedTuple):
    """Weights of an SAE whose decoder rows have norm 1 (a zero row stays zero), and the norms before folding, ``[d_sae]``."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    norms: Tensor


def fold(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> FoldedWeights:
    """Move the decoder norms into the encoder (SPEC section 2); returns detached copies.

    A ReLU or JumpReLU SAE computes the same function folded (a JumpReLU threshold is multiplied by the norm as well). TopK
    without norm-aware selection does not, so copies are folded for measuring, never the weights in training.
    """
    norms = W_dec.detach().norm(dim=1)
    return FoldedWeights(
        W_enc.detach() * norms,
        b_enc.detach() * norms,
        W_dec.detach() / norms.clamp_min(1e-30)[:, None],
        b_dec.detach().clone(),
        norms,
    )
