"""The weights of an SAE without its class, and the rewritings under which it computes the same function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.saes import SAE
from hedgelab.saes.io import build_sae
from hedgelab.saes.widen import flat_part


class Parts(NamedTuple):
    """Weights of an SAE, detached, on the CPU, in float32.

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
    def read(cls, tensors: dict[str, Tensor], names: list[str], where: str, also: tuple[str, ...] = ()) -> Parts:
        """Weights by the names that a library has for them, in the order of the attributes; those of linear layers turned.

        Raises:
            UserError: One is missing, there are others than these and ``also``, or they do not fit each other.
        """
        if missing := [name for name in names if name not in tensors]:
            raise UserError(f"{where}: lacks {', '.join(missing)}; it holds {', '.join(sorted(tensors)) or 'nothing'}")
        if strange := sorted(set(tensors) - set(names) - set(also)):
            raise UserError(f"{where}: holds {', '.join(strange)}, for which hedgelab has no place")
        taken = {name: tensors[name] for name in names}
        parts = cls(*(one.t() if name.endswith(".weight") and one.dim() == 2 else one for name, one in taken.items()))
        check(parts, where)
        return parts

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


def assemble(config: dict[str, Any], parts: Parts, where: str) -> SAE:
    """An SAE of hedgelab with given weights.

    Args:
        config: What :meth:`SAE.config` gives; widths are taken from the weights.
        parts: The weights; a threshold goes where the class keeps its own.
        where: What to blame.

    Raises:
        UserError: The weights do not fit each other or the config, or are not finite.
    """
    check(parts, where)
    d_in, d_sae = parts.W_enc.shape
    if config["class"] == "MatryoshkaSAE":
        inner = {key: value for key, value in config["inner"].items() if key != "d_in"}
        config = {**config, "d_in": d_in, "inner": {**inner, "d_sae": d_sae}}
    else:
        config = {**config, "d_in": d_in, "d_sae": d_sae}
    try:
        sae = build_sae(config)
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


def check(parts: Parts, where: str) -> None:
    """See that weights are weights of one SAE.

    Raises:
        UserError: They are not.
    """
    if parts.W_enc.dim() != 2 or 0 in parts.W_enc.shape:
        raise UserError(f"{where}: W_enc: expected a matrix [d_in, d_sae], got {list(parts.W_enc.shape)}")
    d_in, d_sae = parts.W_enc.shape
    expected = {"b_enc": [d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    for name, shape in expected.items():
        if list(getattr(parts, name).shape) != shape:
            raise UserError(f"{where}: {name}: expected {shape}, got {list(getattr(parts, name).shape)}")
    if parts.threshold is not None and list(parts.threshold.shape) not in ([], [d_sae]):
        raise UserError(f"{where}: threshold: expected [{d_sae}], got {list(parts.threshold.shape)}")
    for name, value in parts._asdict().items():
        if value is not None and not torch.isfinite(value).all() and not (name == "threshold" and value.dim() == 0):
            raise UserError(f"{where}: {name}: holds values that are not finite")


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping; with or without a byte-order mark.

    Raises:
        UserError: The file is not there, damaged, or holds no mapping.
    """
    if not path.is_file():
        raise UserError(f"{path.parent}: holds no {path.name}")
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: damaged (expected a mapping, got a {type(config).__name__})")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, floating ones in float32.

    Raises:
        UserError: The file is not there or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path.parent}: holds no {path.name}")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error})") from error
    return as_float(tensors)


def as_float(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, floating ones in float32."""
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
