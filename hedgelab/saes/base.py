"""The interface of every SAE."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import Decoder
from hedgelab.saes.io import CLASSES, class_name, init_arguments, sae_from_checkpoint, save_sae
from hedgelab.saes.losses import LossTerms
from hedgelab.training.sharding import full_tensor
from hedgelab.training.shell import TrainingShell
from hedgelab.training.trainee import OptimizerFactory, SchedulerFactory


class Activation(NamedTuple):
    """Latents of a batch in training, and what the activity of each costs on average, coefficient included, ``[d_sae]``."""

    codes: Codes
    penalty: Tensor | None = None


class SAE(TrainingShell, ABC):
    """A sparse autoencoder: parameters, ``encode``, ``decode`` and ``loss``. The shell that it inherits trains it.

    Attributes:
        W_enc: ``[d_in, d_sae]``.
        b_enc: ``[d_sae]``.
        W_dec: ``[d_sae, d_in]``; row i is the direction of latent i.
        b_dec: ``[d_in]``.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes the schedule, stepped once an optimiser step; None for a constant learning rate.
        gradient_clip_norm: Largest norm of the gradient; None for no clipping.
        steps_done: Optimiser steps taken so far; warm-ups read it.
        ranks: Those over which each batch is split; every rank sees its own part, and the loss is the mean over ranks.
        initialized: Whether the weights come from data or from training already, so that a fit goes on from them.
    """

    d_in: int
    d_sae: int
    optimizer: OptimizerFactory
    lr_scheduler: SchedulerFactory | None
    gradient_clip_norm: float | None
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    not_architecture: ClassVar[frozenset[str]] = frozenset({"init", "optimizer", "lr_scheduler", "gradient_clip_norm"})

    full_precision: ClassVar[tuple[str, ...]] = ()
    """Parameters that stay in at least single precision, as buffers do: their steps are too small for a narrower type."""

    per_member: ClassVar[tuple[str, ...]] = ()
    """Attributes, numbers or lists of them, that enter the loss as factors only: members of an ensemble may differ in them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps_done = 0
        self.initialized = False

    @abstractmethod
    def encode(self, x: Tensor) -> Codes:
        """Latents of activations ``x [..., d_in]``, as used for inference and measuring."""

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Reconstruction ``[..., d_in]`` of latents, or of dense activations ``[..., d_sae]``."""
        given = Codes.from_dense(codes) if isinstance(codes, Tensor) else codes
        return ops.decode(given, Decoder(self.W_dec, self.b_dec))

    @abstractmethod
    def loss(self, batch: Batch | Tensor) -> LossTerms:
        """The training loss of a batch, or of activations ``[..., d_in]``; computing it changes nothing.

        A training loop of one's own is ``terms = sae.loss(x); terms.total.backward(); optimizer.step(); optimizer.zero_grad();
        sae.after_step(terms)``.
        """

    @abstractmethod
    def initialize(self, first: Batch, feature_directions: Tensor | None) -> None:
        """Set what depends on data, once, before the first step: ``b_dec`` and, if asked for, weights at the features."""

    def before_optimizer_step(self) -> None:
        """Adjust gradients before the optimiser uses them; for subclasses."""

    @torch.no_grad()
    def after_step(self, result: LossTerms) -> None:
        """Advance what counts steps (warm-ups, dead-latent clock, thresholds), after the optimiser's step."""
        self.steps_done += 1

    def as_batch(self, given: Batch | Tensor) -> Batch:
        """Activations ``[..., d_in]``, alone or in a batch, as rows, in the type of the weights if theirs is wider."""
        batch = given if isinstance(given, Batch) else Batch(given)
        x = ops.as_rows(batch.x, self.b_dec)
        return batch if x is batch.x else batch._replace(x=x)

    @property
    def dead_latents(self) -> Tensor:
        """Which latents have been silent for longer than the dead-latent window, ``[d_sae]`` bool."""
        return torch.zeros(self.d_sae, dtype=torch.bool, device=self.W_dec.device)

    def set_steps_done(self, steps: int) -> None:
        """Tell the SAE how many optimiser steps it has taken."""
        self.steps_done = steps

    def training_numbers(self) -> dict[str, float]:
        """Numbers besides the loss terms that training reports at every logging interval, by full name."""
        return {}

    def saes(self) -> dict[str, SAE]:
        """Itself, alone."""
        return {"": self}

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct ``x [..., d_in]``."""
        return self.decode(self.encode(x))

    def folded(self) -> FoldedWeights:
        """Detached copies of the weights with decoder norms folded in."""
        return fold(*(full_tensor(value) for value in (self.W_enc, self.b_enc, self.W_dec, self.b_dec)))

    def config(self) -> dict[str, Any]:
        """Class name and architecture arguments as plain JSON values; :func:`hedgelab.saes.load_sae` reads it back.

        By convention every architecture argument of ``__init__`` is kept in an attribute of the same name.
        """
        names = sorted(init_arguments(type(self)).keys() - self.not_architecture)
        if missing := [name for name in names if not hasattr(self, name)]:
            raise UserError(f"{type(self).__name__}: keeps its argument {missing[0]} in no attribute of that name")
        return {"class": class_name(type(self)), **{name: _plain(getattr(self, name)) for name in names}}

    def save(self, folder: str | Path) -> None:
        """Write the SAE into a folder, as :func:`hedgelab.saes.save_sae` does; :func:`hedgelab.saes.load_sae` reads it back."""
        save_sae(self, folder)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        strict: bool | None = None,
        member: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """The SAE of a training checkpoint, of this class or one that inherits from it.

        Besides Lightning's arguments: ``member`` names one of several SAEs that were trained together, and ``kwargs`` are
        arguments of ``__init__`` besides, or instead of, what the checkpoint says.
        """
        sae = sae_from_checkpoint(checkpoint_path, member, cls, strict is not False, kwargs)
        return cast(Self, sae if map_location is None else sae.to(map_location))

    def __repr__(self) -> str:
        shown = {"d_in": self.d_in, "d_sae": self.d_sae}
        for name, parameter in init_arguments(type(self)).items():
            value = getattr(self, name, parameter.default)
            if name not in self.not_architecture and value != parameter.default:
                shown[name] = value
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        CLASSES[class_name(cls)] = cls

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SAE:
        """Move or convert all tensors, but for what accumulates: that never becomes narrower than single precision."""
        own = {**self._buffers, **{name: self._parameters.get(name) for name in self.full_precision}}
        exact = {name: value.detach() for name, value in own.items() if value is not None and value.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            value = getattr(self, name)
            if value.itemsize < 4:
                value.data = before.to(value.device, torch.float32)
        return self


def _plain(value: Any) -> Any:
    """A JSON value for an architecture argument."""
    if isinstance(value, SAE):
        return value.config()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value


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
