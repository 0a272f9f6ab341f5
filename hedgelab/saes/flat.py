"""What all SAEs with one level share: their weights, and a loss of one reconstruction."""

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from hedgelab.batch import Batch
from hedgelab.errors import UserError, positive, whole_number
from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import Decoder, Encoder, Selection, Target
from hedgelab.saes.base import SAE, Activation
from hedgelab.saes.initialization import Initialization
from hedgelab.saes.io import load_sae
from hedgelab.saes.losses import LossTerms
from hedgelab.saes.mitigations.base import Mitigation, Mitigations
from hedgelab.training.trainee import OptimizerFactory, SchedulerFactory


class FlatSAE(SAE):
    """An SAE whose latents all reconstruct together; subclasses say how latents activate and what activity costs.

    Args:
        d_in: Width of the activations (linked from the data).
        d_sae: Number of latents.
        init: How the weights start.
        normalize_decoder: Keep decoder rows at norm 1 (project after each step, drop gradients along the rows).
        optimizer: Optimiser class and arguments; fused unless told otherwise.
        lr_scheduler: Learning-rate schedule, stepped every optimiser step; null for a constant rate.
        gradient_clip_norm: Largest norm of the gradient; null for no clipping.
        mitigations: What changes training against hedging and absorption (:mod:`hedgelab.saes.mitigations`).
    """

    penalty_name = "penalty"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        init: Initialization = Initialization(),  # noqa: B008 (frozen)
        normalize_decoder: bool = False,
        optimizer: OptimizerFactory = lambda params: Adam(params, lr=3e-4),
        lr_scheduler: SchedulerFactory | None = None,
        gradient_clip_norm: float | None = None,
        mitigations: list[Mitigation] | None = None,
    ) -> None:
        super().__init__()
        self.d_in = d_in = whole_number("model.d_in", d_in)
        self.d_sae = d_sae = whole_number("model.d_sae", d_sae)
        self.init, self.normalize_decoder = init, normalize_decoder
        if getattr(optimizer, "__qualname__", "") == "FlatSAE.<lambda>":  # the default, as what can be pickled
            optimizer = partial(Adam, lr=3e-4)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        if gradient_clip_norm is not None:
            positive("model.gradient_clip_norm", gradient_clip_norm)
        self.gradient_clip_norm = gradient_clip_norm
        encoder, decoder = init.random_weights(d_in, d_sae)
        self.W_enc_rows = nn.Parameter(encoder)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(decoder)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.mitigations = Mitigations(mitigations)
        self.mitigations.check(self)

    @property
    def W_enc(self) -> Tensor:
        """Encoder weights, ``[d_in, d_sae]``: the transpose of the parameter ``W_enc_rows``, on the same memory.

        Sparse gradients come latent by latent, and fused optimisers want contiguous parameters. ``state_dict`` and files hold
        ``W_enc``; ``W_enc.grad`` is the transpose of ``W_enc_rows.grad``.
        """
        rows = self.W_enc_rows
        encoder = rows.t()
        if isinstance(rows, nn.Parameter) and rows.grad is not None:
            encoder.grad = rows.grad.t()
        return encoder

    @W_enc.setter
    def W_enc(self, value: Tensor) -> None:
        """Take other values, as ``sae.W_enc += update`` does under ``torch.no_grad()``."""
        with torch.no_grad():
            self.W_enc_rows.copy_(value.t())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "W_enc"] = destination.pop(prefix + "W_enc_rows").t()

    def _load_from_state_dict(
        self, state: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        given = dict(state)
        if (encoder := given.pop(prefix + "W_enc", None)) is not None:
            given[prefix + "W_enc_rows"] = encoder.mT if encoder.dim() == 2 else encoder
        super()._load_from_state_dict(given, prefix, metadata, strict, missing, *rest)
        missing[:] = [name.replace("W_enc_rows", "W_enc") for name in missing]

    def selection(self) -> Selection:
        """How latents are selected in inference; subclasses say it, or else define ``encode`` and ``activate``."""
        raise NotImplementedError(f"{type(self).__name__}: define selection(), or encode() and activate()")

    def training_selection(self, batch: Batch) -> Selection:
        """How latents of a batch are selected in training."""
        return self.selection()

    def penalty(self, codes: Codes, batch: Batch) -> Tensor | None:
        """Sparsity cost of each latent, mean over the batch, coefficient included, ``[d_sae]``; None without one."""
        return None

    def encoder(self) -> Encoder:
        """The encoder's weights."""
        return Encoder(self.W_enc, self.b_enc, self.b_dec)

    def encode(self, x: Tensor) -> Codes:
        """Latents of activations ``x [..., d_in]``, as used for inference and measuring."""
        return ops.encode(self.mitigations.encoded(self, x, self.selection), self.encoder(), self.selection())

    def activate(self, batch: Batch) -> Activation:
        """Latents as training sees them, with the cost of their activity."""
        encoded = self.mitigations.encoded(self, batch.x, lambda: self.training_selection(batch))
        codes = ops.encode(encoded, self.encoder(), self.training_selection(batch))
        return Activation(codes, self.penalty(codes, batch))

    def auxiliary_loss(self, batch: Batch, error: Tensor, among: slice | Tensor | None = None) -> Tensor | None:
        """What revives dead latents (``among`` the given ones) from ``error = x_hat - x``; None if there is nothing to do."""
        return None

    def decoder(self) -> Decoder:
        """The decoder's weights for a loss; with ``normalize_decoder`` a row's gradient has no part along the row."""
        if not (self.normalize_decoder and torch.is_grad_enabled() and self.W_dec.requires_grad):
            return Decoder(self.W_dec, self.b_dec)
        rows, unit = self.W_dec.view_as(self.W_dec), self.W_dec.detach()
        rows.register_hook(lambda grad: grad.addcmul((grad * unit).sum(1, keepdim=True), unit, value=-1))  # type: ignore[no-untyped-call]
        return Decoder(rows, self.b_dec)

    def loss(self, batch: Batch | Tensor) -> LossTerms:
        """``mean_b ‖x_hat_b - x_b‖² + Σ_i penalty_i + auxiliary`` (SPEC section 2), the mean weighted in population mode.

        Mitigations may change it, and add terms.
        """
        batch = self.as_batch(batch)
        codes, penalty = self.activate(batch)
        target = Target(batch.x, (self.d_sae,), weight=batch.weight)
        prepared = self.mitigations.prepared(self, codes, self.decoder(), target)
        (mse,), (error,) = ops.level_errors(*prepared)
        terms = {"mse": mse, **self.mitigations.terms(self, *prepared, (error,))}
        if penalty is not None:
            terms[self.penalty_name] = ops.total(penalty)
        if (auxiliary := self.auxiliary_loss(batch, error)) is not None:
            terms["auxiliary"] = auxiliary
        return LossTerms(terms, codes, error)

    @torch.no_grad()
    def initialize(self, first: Batch, feature_directions: Tensor | None) -> None:
        """Set ``b_dec`` from the first batch, and weights at the known features if the config asks for it.

        Or take all weights from an SAE on disk, and thresholds, dead-latent clocks and mitigations' counts that both have.
        """
        if (folder := self.init.weights) is not None:
            other = load_sae(folder)
            if not other.trainable:
                raise UserError(f"model.init.weights: {folder}: {type(other).__name__} cannot be trained on")
            if (other.d_in, other.d_sae) != (self.d_in, self.d_sae):
                widths = f"d_in {other.d_in} and d_sae {other.d_sae}"
                raise UserError(f"model.init.weights: {folder} has {widths}, the config {self.d_in} and {self.d_sae}")
            given = {name.removeprefix("inner."): value for name, value in other.state_dict().items()}
            for name, value in self.state_dict().items():
                if name in given and not name.startswith("mitigations."):
                    value.copy_(given[name])
            self.mitigations.take_over(getattr(getattr(other, "inner", other), "mitigations", Mitigations()))
            return
        if self.init.at_features:
            if feature_directions is None:
                raise UserError("model.init.at_features: needs data with known features; these activations have none")
            encoder, decoder = self.init.feature_weights(feature_directions, self.d_sae)
            self.W_enc_rows[: len(encoder)] = encoder.to(self.W_enc_rows)
            self.W_dec[: len(decoder)] = decoder.to(self.W_dec)
        if self.normalize_decoder:
            self._project_decoder()
        self.b_dec.copy_(self.init.decoder_bias(first.x))

    @torch.no_grad()
    def after_step(self, result: LossTerms) -> None:
        """With ``normalize_decoder``, bring decoder rows back to norm 1."""
        super().after_step(result)
        if self.normalize_decoder:
            self._project_decoder()
        self.mitigations.after_step(self, result)

    def step_key(self, rows: int) -> tuple[Hashable, ...] | None:
        """Nothing of its own; None where a mitigation's work changes from step to step."""
        return () if all(one.fixed_shapes for one in self.mitigations.all()) else None

    def training_numbers(self) -> dict[str, float]:
        """Those of the mitigations."""
        return self.mitigations.numbers()

    def _project_decoder(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-30))
