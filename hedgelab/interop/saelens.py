"""SAELens' folders: ``cfg.json`` and ``sae_weights.safetensors``, as ``sae_lens.SAE.load_from_disk`` reads them.

SAELens knows no normalisation by measured constants, so that of the data is folded into the weights: an exported SAE reads
a model's activations as they come. Written after SAELens 6; older folders (before 6.0, flat configs) are read as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from hedgelab import __version__
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError, whole_number
from hedgelab.interop.names import source_of
from hedgelab.interop.parts import Parts, assemble, read_config, read_tensors
from hedgelab.saes import SAE, BatchTopKSAE, JumpReLUSAE, TopKSAE, VanillaSAE
from hedgelab.saes.widen import flat_part

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
HookNames = Literal["transformers", "transformer_lens"]
WRITTEN_FOR = "6.54.12"
"""The release of SAELens whose format exports have, and against which they are tested."""
_SCALER = "activation_scaler.json"
_CHANGES_THE_MODEL = ("center_writing_weights", "revision", "checkpoint_index", "checkpoint_value")
_HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_NORM_AWARE = (
    "batchtopk",
    "matryoshka_batchtopk",
)  # their thresholds are in units of pre-activation times decoder norm
_KINDS = (VanillaSAE, TopKSAE, BatchTopKSAE, JumpReLUSAE)
_READABLE = ("standard", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk")
_WEIGHT_NAMES = ["W_enc", "b_enc", "W_dec", "b_dec"]


# -- export --------------------------------------------------------------------------------------------


def export_saelens(
    sae: SAE, folder: str | Path, source: ActivationSource | None = None, hooks: HookNames = "transformers"
) -> dict[str, Any]:
    """Write an SAE for SAELens: vanilla as ``standard``, TopK as ``topk``, all others as ``jumprelu``.

    Latents keep their activations, except where TopK selects norm-aware: there decoder norms are folded in, since that
    is what makes SAELens select alike. Training state (dead-latent clocks, optimiser) stays behind.

    Args:
        sae: The SAE.
        folder: Made if missing.
        source: What the SAE reads; its normalisation is folded in. None writes no model and hook.
        hooks: How the hook is named: by module path, which SAELens finds with the model class ``AutoModelForCausalLM`` in
            any model, or as TransformerLens names the residual stream.

    Returns:
        What ``cfg.json`` holds.

    Raises:
        UserError: SAELens has no SAE that computes the same, or TransformerLens has no name for the hook.
    """
    folder = Path(folder)
    architecture, parts, extra = _for_saelens(sae)
    memory: dict[str, Any] = {"version": __version__, "sae": sae.config()}
    scale = 1.0 if source is None else source.scale
    if isinstance(flat := flat_part(sae), BatchTopKSAE):
        in_units_of_the_output = scale if flat.norm_aware_selection else 1.0
        memory["threshold"] = None if flat.threshold.isnan() else float(flat.threshold) / in_units_of_the_output
    if source is not None:
        parts = parts.on_raw(scale, None if source.mean is None else torch.tensor(source.mean))
        memory["text"] = source.text
        memory["folded"] = {"normalisation": source.normalisation, "scale": scale, "centred": source.mean is not None}
    config = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **extra,
        "metadata": {
            "sae_lens_version": WRITTEN_FOR,
            "sae_lens_training_version": None,
            **_metadata(source, hooks),
            "hedgelab": memory,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in parts._asdict().items() if value is not None}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return config


def _for_saelens(sae: SAE) -> tuple[str, Parts, dict[str, Any]]:
    """Architecture, weights and further arguments of SAELens's class that computes the same.

    Raises:
        UserError: It has none; of classes outside of hedgelab too, which may compute anything.
    """
    flat = getattr(sae, "inner", sae)
    extra: dict[str, Any] = {}
    if isinstance(flat, VanillaSAE):
        architecture, parts = "standard", Parts.of(flat)
    elif isinstance(flat, TopKSAE):
        architecture, parts = "topk", Parts.of(flat)
        extra = {"k": flat.k, "rescale_acts_by_decoder_norm": False}
        parts = parts.folded() if flat.norm_aware_selection else parts
    elif isinstance(flat, (BatchTopKSAE, JumpReLUSAE)):
        architecture, parts = "jumprelu", Parts.of(flat, flat.thresholds().expand(flat.d_sae))
    if not isinstance(flat, _KINDS) or not _computes(sae, parts, extra.get("k")):
        raise UserError(
            f"export: SAELens knows nothing that computes what {type(sae).__name__} does; --format hedgelab keeps it"
        )
    return architecture, parts, extra


@torch.no_grad()
def _computes(sae: SAE, parts: Parts, k: int | None) -> bool:
    """Whether an SAE computes what ReLU, threshold or TopK make of these weights, by trying it on random activations."""
    x = (
        torch.randn(64, sae.d_in, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 64)[:, None]
        + parts.b_dec
    )
    acts = ((x - parts.b_dec) @ parts.W_enc + parts.b_enc).relu()
    if parts.threshold is not None:
        acts = acts * (acts > parts.threshold)
    if k is not None:
        acts = torch.zeros_like(acts).scatter(1, *reversed(acts.topk(min(k, sae.d_sae))))
    x_hat = sae.decode(sae.encode(x.to(sae.W_dec))).cpu().float()
    errors = (x_hat - (acts @ parts.W_dec + parts.b_dec)).norm(dim=1) / x.norm(dim=1).clamp_min(1e-6)
    return bool((errors < 1e-3).float().mean() > 0.9)  # rounding may decide at a threshold, hardly ever in many rows


def _metadata(source: ActivationSource | None, hooks: HookNames) -> dict[str, Any]:
    if source is None or source.model is None:
        return {}
    name: dict[str, Any] = {}
    if hooks == "transformers" and source.hook is not None and "hook_" not in source.hook:
        if source.hook.endswith(".input"):
            raise UserError(f"export: {source.hook} is what goes into a module; SAELens reads what comes out of one")
        name = {"hook_name": source.hook, "model_class_name": "AutoModelForCausalLM"}
    elif source.layer is not None:
        name = {"hook_name": f"blocks.{source.layer}.hook_resid_post", "model_class_name": "HookedTransformer"}
    elif source.hook is not None and "hook_" in source.hook:
        name = {"hook_name": source.hook, "model_class_name": "HookedTransformer"}
    elif source.hook is not None:
        raise UserError(f"--hooks: TransformerLens has no name for {source.hook}; use --hooks transformers")
    dataset = None if source.dataset is None or Path(source.dataset).exists() else source.dataset  # not a local folder
    return {
        "model_name": _HUB_NAMES.get(source.model, source.model),
        **name,
        **({} if source.hook is None or "hook_" in source.hook else {"hf_hook_name": source.hook}),
        "context_size": source.context_length,
        "seqpos_slice": [source.skip_first, None],
        "prepend_bos": source.opens_with_bos,
        "exclude_special_tokens": True,
        **({} if dataset is None else {"dataset_path": dataset}),
    }


# -- import --------------------------------------------------------------------------------------------


def import_saelens(folder: str | Path) -> tuple[SAE, ActivationSource]:
    """Read an SAE that SAELens, or :func:`export_saelens`, has written.

    An SAE that hedgelab exported comes back as the class that it was. Others become VanillaSAE (``standard``), TopKSAE
    (``topk``), JumpReLUSAE (``jumprelu``), and, from training checkpoints, BatchTopKSAE and MatryoshkaSAE. Of activations
    that SAELens scaled by ``activation_scaler.json``, the factor is folded into the weights.

    Raises:
        UserError: A file is missing or damaged, or the SAE computes something that hedgelab's do not.
    """
    folder = Path(folder)
    path = folder / CONFIG
    config = _config(path)
    architecture, metadata = config["architecture"], config["metadata"]
    tensors = read_tensors(folder / WEIGHTS)
    _check_not_finetuned(_flag(config, "finetuning_scaling_factor", False, path), tensors, path)
    threshold = {"jumprelu": "threshold", "batchtopk": "topk_threshold", "matryoshka_batchtopk": "topk_threshold"}
    names = [*_WEIGHT_NAMES, *([threshold[architecture]] if architecture in threshold else [])]
    parts = Parts.read(tensors, names, str(folder / WEIGHTS))
    if not _flag(config, "apply_b_dec_to_input", True, path):
        parts = parts.subtracting_b_dec()
    rescaled, threshold_in_norms = config["rescale_acts_by_decoder_norm"], parts.threshold
    if (scale := _input_scale(config, path)) != 1:
        parts = parts.on_raw(scale, None)
        threshold_in_norms = None if threshold_in_norms is None else threshold_in_norms / scale
    if rescaled:
        parts = parts._replace(threshold=None).folded()
        parts = parts._replace(threshold=threshold_in_norms if architecture in _NORM_AWARE else None)
    source = _source(metadata, config, path)
    return _as_it_was(config, parts, str(folder)) or assemble(_class_for(config, path), parts, str(folder)), source


def _config(path: Path) -> dict[str, Any]:
    """``cfg.json``, brought to the form of SAELens 6, and checked."""
    config = read_config(path)
    metadata = config.setdefault("metadata", dict(config))  # before 6.0 everything lay flat
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: damaged (metadata: expected a mapping, got {metadata!r})")
    architecture = config.setdefault("architecture", "standard")
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    if activation == "topk" and architecture in ("standard", "topk"):
        arguments = config.get("activation_fn_kwargs") or {}
        if not isinstance(arguments, dict) or "k" not in {**config, **arguments}:
            raise UserError(f"{path}: activation_fn_kwargs: expected a mapping with k for 'topk', got {arguments!r}")
        architecture = config["architecture"] = "topk"
        config["k"] = arguments.get("k", config.get("k"))
    elif activation not in ("relu", architecture):
        raise UserError(f"{path}: activation_fn: hedgelab reads 'relu' and 'topk', got {activation!r}")
    if architecture not in _READABLE:
        raise UserError(f"{path}: architecture: hedgelab reads {', '.join(_READABLE)}, got {architecture!r}")
    rescaled = _flag(config, "rescale_acts_by_decoder_norm", architecture in _NORM_AWARE, path)
    config["rescale_acts_by_decoder_norm"] = rescaled and architecture in ("topk", *_NORM_AWARE)
    return config


def _input_scale(config: dict[str, Any], path: Path) -> float:
    """What the SAE wants activations to be multiplied by before it reads them."""
    normalised = config.get("normalize_activations") or "none"
    if normalised == "none":
        return 1.0
    if normalised not in (True, "expected_average_only_in"):
        raise UserError(
            f"{path}: normalize_activations: {normalised!r} changes each activation on its own way in, which hedgelab does "
            "not; expected 'none' or 'expected_average_only_in'"
        )
    file = path.with_name(_SCALER)
    if not file.is_file():
        raise UserError(
            f"{path}: normalize_activations: {normalised!r} needs the factor by which activations were multiplied, "
            f'sqrt(d_in) / their mean norm; put {_SCALER} with {{"scaling_factor": FACTOR}} beside it'
        )
    scale = read_config(file).get("scaling_factor")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
        raise UserError(f"{file}: scaling_factor: expected a number above 0, got {scale!r}")
    return float(scale)


def _check_not_finetuned(said: bool, tensors: dict[str, Tensor], path: Path) -> None:
    """Take a scaling factor out of the weights; raise a UserError unless it changes nothing."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if (factor := tensors.pop(name, None)) is not None:
            said = not torch.allclose(factor.float(), torch.ones_like(factor, dtype=torch.float32))
    if said:
        raise UserError(
            f"{path}: finetuning_scaling_factor: a fine-tuned scaling factor for each latent, which hedgelab's SAEs have not"
        )


def _flag(config: dict[str, Any], key: str, default: bool, path: Path) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{path}: {key}: expected true or false, got {value!r}")
    return default if value is None else value


def _class_for(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The class of hedgelab that computes the same, with the arguments that the config has words for."""
    architecture = config["architecture"]
    if architecture == "standard":
        return {"class": "VanillaSAE", "l1_coefficient": _number(config, "l1_coefficient")}
    if architecture == "jumprelu":
        return {"class": "JumpReLUSAE", "l0_coefficient": _number(config, "l0_coefficient")}
    selecting = {"class": "TopKSAE" if architecture == "topk" else "BatchTopKSAE", **_selection(config, path)}
    if architecture != "matryoshka_batchtopk":
        return selecting
    return {"class": "MatryoshkaSAE", "inner": selecting, "levels": config.get("matryoshka_widths", [])}


def _selection(config: dict[str, Any], path: Path) -> dict[str, Any]:
    k = config.get("k")
    if not isinstance(k, (int, float)):
        raise UserError(f"{path}: k: expected a number, got {k!r}")
    k = round(k) if isinstance(k, float) and abs(k) < 1e9 else k  # SAELens allows a fraction as the mean over a batch
    return {
        "k": whole_number(f"{path}: k", k),
        "norm_aware_selection": config["rescale_acts_by_decoder_norm"],
    }


def _number(config: dict[str, Any], key: str) -> float:
    value = config.get(key)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _as_it_was(config: dict[str, Any], parts: Parts, where: str) -> SAE | None:
    """The SAE that hedgelab exported, if this is one and its weights still are those of that class; else None."""
    memory = config["metadata"].get("hedgelab")
    if not isinstance(memory, dict) or not isinstance(memory.get("sae"), dict):
        return None
    try:
        if config["architecture"] != "jumprelu":
            return assemble(memory["sae"], parts._replace(threshold=None), where)
        if "threshold" not in memory:
            return assemble(memory["sae"], parts, where)
        remembered = torch.tensor(float("nan") if memory["threshold"] is None else float(memory["threshold"]))
        sae = assemble(memory["sae"], parts._replace(threshold=remembered), where)
        return sae if _has_thresholds(sae, parts.threshold) else None
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _has_thresholds(sae: SAE, thresholds: Tensor | None) -> bool:
    flat = flat_part(sae)
    if thresholds is None or not isinstance(flat, BatchTopKSAE):
        return False
    return torch.allclose(flat.thresholds().expand(flat.d_sae), thresholds, rtol=1e-4, atol=0)


def _source(metadata: dict[str, Any], config: dict[str, Any], path: Path) -> ActivationSource:
    """What the metadata says of the activations, and what it says that hedgelab's data cannot do."""
    name = metadata.get("hf_hook_name") or metadata.get("hook_name") or metadata.get("hook_point")
    hook, why_not = None if name is None else str(name), f"{CONFIG} names no hook"
    head = metadata.get("hook_head_index", metadata.get("hook_point_head_index"))
    reshaped = config.get("reshape_activations") or "none"
    if reshaped not in ("none", "hook_z"):
        raise UserError(f"{path}: reshape_activations: expected 'none' or 'hook_z', got {reshaped!r}")
    if head is not None:
        hook, why_not = None, f"it reads one head of {name!r} (hook_head_index: {head}), and hedgelab all of them"
    elif reshaped == "hook_z" and "hook_z" not in str(name):
        hook, why_not = None, f"reshape_activations is 'hook_z', but the hook is {name!r}"
    unknown: dict[str, str] = {}
    skip_first = _skip_first(metadata.get("seqpos_slice"), path)
    if skip_first is None:
        positions = metadata["seqpos_slice"]
        unknown["skip_first"] = (
            f"it reads positions {positions} (seqpos_slice), and only first ones can be left out here"
        )
    model, loaded = metadata.get("model_name"), metadata.get("model_from_pretrained_kwargs")
    for key in _CHANGES_THE_MODEL:
        if isinstance(loaded, dict) and loaded.get(key):
            unknown["model"] = f"{model} was loaded with {key}: {loaded[key]}, which data.model cannot say"
    context, bos, text = (metadata.get(key) for key in ("context_size", "prepend_bos", "dataset_path"))
    return source_of(
        model,
        hook,
        why_not,
        unknown,
        context_length=context if type(context) is int else None,
        skip_first=skip_first or 0,
        opens_with_bos=bos if isinstance(bos, bool) else None,
        text=None if text is None else str(text),
        dataset=text if isinstance(text, str) else None,
    )


def _skip_first(positions: Any, path: Path) -> int | None:
    """How many first positions a slice leaves out; None where it leaves out others as well."""
    if positions is None:
        return 0
    numbers = positions if isinstance(positions, list) else []
    if not 1 <= len(numbers) <= 3 or not all(one is None or type(one) is int for one in numbers):
        raise UserError(f"{path}: seqpos_slice: expected a list such as [1, null], got {positions!r}")
    taken = slice(*numbers)
    only_first = (taken.start or 0) >= 0 and taken.stop is None and taken.step in (None, 1)
    return taken.start or 0 if only_first else None
