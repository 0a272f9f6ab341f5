"""dictionary_learning's folders: ``ae.pt`` and ``config.json``.

``ae.pt`` is a pickle. It is only opened by PyTorch's restricted unpickler, which builds tensors and runs nothing, and
anything but a flat dictionary of tensors is refused.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.interop.parts import Parts, as_float, assemble, take
from hedgelab.saes import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = ["encoder.weight", "encoder.bias", "decoder.weight", "b_dec"]
_PLAIN = ["W_enc", "b_enc", "W_dec", "b_dec"]
_COUNTERS = ("k", "threshold")


def import_dictionary_learning(folder: str | Path) -> tuple[SAE, ActivationSource]:
    """Read an SAE that dictionary_learning has written; its ``dict_class`` says which.

    ``AutoEncoder`` and ``AutoEncoderNew`` become VanillaSAE (with decoder norms folded in, as ``load_dictionary`` gives them),
    ``AutoEncoderTopK`` TopKSAE, ``BatchTopKSAE`` and ``MatryoshkaBatchTopKSAE`` BatchTopKSAE and MatryoshkaSAE, and
    ``JumpReluAutoEncoder`` JumpReLUSAE.

    Raises:
        UserError: A file is missing, damaged or more than tensors, or the class is none of these.
    """
    folder = Path(folder)
    try:
        trainer: dict[str, Any] = json.loads((folder / CONFIG).read_text())["trainer"]
        name = trainer["dict_class"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read ({type(error).__name__}: {error})") from error
    tensors = read_pickled_tensors(folder / WEIGHTS)
    described, parts = _convert(name, trainer, tensors, str(folder / WEIGHTS))
    return assemble(described, parts, str(folder)), _source(trainer)


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, floating ones in float32, by the restricted unpickler.

    Raises:
        UserError: The file is not there, damaged, or holds anything but tensors by name.
    """
    if not path.is_file():
        raise UserError(f"{path.parent}: holds no {path.name}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        OSError,
    ) as error:
        raise UserError(f"{path}: refused: no PyTorch file of tensors alone ({type(error).__name__})") from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and type(value) is Tensor for key, value in loaded.items()
    ):
        raise UserError(f"{path}: refused: expected tensors by name and nothing else")
    return as_float(loaded)


def _convert(
    name: str, trainer: dict[str, Any], tensors: dict[str, Tensor], where: str
) -> tuple[dict[str, Any], Parts]:
    """Class of hedgelab with its arguments, and the weights."""
    l1 = trainer.get("l1_penalty", 0.0)
    vanilla = {"class": "VanillaSAE", "l1_coefficient": float(l1) if isinstance(l1, (int, float)) else 0.0}
    match name:
        case "AutoEncoder":
            parts = _linear(tensors, ["encoder.weight", "encoder.bias", "decoder.weight", "bias"], where)
            return vanilla, parts.folded()
        case "AutoEncoderNew":
            parts = _linear(tensors, ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"], where)
            return vanilla, parts.subtracting_b_dec()
        case "AutoEncoderTopK":
            return {"class": "TopKSAE", "k": _k(tensors, trainer, where)}, _linear(tensors, _LINEAR, where)
        case "BatchTopKSAE":
            described = {"class": "BatchTopKSAE", "k": _k(tensors, trainer, where)}
            return described, _linear(tensors, _LINEAR, where)._replace(threshold=_threshold(tensors))
        case "MatryoshkaBatchTopKSAE":
            parts = Parts(*take(tensors, _PLAIN, where, also=(*_COUNTERS, "group_sizes")))
            parts = parts._replace(threshold=_threshold(tensors))
            inner = {"class": "BatchTopKSAE", "k": _k(tensors, trainer, where)}
            sizes = tensors.get("group_sizes", torch.tensor([len(parts.b_enc)]))
            return {"class": "MatryoshkaSAE", "inner": inner, "levels": sizes.cumsum(0).tolist()}, parts
        case "JumpReluAutoEncoder":
            parts = Parts(*take(tensors, [*_PLAIN, "threshold"], where)).subtracting_b_dec()
            return {"class": "JumpReLUSAE", "l0_coefficient": 0.0}, parts
    raise UserError(f"{where}: dict_class: hedgelab has nothing like {name!r}")


def _linear(tensors: dict[str, Tensor], names: list[str], where: str) -> Parts:
    encoder, b_enc, decoder, b_dec = take(tensors, names, where, also=_COUNTERS)
    return Parts(encoder.t(), b_enc, decoder.t(), b_dec)


def _k(tensors: dict[str, Tensor], trainer: dict[str, Any], where: str) -> int:
    try:
        return int(tensors["k"] if "k" in tensors else trainer["k"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: k: expected a number") from error


def _threshold(tensors: dict[str, Tensor]) -> Tensor:
    """The threshold of inference; negative ones mean that none was learned yet, which hedgelab writes as NaN."""
    threshold = tensors.get("threshold", torch.tensor(-1.0)).reshape(())
    return threshold if threshold >= 0 else torch.tensor(float("nan"))


def _source(trainer: dict[str, Any]) -> ActivationSource:
    """Model and layer as the trainer was told them; its activations are the residual stream unless it names a submodule."""
    model, layer, submodule = (trainer.get(key) for key in ("lm_name", "layer", "submodule_name"))
    residual = isinstance(layer, int) and (submodule is None or str(submodule).startswith("resid_post"))
    return ActivationSource(model=model if isinstance(model, str) else None, layer=layer if residual else None)
