"""What every reader of another library's format needs: its files, its weights, how it computes, and its names of places."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from hedgelab.data.llm.hook_names import HookPoint, read_hook_name
from hedgelab.data.llm.model import find_model
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError, one_line, whole_number
from hedgelab.saes import SAE, InferenceSAE, fold
from hedgelab.saes.widen import flat_part

PAYS = {"VanillaSAE": "l1_coefficient", "JumpReLUSAE": "l0_coefficient"}  # what latents cost; others are selected


class Parts(NamedTuple):
    """Weights of an SAE without its class, on the CPU, in float32 or float64, and rewritings that leave its function alone."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None  # what pre-activations must exceed, [d_sae] or a scalar
    r_mag: Tensor | None = None  # of a gated SAE: logarithms of its gains, [d_sae]
    W_skip: Tensor | None = None  # of a transcoder, [d_out, d_in]

    def folded(self) -> "Parts":
        """Decoder norms moved into the encoder: activations are multiplied by them, reconstructions stay (SPEC section 2)."""
        folded = fold(self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        return Parts(*folded[:4], None if self.threshold is None else self.threshold * folded.norms)

    def on_raw(self, scale: float, mean: Tensor | None = None) -> "Parts":
        """The same latents, and reconstructions, of raw activations ``x``, for an SAE trained on ``(x - mean) · scale``."""
        b_dec = self.b_dec.double() / scale + (0 if mean is None else mean.double())
        return self._replace(W_enc=self.W_enc * scale, W_dec=self.W_dec / scale, b_dec=b_dec.to(self.b_dec))

    def subtracting_b_dec(self) -> "Parts":
        """An SAE whose encoder does not subtract ``b_dec``, as one whose does: ``b_enc`` takes up the difference."""
        shift = self.b_dec.double() @ self.W_enc.double()
        return self._replace(b_enc=(self.b_enc.double() + shift).to(self.b_enc))

    def ungated(self) -> "Parts":
        """A gated SAE, whose gates have the bias ``threshold``, as the JumpReLU SAE that it is (arXiv 2404.16014).

        ``1[p + b_gate > 0] relu(e^r p + b_mag)`` is ``q · 1[q > max(0, b_mag - e^r b_gate)]`` of ``q = e^r p + b_mag``.
        """
        b_gate, gain = self.threshold, torch.as_tensor(self.r_mag).exp()
        return self._replace(W_enc=self.W_enc * gain, threshold=self.b_enc - gain * torch.as_tensor(b_gate), r_mag=None)


class Layout(NamedTuple):
    """How an architecture of another library is read; a table of them is most of a format."""

    becomes: str  # the class of hedgelab that computes the same
    tensors: tuple[str | None, ...]  # in the order of Parts; those of linear layers (.weight) are turned
    rewrite: Callable[[Parts], Parts] = lambda parts: parts  # makes hedgelab's function of them

    def read(self, tensors: Mapping[str, Tensor], where: object) -> Parts:
        """The weights, if they are there, are finite and fit each other, and there are no others."""
        names = [name for name in self.tensors if name is not None]
        if tensors.keys() != set(names):
            held = ", ".join(sorted(tensors)) or "nothing"
            raise UserError(f"{where}: holds {held}; expected {', '.join(names)}")
        dtype = tensors[names[0]].dtype
        taken = {name: tensors[name].to(dtype) for name in names}
        taken |= {name: one.t() for name, one in taken.items() if name.endswith(".weight") and one.dim() == 2}
        parts = Parts(*(None if name is None else taken[name] for name in self.tensors))  # type: ignore[arg-type]
        if parts.W_enc.dim() != 2 or 0 in parts.W_enc.shape:
            raise UserError(f"{where}: W_enc: expected a matrix [d_in, d_sae], got {list(parts.W_enc.shape)}")
        d_in, d_sae = parts.W_enc.shape
        d_out = [d_in] if self.becomes != "InferenceSAE" else list(parts.W_dec.shape[1:2]) or [d_in]
        per_latent = [d_sae] if self.becomes in ("JumpReLUSAE", "InferenceSAE") else []
        expected = ([d_in, d_sae], [d_sae], [d_sae, *d_out], d_out, per_latent, [d_sae], [*d_out, d_in])
        for name, value, shape in zip(Parts._fields, parts, expected, strict=True):
            if value is not None and list(value.shape) != shape:
                raise UserError(f"{where}: {name}: expected {shape}, got {list(value.shape)}")
            if value is not None and not torch.isfinite(value).all():
                raise UserError(f"{where}: {name}: holds values that are not finite")
        return self.rewrite(parts)

    def sae(self, parts: Parts, where: object, k: Any, cost: Any, levels: Any, **options: Any) -> SAE:
        """The SAE of these weights: latents cost something or are selected, as the class has it; a matryoshka has levels."""
        arguments: dict[str, Any]
        if self.becomes in PAYS:
            arguments = {PAYS[self.becomes]: float(cost) if isinstance(cost, (int, float)) else 0.0}
        else:
            whole = round(k) if isinstance(k, float) and math.isfinite(k) else k  # SAELens allows fractions, as means
            arguments = {"k": whole_number(f"{where}: k", whole), **options}
        if self.becomes == "MatryoshkaSAE":
            arguments = {"inner": {"class": "BatchTopKSAE", **arguments}, "levels": levels}
        return assemble({"class": self.becomes, **arguments}, parts, where)


def assemble(config: Mapping[str, Any], parts: Parts, where: object) -> SAE:
    """An SAE of hedgelab with given weights, which say how wide it is; a threshold goes where its class keeps its own."""
    d_in, d_sae = parts.W_enc.shape
    width = {"inner": {**config["inner"], "d_sae": d_sae}} if "inner" in config else {"d_sae": d_sae}
    try:
        sae = SAE.from_config({**config, "d_in": d_in, **width}).to(parts.W_enc.dtype)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    flat: Any = sae if isinstance(sae, InferenceSAE) else flat_part(sae)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
            if (value := getattr(parts, name)) is not None:
                getattr(flat, name).copy_(value)
        if parts.threshold is not None:  # 0 is a ReLU, and so is less
            (flat.theta if hasattr(flat, "theta") else flat.threshold).copy_(parts.threshold.clamp_min(0))
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


def understood(config: Mapping[str, Any], key: str, where: object, *known: Any) -> Any:
    """The value of a key, the first of those that hedgelab knows where there is none; others are refused."""
    found = config.get(key)
    if found is None:
        return known[0]
    if not any(type(found) is type(one) and found == one for one in known):
        raise UserError(f"{where}: {key}: hedgelab reads {', '.join(map(json.dumps, known))}, got {json.dumps(found)}")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a ``.pt`` pickle, opened without running anything; see :func:`widened`."""
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
    return widened(found)


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU; floating ones in float32, which holds all narrower numbers as they are, or in float64."""
    found = {name: one.detach().cpu() for name, one in tensors.items()}
    return {name: one.float() if one.is_floating_point() and one.itemsize < 8 else one for name, one in found.items()}


def source_of(model: object, hook: object, unknown: Mapping[str, str], **known: Any) -> ActivationSource:
    """What an SAE reads, from the other library's names; ``unknown`` says why keys, ``layer`` for the hook, are not known."""
    unknown = dict(unknown)
    found = find_model(model) if isinstance(model, str) and "model" not in unknown else None
    if found is None and model is not None:
        unknown.setdefault("model", f"{model!r} is no model that hedgelab knows by this name")
    place = HookPoint() if "layer" in unknown else read_hook_name(str(hook))
    if place.why_not is not None:
        unknown["layer"] = f"{hook!r} {place.why_not}"
    is_path = place.layer is not None and "." in str(hook) and "hook_" not in str(hook)
    hook = str(hook) if is_path else place.hook
    return ActivationSource(model=found, hook=hook, layer=place.layer, unknown=unknown, **known)
