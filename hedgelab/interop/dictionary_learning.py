"""dictionary_learning's folders: ``ae.pt`` and ``config.json``.

``ae.pt`` is a pickle. It is only opened by PyTorch's restricted unpickler, which builds tensors and runs nothing, and
anything but a flat dictionary of tensors is refused.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError, whole_number
from hedgelab.interop.names import source_of
from hedgelab.interop.parts import Parts, as_float, assemble, read_config
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
    path = folder / CONFIG
    config = read_config(path)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise UserError(f"{path}: trainer.dict_class: missing; it says of which class the dictionary is")
    tensors = read_pickled_tensors(folder / WEIGHTS)
    described, parts = _convert(trainer["dict_class"], trainer, tensors, str(folder / WEIGHTS))
    return assemble(described, parts, str(folder)), _source(trainer, config.get("buffer"))


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
    name: Any, trainer: dict[str, Any], tensors: dict[str, Tensor], where: str
) -> tuple[dict[str, Any], Parts]:
    """Class of hedgelab with its arguments, and the weights."""
    l1 = trainer.get("l1_penalty", 0.0)
    vanilla = {"class": "VanillaSAE", "l1_coefficient": float(l1) if isinstance(l1, (int, float)) else 0.0}
    match name:
        case "AutoEncoder":
            parts = Parts.read(tensors, [*_LINEAR[:3], "bias"], where)
            return vanilla, parts.folded()
        case "AutoEncoderNew":
            parts = Parts.read(tensors, [*_LINEAR[:3], "decoder.bias"], where)
            return vanilla, parts.subtracting_b_dec()
        case "AutoEncoderTopK":
            return {"class": "TopKSAE", "k": _k(tensors, trainer, where)}, Parts.read(
                tensors, _LINEAR, where, _COUNTERS
            )
        case "BatchTopKSAE":
            described = {"class": "BatchTopKSAE", "k": _k(tensors, trainer, where)}
            return described, Parts.read(tensors, _LINEAR, where, _COUNTERS)._replace(
                threshold=_threshold(tensors, where)
            )
        case "MatryoshkaBatchTopKSAE":
            parts = Parts.read(tensors, _PLAIN, where, (*_COUNTERS, "group_sizes"))
            parts = parts._replace(threshold=_threshold(tensors, where))
            inner = {"class": "BatchTopKSAE", "k": _k(tensors, trainer, where)}
            sizes = tensors.get("group_sizes", torch.tensor([len(parts.b_enc)]))
            return {"class": "MatryoshkaSAE", "inner": inner, "levels": sizes.cumsum(0).tolist()}, parts
        case "JumpReluAutoEncoder":
            parts = Parts.read(tensors, [*_PLAIN, "threshold"], where).subtracting_b_dec()
            return {"class": "JumpReLUSAE", "l0_coefficient": 0.0}, parts
    raise UserError(f"{where}: dict_class: hedgelab has nothing like {name!r}")


def _k(tensors: dict[str, Tensor], trainer: dict[str, Any], where: str) -> int:
    return whole_number(f"{where}: k", tensors["k"].tolist() if "k" in tensors else trainer.get("k"))


def _threshold(tensors: dict[str, Tensor], where: str) -> Tensor:
    """The threshold of inference; negative ones mean that none was learned yet, which hedgelab writes as NaN."""
    threshold = tensors.get("threshold", torch.tensor(-1.0))
    if threshold.numel() != 1:
        raise UserError(f"{where}: threshold: expected one number, got {list(threshold.shape)}")
    return threshold.reshape(()) if threshold >= 0 else torch.tensor(float("nan"))


def _source(trainer: dict[str, Any], buffer: Any) -> ActivationSource:
    """Model and place as the trainer was told them: the output of the layer's block unless a submodule is named."""
    layer, submodule = trainer.get("layer"), trainer.get("submodule_name")
    buffer = buffer if isinstance(buffer, dict) else {}
    name = "resid_post" if submodule is None else str(submodule)
    numbers = re.findall(r"\d+", name)
    hook: str | None
    hook, why_not = name if numbers else f"{name}_layer_{layer}", ""
    if numbers and type(layer) is int and str(layer) not in numbers:
        hook, why_not = None, f"submodule_name is {name!r}, but layer is {layer}"
    elif not numbers and type(layer) is not int:
        hook, why_not = None, f"{CONFIG} names no layer"
    elif (io := buffer.get("io", "out")) != "out":
        hook, why_not = (
            None,
            f"it reads what goes into a module (buffer.io: {io!r}), and hedgelab what comes out of one",
        )
    length = buffer.get("ctx_len")
    context_length = length if type(length) is int else None
    return source_of(trainer.get("lm_name"), hook, why_not, context_length=context_length)
