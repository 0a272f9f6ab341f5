"""dictionary_learning's folders: ``ae.pt`` and ``config.json``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError, whole_number
from hedgelab.interop.foreign import Layout, Parts, assemble, read_config, read_tensors, source_of
from hedgelab.saes import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
LAYOUTS = {
    "AutoEncoder": Layout(
        "VanillaSAE", (*_LINEAR, "bias"), Parts.folded, coefficient="l1_penalty"
    ),  # as load_dictionary gives them
    "AutoEncoderNew": Layout(
        "VanillaSAE", (*_LINEAR, "decoder.bias"), Parts.subtracting_b_dec, coefficient="l1_penalty"
    ),
    "AutoEncoderTopK": Layout("TopKSAE", (*_LINEAR, "b_dec"), spare=("k", "threshold")),
    "BatchTopKSAE": Layout("BatchTopKSAE", (*_LINEAR, "b_dec"), spare=("k", "threshold")),
    "MatryoshkaBatchTopKSAE": Layout("MatryoshkaSAE", _PLAIN, spare=("k", "threshold", "group_sizes")),
    "JumpReluAutoEncoder": Layout("JumpReLUSAE", (*_PLAIN, "threshold"), Parts.subtracting_b_dec),
}


def import_dictionary_learning(folder: str | Path) -> tuple[SAE, ActivationSource]:
    """Read an SAE that dictionary_learning has written; its ``dict_class`` says which layout it has."""
    folder = Path(folder)
    path, where = folder / CONFIG, folder / WEIGHTS
    config = read_config(path)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise UserError(f"{path}: trainer.dict_class: missing; it says of which class the dictionary is")
    tensors = read_tensors(where)
    if (layout := LAYOUTS.get(str(trainer["dict_class"]))) is None:
        raise UserError(f"{where}: dict_class: hedgelab has nothing like {trainer['dict_class']!r}")
    parts = layout.read(tensors, where)
    if layout.becomes in ("BatchTopKSAE", "MatryoshkaSAE"):
        parts = parts._replace(threshold=_threshold(tensors, where))
    sizes = tensors.get("group_sizes", torch.tensor([len(parts.b_enc)]))
    k = tensors["k"].tolist() if "k" in tensors else trainer.get("k")
    selection = {"k": whole_number(f"{where}: k", k)} if layout.selects else {}
    described = layout.config(trainer, selection, sizes.cumsum(0).tolist())
    return assemble(described, parts, folder), _source(trainer, config.get("buffer"))


def _threshold(tensors: dict[str, Tensor], where: Path) -> Tensor:
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
    why_not = ""
    if numbers and type(layer) is int and str(layer) not in numbers:
        why_not = f"submodule_name is {name!r}, but layer is {layer}"
    elif not numbers and type(layer) is not int:
        why_not = f"{CONFIG} names no layer"
    elif (io := buffer.get("io", "out")) != "out":
        why_not = f"it reads what goes into a module (buffer.io: {io!r}), and hedgelab what comes out of one"
    hook = None if why_not else name if numbers else f"{name}_layer_{layer}"
    length = buffer.get("ctx_len")
    return source_of(trainer.get("lm_name"), hook, why_not, context_length=length if type(length) is int else None)
