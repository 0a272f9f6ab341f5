"""Folders of other libraries, on this machine or the hub: which library wrote one, and reading it."""

import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import yaml

from hedgelab.data.llm.model import first_line, hub_problem
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.interop import saelens
from hedgelab.interop.foreign import PAYS, Layout, Parts, read_config, read_tensors, source_of, understood
from hedgelab.saes import SAE

_WANTED = ("*.json", "*.safetensors", "*.pt")
_CARD = """\
---
library_name: saelens
tags: [sparse-autoencoder, interpretability, saelens, hedgelab]
---

# {title}

A sparse autoencoder trained with hedgelab: `sae_lens.SAE.from_pretrained("{name}", "{folder}")`. Its `cfg.json` names its
model, hook and context; any normalisation of the activations is folded into the weights.
"""
_LINEAR, _PLAIN = ("encoder.weight", "encoder.bias", "decoder.weight"), ("W_enc", "b_enc", "W_dec", "b_dec")
_SPARSIFY = Layout("TopKSAE", ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
_SIZES_AND_TRAINING = {"d_in", "num_latents", "expansion_factor", "k", "normalize_decoder", "multi_topk", "activation"}


def _learned(parts: Parts) -> Parts:
    """A negative threshold means that none was learned yet, which hedgelab writes as NaN."""
    assert parts.threshold is not None
    return parts._replace(threshold=parts.threshold.where(parts.threshold >= 0, torch.nan))


_DICTIONARIES = {
    "AutoEncoder": Layout("VanillaSAE", (*_LINEAR, "bias"), Parts.folded),  # as load_dictionary gives them
    "AutoEncoderNew": Layout("VanillaSAE", (*_LINEAR, "decoder.bias"), Parts.subtracting_b_dec),
    "AutoEncoderTopK": Layout("TopKSAE", (*_LINEAR, "b_dec")),
    "BatchTopKSAE": Layout("BatchTopKSAE", (*_LINEAR, "b_dec", "threshold"), _learned),
    "MatryoshkaBatchTopKSAE": Layout("MatryoshkaSAE", (*_PLAIN, "threshold"), _learned),
    "JumpReluAutoEncoder": Layout("JumpReLUSAE", (*_PLAIN, "threshold"), Parts.subtracting_b_dec),
}


def import_sparsify(folder: str | Path) -> tuple[SAE, ActivationSource]:
    """Read a TopK SAE that sparsify has written; the folder's name tells the hook, as sparsify names them."""
    folder = Path(folder)
    path, where = folder / "cfg.json", folder / "sae.safetensors"
    config = read_config(path)
    understood(config, "activation", path, "topk")
    for key in sorted(config.keys() - _SIZES_AND_TRAINING):
        if config[key]:
            raise UserError(f"{path}: {key}: hedgelab does not know what {config[key]!r} changes; expected false")
    parts = _SPARSIFY.read(read_tensors(where), where)
    normalize = bool(config.get("normalize_decoder", True))
    sae = _SPARSIFY.sae(parts, folder, config.get("k"), None, None, normalize_decoder=normalize)
    run = folder.resolve().parent / "config.json"  # the training run's, if it lies above as sparsify writes it
    return sae, source_of(read_config(run).get("model") if run.is_file() else None, folder.resolve().name, {})


def import_dictionary_learning(folder: str | Path) -> tuple[SAE, ActivationSource]:
    """Read an SAE that dictionary_learning has written; its ``dict_class`` says which layout it has."""
    folder = Path(folder)
    path, where = folder / "config.json", folder / "ae.pt"
    config = read_config(path)
    trainer = config.get("trainer")
    name = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or (layout := _DICTIONARIES.get(str(name))) is None:
        raise UserError(f"{path}: trainer.dict_class: hedgelab reads {', '.join(_DICTIONARIES)}, got {name!r}")
    tensors, selects = read_tensors(where), layout.becomes not in PAYS
    found = {key: tensors.pop(key).tolist() for key in ("k", "group_sizes") if selects and key in tensors}
    if layout.becomes == "TopKSAE":
        tensors.pop("threshold", None)  # it selects k in inference too
    elif layout.rewrite is _learned:
        tensors.setdefault("threshold", torch.tensor(-1.0))
    parts = layout.read(tensors, where)
    levels = list(accumulate(found.get("group_sizes", [len(parts.b_enc)])))
    sae = layout.sae(parts, where, found.get("k", trainer.get("k")), trainer.get("l1_penalty"), levels)
    return sae, _source_of_dictionary(trainer, config.get("buffer"))


def _source_of_dictionary(trainer: dict[str, Any], buffer: Any) -> ActivationSource:
    """Model and place as the trainer was given them: the output of the layer's block unless a submodule is named."""
    layer, submodule = trainer.get("layer"), trainer.get("submodule_name")
    given = buffer if isinstance(buffer, dict) else {}
    name = "resid_post" if submodule is None else str(submodule)
    numbers, unknown = re.findall(r"\d+", name), {}
    if numbers and type(layer) is int and str(layer) not in numbers:
        unknown["layer"] = f"submodule_name is {name!r}, but layer is {layer}"
    elif not numbers and type(layer) is not int:
        unknown["layer"] = "config.json names no layer"
    elif (io := given.get("io", "out")) != "out":
        unknown["layer"] = f"it reads what goes into a module (buffer.io: {io!r}), and hedgelab what comes out of one"
    length = given.get("ctx_len") if type(given.get("ctx_len")) is int else None
    hook = name if numbers else f"{name}_layer_{layer}"
    return source_of(trainer.get("lm_name"), hook, unknown, context_length=length)


FORMATS: dict[str, tuple[str, str, Callable[[Path], tuple[SAE, ActivationSource]]]] = {
    "saelens": (saelens.CONFIG, saelens.WEIGHTS, saelens.import_saelens),
    "sparsify": ("cfg.json", "sae.safetensors", import_sparsify),
    "dictionary_learning": ("config.json", "ae.pt", import_dictionary_learning),
}
"""The two files of each library's folder, and what reads it."""


def import_folder(path: Path, name: str | None = None) -> tuple[SAE, ActivationSource, str]:
    """The SAE of a folder (or of one of its two files), what it reads as far as that tells, and the library's name."""
    folder = path.parent if path.is_file() else path
    for library, (config, weights, read) in FORMATS.items():
        if library == name or (name is None and (folder / weights).is_file() and (folder / config).is_file()):
            return *read(folder), library
    expected = "; ".join(f"{config} and {weights} ({library})" for library, (config, weights, _) in FORMATS.items())
    raise UserError(f"{folder}: holds no SAE of a known library; expected {expected}")


def config_lines(sae: SAE, source: ActivationSource, folder: Path) -> list[str]:
    """A config of ``hedgelab fit`` that goes on from an imported SAE; ``???`` and a line where its folder does not tell."""
    model = _section(sae.config())
    flat = model["init_args"].get("inner", model)
    flat["init_args"]["init"] = {"weights": str(folder)}
    where = {"hook": source.hook} if source.layer is None and source.hook is not None else {"layer": source.layer}
    needed = {"model": source.model, **where}
    known = {"context_length": source.context_length, "skip_first": source.skip_first or None}
    reads = {key: "???" if value is None else value for key, value in needed.items()}
    reads |= {key: value for key, value in known.items() if value is not None}
    data = {"class_path": "LLMDataModule", "init_args": {**reads, "normalisation": "none"}}
    config = {"trainer": {"max_steps": 1000}, "data": data, "model": model}
    reasons = {key: "the folder does not say" for key, value in needed.items() if value is None} | source.unknown
    lines = [f"# data.{key} is not known: {reason}" for key, reason in reasons.items()]
    return [*lines, *yaml.safe_dump(config, sort_keys=False, default_flow_style=None).rstrip().splitlines()]


def _section(config: dict[str, Any]) -> dict[str, Any]:
    """What :meth:`SAE.config` says, as a section of a config file."""
    arguments = {key: value for key, value in config.items() if key not in ("class", "d_in")}
    if "inner" in arguments:
        arguments["inner"] = _section(arguments["inner"])
    return {"class_path": config["class"], "init_args": arguments}


def fetch(name: str) -> Path:
    """A folder of the hub, on this machine; ``user/repository``, or ``user/repository/folder/below``."""
    user, repository, below = [*name.split("/", 2), "", ""][:3]
    if not user or not repository:
        raise UserError(f"'{name}' is neither a folder nor an id of the hub; expected user/repository[/folder]")
    client = _client()
    try:
        patterns = [f"{below}/{pattern}" if below else pattern for pattern in _WANTED]
        return Path(client.snapshot_download(f"{user}/{repository}", allow_patterns=patterns)) / below
    except Exception as error:  # the client's own errors, and those of what it downloads with
        raise UserError(f"the hub does not give '{name}' ({first_line(error)}); give a folder instead") from error


def push(folder: Path, name: str) -> str:
    """Upload what ``hedgelab export`` has written, with a card; its address. The repository is made if missing."""
    if name.count("/") != 1:
        raise UserError(f"--push: expected user/repository, got '{name}'")
    card = _CARD.format(title=name.partition("/")[2], name=name, folder=folder.name)
    client = _client()
    try:
        api = client.HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, path_in_repo=folder.name)
        api.upload_file(repo_id=name, path_or_fileobj=card.encode(), path_in_repo="README.md")
    except Exception as error:
        raise UserError(f"--push: the hub refuses '{name}' ({first_line(error)}); the SAE is in {folder}") from error
    return f"https://huggingface.co/{name}"


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("the hub needs huggingface_hub, which is not installed; pip install 'hedgelab[llm]'") from None
    if problem := hub_problem():
        raise UserError(f"{problem}; an SAE in a folder needs no hub")
    return huggingface_hub
