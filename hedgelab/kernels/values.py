"""What the kernels take: an encoder, a way to select its latents, a decoder, and what it should reconstruct."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hedgelab.kernels.ranks import ALONE, Ranks, Share


def computed_in(weight: Tensor) -> torch.dtype:
    """What products with a weight are computed in: autocast's type where it is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class Encoder(NamedTuple):
    """Makes pre-activations ``pre = (x - b_dec) W_enc + b_enc``, ``[batch, d_sae]`` (SPEC section 2).

    TopK and BatchTopK rank them times ``scale [d_sae]``. Weights of some latents only have the ``share`` that they make.
    """

    W_enc: Tensor  # [d_in, d_sae]
    b_enc: Tensor
    b_dec: Tensor
    scale: Tensor | None = None
    share: Share | None = None

    @property
    def d_sae(self) -> int:
        """Latents of the whole SAE, of which the weights may be a part."""
        return self.W_enc.shape[1] if self.share is None else self.share.d_sae

    def share_of(self, rows: int, ranks: Ranks = ALONE) -> Share:
        """The part of the global batch's pre-activations that these weights make of ``rows`` rows on each of some ranks."""
        return self.share or Share(ranks, rows * ranks.size, self.d_sae, first_row=rows * ranks.rank)

    def columns(self, latents: Tensor) -> "Encoder":
        """The encoder of some latents alone, in their order."""
        return Encoder(self.W_enc.t().index_select(0, latents).t(), self.b_enc.index_select(0, latents), self.b_dec)


class ReLU(NamedTuple):
    """``a = relu(pre)``."""


class Threshold(NamedTuple):
    """``a = pre · 1[pre > threshold]``; the threshold (a scalar or ``[d_sae]``) gets no gradient."""

    threshold: Tensor


class TopK(NamedTuple):
    """``a = relu(pre)`` of the k largest of each example; with ``among [n]`` of those latents only, whatever the scale.

    ``signed``: ``a = pre`` of the k of largest ``|pre|`` (AbsTopK, arXiv 2510.00404).
    """

    k: int
    among: Tensor | None = None
    signed: bool = False

    def ranked(self, pre: Tensor) -> Tensor:
        """What is largest where pre-activations (times a scale) are to be kept."""
        return pre.abs() if self.signed else pre

    def activations(self, pre: Tensor) -> Tensor:
        """Of the pre-activations that are kept."""
        return pre if self.signed else pre.relu()


class BatchTopK(NamedTuple):
    """``a = relu(pre)`` of the k · batch largest of the batch, rounded where k is a fraction.

    With ``weight [batch]`` (population mode) entries are kept, largest first, until their weight reaches k. The batch is that
    of all ``ranks``, activations and codes are this rank's part.
    """

    k: float
    weight: Tensor | None = None
    ranks: Ranks = ALONE


class JumpReLU(NamedTuple):
    """``a = pre · 1[pre > θ]`` with ``θ = threshold``, and how often each latent fires (:attr:`Codes.rates`).

    Both have straight-through gradients to ``threshold [d_sae]`` with a rectangle kernel of the given bandwidth
    (Rajamanoharan et al. 2024, section 3). ``weight [batch]``: probabilities of the examples.
    """

    threshold: Tensor
    bandwidth: float
    weight: Tensor | None = None


Selection = ReLU | Threshold | TopK | BatchTopK | JumpReLU


def floor_of(selection: Selection) -> Tensor | float:
    """What pre-activations exceed to be stored where no k bounds them; JumpReLU stores what has a gradient to θ as well."""
    if isinstance(selection, JumpReLU):
        return selection.threshold - selection.bandwidth / 2
    return selection.threshold if isinstance(selection, Threshold) else 0.0


class Decoder(NamedTuple):
    """Makes reconstructions ``x_hat = a W_dec + b_dec``, ``[batch, d_in]``, of ``W_dec [d_sae, d_in]`` and ``b_dec [d_in]``."""

    W_dec: Tensor
    b_dec: Tensor


class Target(NamedTuple):
    """What nested prefixes of the latents should reconstruct (SPEC section 3).

    Level ℓ reconstructs ``x_hat_ℓ = a[:, :m_ℓ] W_dec[:m_ℓ] + b_dec``; its loss is ``‖x_hat_ℓ - x‖²``, summed over ``d_in`` and
    averaged over the batch, or over ``weight [batch]``. With ``detach`` inner levels feel no gradient from outer ones, and
    ``b_dec`` learns from the innermost alone; with ``"all_but_last"`` the last level is the exception: its loss reaches all
    latents and ``b_dec`` (as in LISTA-Matryoshka, chanind/claude-auto-research-synthsaebench, 2026).

    With ``tilt`` t examples of a large loss ``L_b = ‖x_hat_b - x_b‖²`` count for more: each level's loss is ``Σ_b w_b L_b``,
    ``w_b ∝ p_b exp(t L_b / Σ p L)``, where p is the weight, or equal; w weighs as much as p in all and has no gradient (tilted
    empirical risk, Li et al. 2021, arXiv 2007.01162). The batch is that of all ``ranks``, over which the loss is a mean.
    """

    x: Tensor
    levels: Sequence[int]  # the sizes m_ℓ, rising; one of all latents is an ordinary SAE
    detach: bool | Literal["all_but_last"] = False
    weight: Tensor | None = None
    tilt: float = 0.0
    ranks: Ranks = ALONE


Errors = tuple[Sequence[Tensor], Sequence[Tensor]]
"""The squared error of each level's reconstruction, with a gradient; and ``x_hat - x`` of each, without one."""
