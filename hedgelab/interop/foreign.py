"""What every reader of another library's format needs: its files, its weights, how it computes, and its names of places."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from hedgelab.data.llm.hook_names import HookPoint, read_hook_name
from hedgelab.data.llm.model import find_model
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError, one_line
from hedgelab.saes import SAE
from hedgelab.saes.widen import flat_part

_PAY = {"VanillaSAE": "l1_coefficient", "JumpReLUSAE": "l0_coefficient"}


class Parts(NamedTuple):
    """Weights of an SAE without its class, detached, on the CPU, in float32, and rewritings that leave its function alone.

    Attributes:
        W_enc: ``[d_in, d_sae]``.
        b_enc: ``[d_sae]``.
        W_dec: ``[d_sae, d_in]``.
        b_dec: ``[d_in]``.
        threshold: What pre-activations must exceed, ``[d_sae]``, or a scalar; None without one.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None

    @classmethod
    def of(cls, sae: SAE, threshold: Tensor | None = None) -> Parts:
        """Copies of an SAE's weights."""
        tensors = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, threshold)
        return cls(*(None if one is None else one.detach().cpu().float().clone() for one in tensors))  # type: ignore[arg-type]

    def folded(self) -> Parts:
        """Decoder norms moved into the encoder: activations are multiplied by them, reconstructions stay (SPEC section 2)."""
        norms = self.W_dec.norm(dim=1)
        scaled = None if self.threshold is None else self.threshold * norms
        decoder = self.W_dec / norms.clamp_min(1e-30)[:, None]
        return Parts(self.W_enc * norms, self.b_enc * norms, decoder, self.b_dec, scaled)

    def on_raw(self, scale: float, mean: Tensor | None) -> Parts:
        """The same SAE for activations that are not normalised: those it was trained on are ``(x - mean) · scale``.

        Latents stay as they are; reconstructions are of the raw activations.
        """
        b_dec = self.b_dec.double() / scale + (0 if mean is None else mean.double())
        return self._replace(W_enc=self.W_enc * scale, W_dec=self.W_dec / scale, b_dec=b_dec.float())

    def subtracting_b_dec(self) -> Parts:
        """An SAE whose encoder does not subtract ``b_dec``, as one whose does: ``b_enc`` takes up the difference."""
        shift = self.b_dec.double() @ self.W_enc.double()
        return self._replace(b_enc=(self.b_enc.double() + shift).float())


class Layout(NamedTuple):
    """How an architecture of another library is read; a table of them is most of a format.

    Attributes:
        becomes: Name of the class of hedgelab that computes the same.
        tensors: Names of the tensors, in the order of :class:`Parts`; those of linear layers (``.weight``) are turned.
        rewrite: What makes hedgelab's function of the weights.
        spare: Names of further tensors, which the reader sees to.
        coefficient: The config's key for what latents cost.
    """

    becomes: str
    tensors: tuple[str, ...]
    rewrite: Callable[[Parts], Parts] = lambda parts: parts
    spare: tuple[str, ...] = ()
    coefficient: str = ""

    def read(self, tensors: dict[str, Tensor], where: object) -> Parts:
        """The weights, if they are there, are finite and fit each other, and there are no others."""
        if missing := [name for name in self.tensors if name not in tensors]:
            raise UserError(f"{where}: lacks {', '.join(missing)}; it holds {', '.join(sorted(tensors)) or 'nothing'}")
        if strange := sorted(tensors.keys() - {*self.tensors, *self.spare}):
            raise UserError(f"{where}: holds {', '.join(strange)}, for which hedgelab has no place")
        taken = {name: tensors[name] for name in self.tensors}
        parts = Parts(*(one.t() if name.endswith(".weight") and one.dim() == 2 else one for name, one in taken.items()))
        if parts.W_enc.dim() != 2 or 0 in parts.W_enc.shape:
            raise UserError(f"{where}: W_enc: expected a matrix [d_in, d_sae], got {list(parts.W_enc.shape)}")
        d_in, d_sae = parts.W_enc.shape
        expected = {"b_enc": [d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
        expected |= {"threshold": [d_sae]} if parts.threshold is not None and parts.threshold.dim() else {}
        for name, shape in expected.items():
            if list(getattr(parts, name).shape) != shape:
                raise UserError(f"{where}: {name}: expected {shape}, got {list(getattr(parts, name).shape)}")
        for name in ("W_enc", *expected):
            if not torch.isfinite(getattr(parts, name)).all():
                raise UserError(f"{where}: {name}: holds values that are not finite")
        return self.rewrite(parts)

    @property
    def selects(self) -> bool:
        """Whether its class selects latents, instead of paying for them."""
        return self.becomes not in _PAY

    def config(self, given: Mapping[str, Any], selection: dict[str, Any], levels: list[int]) -> dict[str, Any]:
        """What :meth:`SAE.config` would say of a class that pays (as ``given`` says) or selects; a matryoshka has levels."""
        if not self.selects:
            value = given.get(self.coefficient)
            return {"class": self.becomes, _PAY[self.becomes]: float(value) if isinstance(value, (int, float)) else 0.0}
        if self.becomes == "MatryoshkaSAE":
            return {"class": self.becomes, "inner": {"class": "BatchTopKSAE", **selection}, "levels": levels}
        return {"class": self.becomes, **selection}


def assemble(config: dict[str, Any], parts: Parts, where: object) -> SAE:
    """An SAE of hedgelab with given weights, which say how wide it is; a threshold goes where its class keeps its own."""
    d_in, d_sae = parts.W_enc.shape
    if config["class"] == "MatryoshkaSAE":
        inner = {key: value for key, value in config["inner"].items() if key != "d_in"}
        config = {**config, "d_in": d_in, "inner": {**inner, "d_sae": d_sae}}
    else:
        config = {**config, "d_in": d_in, "d_sae": d_sae}
    try:
        sae = SAE.from_config(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    flat: Any = flat_part(sae)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(flat, name).copy_(getattr(parts, name))
        if parts.threshold is not None and hasattr(flat, "log_threshold"):
            # A threshold of 0 or less is a ReLU; 1e-30 is one as well, and has a logarithm.
            flat.log_threshold.copy_(parts.threshold.double().clamp_min(1e-30).log())
        elif parts.threshold is not None:
            flat.threshold.copy_(parts.threshold)
    sae.initialized = True
    return sae


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping; with or without a byte-order mark."""
    if not path.is_file():
        raise UserError(f"{path.parent}: holds no {path.name}")
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({one_line(str(error))})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: damaged (expected a mapping, got a {type(config).__name__})")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a ``.pt`` pickle, floating ones in float32.

    Pickles are opened by PyTorch's restricted unpickler, which builds tensors and runs nothing.
    """
    if not path.is_file():
        raise UserError(f"{path.parent}: holds no {path.name}")
    is_pickle = path.suffix == ".pt"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True) if is_pickle else load_file(path)
    except Exception as error:  # whatever a damaged or hostile file provokes
        what = "refused: no PyTorch file of tensors alone" if is_pickle else "damaged"
        raise UserError(f"{path}: {what} ({one_line(str(error).partition('.')[0]) or type(error).__name__})") from error
    if not isinstance(found, dict) or not all(isinstance(k, str) and type(v) is Tensor for k, v in found.items()):
        raise UserError(f"{path}: refused: expected tensors by name and nothing else")
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def source_of(
    model: object, hook: str | None, why_not: str, unknown: dict[str, str] | None = None, **known: Any
) -> ActivationSource:
    """What an SAE reads, as far as its folder tells: model and hook as the other library names them.

    What is not known is kept with the reason: ``why_not`` for a hook that is None, ``unknown`` for the model or other keys.
    """
    unknown = dict(unknown or {})
    found = find_model(model) if isinstance(model, str) and "model" not in unknown else None
    if found is None and model is not None:
        unknown.setdefault("model", f"{model!r} is no model that hedgelab knows by this name")
    place = HookPoint(why_not=why_not) if hook is None else read_hook_name(hook)
    if place.why_not is not None:
        unknown["layer"] = place.why_not if hook is None else f"{hook!r} {place.why_not}"
    is_path = place.layer is not None and hook is not None and "." in hook and "hook_" not in hook
    return ActivationSource(
        model=found, hook=hook if is_path else place.hook, layer=place.layer, unknown=unknown, **known
    )
