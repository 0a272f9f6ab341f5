"""The interface of every SAE; its weights as safetensors and its architecture as JSON, of which loading executes nothing."""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hedgelab.batch import Batch
from hedgelab.errors import UserError, one_line
from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import Decoder
from hedgelab.saes.described import class_name, described, init_arguments
from hedgelab.saes.losses import LossTerms
from hedgelab.saes.mitigations.base import Mitigation
from hedgelab.training.checkpoints import VerifiedCheckpointIO
from hedgelab.training.sharding import full_tensor, is_split
from hedgelab.training.shell import ARCHITECTURES, TrainingShell
from hedgelab.training.trainee import OptimizerFactory, SchedulerFactory
from hedgelab.version import __version__

WEIGHTS, CONFIG = "sae.safetensors", "sae.json"
CLASSES: dict[str, "type[SAE]"] = {}
"""Every SAE class that is imported, by the name that files give it. Loading an SAE never imports anything."""


class Activation(NamedTuple):
    """Latents of a batch in training, and what the activity of each costs on average, coefficient included, ``[d_sae]``."""

    codes: Codes
    penalty: Tensor | None = None


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
    unit = W_dec.detach() / norms.clamp_min(1e-30)[:, None]
    return FoldedWeights(W_enc.detach() * norms, b_enc.detach() * norms, unit, b_dec.detach().clone(), norms)


class SAE(TrainingShell, ABC):
    """A sparse autoencoder: parameters, ``encode``, ``decode`` and ``loss``. The shell that it inherits trains it."""

    d_in: int
    d_sae: int
    W_enc: Tensor  # [d_in, d_sae]
    b_enc: Tensor  # [d_sae]
    W_dec: Tensor  # [d_sae, d_in]; row i is the direction of latent i
    b_dec: Tensor  # [d_in]
    optimizer: OptimizerFactory  # makes the optimiser from the parameters
    lr_scheduler: SchedulerFactory | None  # makes the schedule, stepped once an optimiser step
    gradient_clip_norm: float | None  # largest norm of the gradient
    steps_done: int = 0  # optimiser steps taken so far; warm-ups read it
    trainable: ClassVar[bool] = True  # and not only measured
    reconstructs: bool = True  # what it reads; a transcoder writes something else
    initialized: bool = False  # whether the weights come from data or from training, so that a fit goes on from them

    not_architecture: ClassVar[frozenset[str]] = frozenset({"init", "optimizer", "lr_scheduler", "gradient_clip_norm"})

    full_precision: ClassVar[tuple[str, ...]] = ()
    """Parameters that stay in at least single precision, as buffers do: their steps are too small for a narrower type."""

    per_member: ClassVar[tuple[str, ...]] = ()
    """Attributes, numbers or lists of them, that enter the loss as factors only: members of an ensemble may differ in them."""

    @abstractmethod
    def encode(self, x: Tensor) -> Codes:
        """Latents of activations ``x [..., d_in]``, as used for inference and measuring."""

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Reconstruction ``[..., d_in]`` of latents, or of dense activations ``[..., d_sae]``."""
        return ops.decode(Codes.from_dense(codes) if isinstance(codes, Tensor) else codes, Decoder(self.W_dec, self.b_dec))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct ``x [..., d_in]``."""
        return self.decode(self.encode(x))

    @abstractmethod
    def loss(self, batch: Batch | Tensor) -> LossTerms:
        """The training loss of a batch, or of activations ``[..., d_in]``; computing it changes nothing.

        A training loop of one's own is ``terms = sae.loss(x); terms.total.backward(); optimizer.step(); optimizer.zero_grad();
        sae.after_step(terms)``, with the optimizer of ``sae.configure_optimizers()`` or one of your own.
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

    def step_key(self, rows: int) -> tuple[Hashable, ...] | None:
        """What the loss of the coming step of a batch of ``rows`` depends on besides tensors, whose shapes it does not change.

        Steps of one key compute the same, so that a GPU may capture one and replay it. None, as SAEs that do not say: none may.
        """
        return None

    def as_batch(self, given: Batch | Tensor) -> Batch:
        """Activations ``[..., d_in]``, alone or in a batch, as rows, in the type of the weights if theirs is wider."""
        batch = given if isinstance(given, Batch) else Batch(given)
        x = ops.as_rows(batch.x, self.b_dec)
        return batch if x is batch.x else batch._replace(x=x)

    @property
    def dead_latents(self) -> Tensor:
        """Which latents have been silent for longer than the dead-latent window, ``[d_sae]`` bool."""
        return torch.zeros(self.d_sae, dtype=torch.bool, device=self.W_dec.device)

    @property
    def control(self) -> str:
        """Which control it is, as its mitigations say, such as ``frozen decoder``; empty for an SAE that all of trains."""
        given = (getattr(part, "mitigations", ()) for part in (self, getattr(self, "inner", None)))
        return " and ".join(one.control for some in given for one in some if one.control)

    def training_numbers(self) -> dict[str, float]:
        """Numbers besides the loss terms that training reports at every logging interval, by full name."""
        return {}

    def saes(self) -> dict[str, Self]:
        """Itself, alone."""
        return {"": self}

    def folded(self) -> FoldedWeights:
        """Detached copies of the weights with decoder norms folded in."""
        return fold(*(full_tensor(value) for value in (self.W_enc, self.b_enc, self.W_dec, self.b_dec)))

    def config(self) -> dict[str, Any]:
        """Class name and architecture arguments as plain JSON values; :meth:`from_config` reads it back.

        By convention every architecture argument of ``__init__`` is kept in an attribute of the same name.
        """
        return described(self, self.not_architecture)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **training: Any) -> Self:
        """An SAE, of this class or one that inherits from it, of the architecture that :meth:`config` described.

        Its weights are fresh; ``training`` are other arguments. A class that is not imported is taken to be this one.
        """
        arguments = dict(config)
        name = arguments.pop("class", None)
        made = CLASSES.get(name, cls) if isinstance(name, str) else cls
        if not issubclass(made, cls):
            raise UserError(f"sae.json: class: the SAE is a {name}, not a {class_name(cls)}")
        if inspect.isabstract(made):
            advice = "name an SAE of hedgelab, or import yours first or give it: load_sae(folder, cls=…)"
            raise UserError(f"sae.json: class: {name!r} is not imported; {advice}")
        if unknown := arguments.keys() - (init_arguments(made).keys() - made.not_architecture):
            raise UserError(f"sae.json: {min(unknown)!r}: unknown key of {name}")
        if isinstance(inner := arguments.get("inner"), dict):
            arguments["inner"] = lambda d_in: SAE.from_config({**inner, "d_in": d_in})
        try:
            if given := arguments.get("mitigations"):
                arguments["mitigations"] = [Mitigation.from_config(one) for one in given]
            return made(**arguments, **training)
        except UserError as error:
            raise UserError(f"sae.json: {str(error).removeprefix('sae.json: ').removeprefix('model.')}") from error
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError, RuntimeError) as error:
            raise UserError(f"sae.json: cannot be made into a {name} ({one_line(str(error))})") from error

    @classmethod
    def from_state(cls, config: Mapping[str, Any], state: Mapping[str, Tensor], strict: bool = True, **training: Any) -> Self:
        """The SAE that another's :meth:`config` and ``state_dict`` tell of, ready to measure or to train on."""
        W_dec = decoder_weights(state)
        sae = cls.from_config(config, **training).to(torch.float32 if W_dec is None else W_dec.dtype)
        sae.load_state_dict(state, strict=strict)
        sae.initialized = True
        return sae

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        strict: bool | None = None,
        member: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """The SAE of a training checkpoint, of this class or one that inherits from it, ready to measure or to train on.

        Besides Lightning's arguments: ``member`` names one of several SAEs that were trained together, and ``kwargs`` are
        arguments of ``__init__`` besides, or instead of, what the checkpoint says.
        """
        path, checkpoint = checkpoint_path, VerifiedCheckpointIO().load_checkpoint(checkpoint_path, map_location="cpu")
        configs: dict[str, Any] = checkpoint.get(ARCHITECTURES, {"": {}})
        name = next(iter(configs)) if member is None and len(configs) == 1 else member
        if name not in configs:
            raise UserError(f"{path}: holds the SAEs {', '.join(configs)}; name one of them as member, got {member!r}")
        config = {key: value for key, value in configs[name].items() if key not in kwargs}
        if not config and inspect.isabstract(cls):
            advice = "call load_from_checkpoint of its class, with its arguments"
            raise UserError(f"{path}: does not say which SAE it holds; {advice}")
        prefix = f"members.{name}." if name else ""
        state = {key.removeprefix(prefix): v for key, v in checkpoint["state_dict"].items() if key.startswith(prefix)}
        sae = cls.from_state(config, state, strict is not False, **kwargs)
        return sae if map_location is None else sae.to(map_location)

    def save(self, folder: str | Path) -> None:
        """Write ``sae.safetensors`` (weights and buffers) and ``sae.json`` (architecture) into a folder, made if missing.

        Of an SAE whose latents are split over processes, all of them must call this; the process of rank 0 writes.
        """
        tensors, folder = self.full_state(), Path(folder)
        if is_split(self.W_dec) and torch.distributed.get_rank() != 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"hedgelab": __version__, **self.config()}, indent=2) + "\n")

    def full_state(self) -> dict[str, Tensor]:
        """All weights and buffers on the CPU, also where latents are split; to be called on all processes."""
        return {name: full_tensor(value).cpu().contiguous() for name, value in self.state_dict().items()}

    def __repr__(self) -> str:
        shown: dict[str, Any] = {"d_in": self.d_in, "d_sae": self.d_sae}
        for name, parameter in init_arguments(type(self)).items():
            value = getattr(self, name, parameter.default)
            value = (list(value) or None) if isinstance(value, nn.ModuleList) else value
            if name not in self.not_architecture and value != parameter.default:
                shown[name] = value
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        CLASSES[class_name(cls)] = cls

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert all tensors, but for what accumulates: that never becomes narrower than single precision."""
        own = {**self._buffers, **{name: self._parameters.get(name) for name in self.full_precision}}
        exact = {name: value.detach() for name, value in own.items() if value is not None and value.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            value = getattr(self, name)
            if value.itemsize < 4:
                value.data = before.to(value.device, torch.float32)
        return self


def decoder_weights(state: Mapping[str, Tensor]) -> Tensor | None:
    """The decoder's weights in a ``state_dict``, whatever SAE it is of."""
    return next((value for name, value in state.items() if name.rpartition(".")[2] == "W_dec"), None)
