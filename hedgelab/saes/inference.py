"""SAEs for inference and measuring: of activations that are normalised one by one, and transcoders."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, Self

import torch
from torch import Tensor, nn

from hedgelab.errors import UserError, whole_number
from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import Encoder, Threshold, TopK
from hedgelab.saes.base import SAE


@dataclass(frozen=True, kw_only=True)
class NormalisedCodes(Codes):
    """Codes of activations that were normalised one by one, and what undoes that: ``x = gain · normalised + shift``."""

    undo: Tensor  # gain and shift of each activation, [batch, 2]

    def part(self, rows: slice, stored: slice | None = None) -> Self:
        """Codes of consecutive examples."""
        return replace(super().part(rows, stored), undo=self.undo[rows])

    def to(self, device: torch.device | str) -> Self:
        """The same codes on another device."""
        return replace(super().to(device), undo=self.undo.to(device))

    def on_raw(self) -> Codes:
        """Codes times gain."""
        gain = self.undo[:, :1] if self.layout is None else self.undo[self.layout.rows, 0]
        return Codes(self.values * gain, self.layout, leading=self.leading)


class InferenceSAE(SAE):
    """An SAE that is measured and not trained, as some of other libraries are; with ``d_out`` a transcoder.

    ``a = select((n(x) - b_dec) W_enc + b_enc)``, ``x_hat = gain · (a W_dec + b_dec) + shift``, n, gain, shift as in SAELens::

        none:                   n(x) = x                         gain = 1             shift = 0
        layer_norm:             n(x) = (x - shift) / (gain + ε)  gain = std(x)        shift = mean(x)
        constant_norm_rescale:  n(x) = x / gain                  gain = ‖x‖ / √d_in   shift = 0

    ``select`` keeps pre-activations above ``threshold [d_sae]``, or the k largest. A transcoder reads one hook and writes what
    another gives, ``[..., d_out]``: it subtracts no ``b_dec``, undoes nothing, and ``forward`` adds the skip ``x W_skipᵀ``.

    >>> sae = InferenceSAE(2, 1, normalize_activations="layer_norm")
    >>> sae(torch.tensor([[1.0, 5.0], [2.0, 2.0]])).tolist()  # of weights that are all 0: mean(x)
    [[3.0, 3.0], [2.0, 2.0]]

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents.
        normalize_activations: How each activation is normalised by itself.
        k: Latents kept for each example; null keeps all above their thresholds.
        signed: Whether the k are those of largest size, with their sign (AbsTopK).
        d_out: Width of what a transcoder writes; null for an SAE.
        skip: Whether a transcoder has a skip connection ``W_skip [d_out, d_in]``.
        hook_out: Name of the hook that a transcoder writes.
    """

    trainable = False
    threshold: Tensor
    W_skip: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        normalize_activations: Literal["none", "layer_norm", "constant_norm_rescale"] = "none",
        k: int | None = None,
        signed: bool = False,
        d_out: int | None = None,
        skip: bool = False,
        hook_out: str | None = None,
    ) -> None:
        super().__init__()
        self.d_in, self.d_sae = whole_number("model.d_in", d_in), whole_number("model.d_sae", d_sae)
        self.normalize_activations, self.signed = normalize_activations, signed
        self.skip, self.hook_out = skip, hook_out
        self.k = None if k is None else whole_number("model.k", k)
        if k is not None and k > d_sae:
            raise UserError(f"model.k: must lie between 1 and d_sae = {d_sae}, got {k}")
        self.d_out, self.reconstructs = d_out, d_out is None
        width = d_in if d_out is None else whole_number("model.d_out", d_out)
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, width)}
        shapes |= {"b_dec": (width,), "threshold": (d_sae,)} | ({"W_skip": (width, d_in)} if skip else {})
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def encode(self, x: Tensor) -> Codes:
        """Latents of activations ``x [..., d_in]``; they know how to undo a normalisation."""
        encoder = Encoder(self.W_enc, self.b_enc, self.b_dec if self.reconstructs else self.W_enc.new_zeros(self.d_in))
        selection = Threshold(self.threshold) if self.k is None else TopK(self.k, signed=self.signed)
        x = x if self.normalize_activations == "none" else x.to(self.W_enc.dtype)
        if self.normalize_activations == "layer_norm":
            gain, shift = x.std(-1, keepdim=True), x.mean(-1, keepdim=True)
            x = (x - shift) / (gain + 1e-5)
        elif self.normalize_activations == "constant_norm_rescale":
            gain = x.norm(dim=-1, keepdim=True).clamp_min(1e-30) / self.d_in**0.5
            x, shift = x / gain, torch.zeros_like(gain)
        codes = ops.encode(x, encoder, selection)
        if self.normalize_activations == "none" or not self.reconstructs:
            return codes
        undo = torch.cat([gain, shift], -1).view(-1, 2)
        return NormalisedCodes(codes.values, codes.layout, leading=codes.leading, undo=undo)

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Reconstruction ``[..., d_in]``, where activations were normalised of what :meth:`encode` gave alone."""
        x_hat = super().decode(codes)
        if self.normalize_activations == "none" or not self.reconstructs:
            return x_hat
        if not isinstance(codes, NormalisedCodes):
            raise UserError(f"decode: only the codes of encode know what {self.normalize_activations} did to x; give those")
        gain, shift = codes.undo.view(*codes.examples, 1, 2).unbind(-1)
        return gain * x_hat + shift

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct ``x [..., d_in]``; a transcoder gives what it writes, ``[..., d_out]``, with the skip."""
        x_hat = super().forward(x)
        return x_hat + x.to(x_hat) @ self.W_skip.T if self.skip else x_hat

    def loss(self, *_: Any) -> NoReturn:
        """Refused."""
        raise UserError(f"{type(self).__name__}: is for inference and measuring, and cannot be trained")

    initialize = loss  # type: ignore[assignment]
    optimizer = property(loss)  # what a trainer asks for first
