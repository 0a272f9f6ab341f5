"""SAELens' folders: ``cfg.json`` and ``sae_weights.safetensors``, as ``sae_lens.SAE.load_from_disk`` reads them.

SAELens knows no normalisation by measured constants, so that of the data is folded into the weights: an exported SAE reads
a model's activations as they come. Written after SAELens 6; older folders (before 6.0, flat configs) are read as well.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from hedgelab import __version__
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.interop.parts import Parts, assemble, read_tensors, take
from hedgelab.saes import SAE, BatchTopKSAE, JumpReLUSAE, TopKSAE, VanillaSAE
from hedgelab.saes.widen import flat_part

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
HookNames = Literal["transformers", "transformer_lens"]
_LIBRARY_VERSION = "6.0.0"  # whose format this is
_HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
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
        UserError: TransformerLens has no name for the hook.
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
            "sae_lens_version": _LIBRARY_VERSION,
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
    flat = flat_part(sae)
    if isinstance(flat, VanillaSAE):
        return "standard", Parts.of(flat), {}
    if isinstance(flat, TopKSAE):
        parts = Parts.of(flat)
        extra = {"k": flat.k, "rescale_acts_by_decoder_norm": False}
        return "topk", parts.folded() if flat.norm_aware_selection else parts, extra
    if isinstance(flat, (BatchTopKSAE, JumpReLUSAE)):
        return "jumprelu", Parts.of(flat, flat.thresholds().expand(flat.d_sae)), {}
    raise UserError(f"export: SAELens has nothing like {type(flat).__name__}")


def _metadata(source: ActivationSource | None, hooks: HookNames) -> dict[str, Any]:
    if source is None or source.model is None:
        return {}
    name: dict[str, Any]
    if hooks == "transformer_lens":
        if source.layer is None:
            raise UserError(f"--hooks: TransformerLens has no name for {source.hook}; use --hooks transformers")
        name = {"hook_name": f"blocks.{source.layer}.hook_resid_post", "model_class_name": "HookedTransformer"}
    else:
        name = {"hook_name": source.hook, "model_class_name": "AutoModelForCausalLM"}
    return {
        "model_name": _HUB_NAMES.get(source.model, source.model),
        **name,
        "hf_hook_name": source.hook,
        "context_size": source.context_length,
        "seqpos_slice": [source.skip_first, None],
        "prepend_bos": source.opens_with_bos,
        "exclude_special_tokens": True,
        "dataset_path": source.text,
    }


# -- import --------------------------------------------------------------------------------------------


def import_saelens(folder: str | Path) -> tuple[SAE, ActivationSource]:
    """Read an SAE that SAELens, or :func:`export_saelens`, has written.

    An SAE that hedgelab exported comes back as the class that it was. Others become VanillaSAE (``standard``), TopKSAE
    (``topk``), JumpReLUSAE (``jumprelu``), and, from training checkpoints, BatchTopKSAE and MatryoshkaSAE.

    Raises:
        UserError: A file is missing or damaged, or the SAE computes something that hedgelab's do not.
    """
    folder = Path(folder)
    config = _config(folder)
    where = str(folder)
    architecture = config["architecture"]
    tensors = read_tensors(folder / WEIGHTS)
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise UserError(f"{folder}: has a fine-tuned scaling factor for each latent, which hedgelab's SAEs have not")
    threshold = {"jumprelu": "threshold", "batchtopk": "topk_threshold", "matryoshka_batchtopk": "topk_threshold"}
    names = [*_WEIGHT_NAMES, *([threshold[architecture]] if architecture in threshold else [])]
    parts = Parts(*take(tensors, names, str(folder / WEIGHTS)))
    if not config.get("apply_b_dec_to_input", True):
        parts = parts.subtracting_b_dec()
    if config.get("rescale_acts_by_decoder_norm"):
        norm_aware = architecture in ("batchtopk", "matryoshka_batchtopk")
        threshold_in_norms = parts.threshold
        parts = parts._replace(threshold=None).folded()
        parts = parts._replace(threshold=threshold_in_norms if norm_aware else None)
    source = _source(config["metadata"])
    return _as_it_was(config, parts, where) or assemble(_class_for(architecture, config), parts, where), source


def _config(folder: Path) -> dict[str, Any]:
    """``cfg.json``, brought to the form of SAELens 6, and checked."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: holds no {CONFIG}")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        metadata = config.setdefault("metadata", dict(config))  # before 6.0 everything lay flat
        metadata.setdefault("hook_name", metadata.get("hook_point"))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error})") from error
    arguments = config.get("activation_fn_kwargs") or {}
    if (config.get("activation_fn") or config.get("activation_fn_str")) == "topk" and "k" in arguments:
        config |= {"architecture": "topk", "k": arguments["k"]}
    architecture = config.setdefault("architecture", "standard")
    if architecture not in _READABLE:
        raise UserError(f"{path}: architecture: hedgelab reads {', '.join(_READABLE)}, got {architecture!r}")
    normalised = config.get("normalize_activations") or "none"
    if normalised in ("constant_norm_rescale", "layer_norm", "covariance_whitening"):
        raise UserError(
            f"{path}: normalize_activations: {normalised!r} changes each activation on its own way in, which hedgelab does "
            "not; expected 'none'"
        )
    return config


def _class_for(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """The class of hedgelab that computes the same, with the arguments that the config has words for."""
    inner: dict[str, Any]
    match architecture:
        case "standard":
            return {"class": "VanillaSAE", "l1_coefficient": _number(config, "l1_coefficient")}
        case "topk":
            return {"class": "TopKSAE", **_selection(config)}
        case "jumprelu":
            return {"class": "JumpReLUSAE", "l0_coefficient": _number(config, "l0_coefficient")}
        case "batchtopk":
            return {"class": "BatchTopKSAE", **_selection(config)}
        case _:
            inner = {"class": "BatchTopKSAE", **_selection(config)}
            return {"class": "MatryoshkaSAE", "inner": inner, "levels": config.get("matryoshka_widths", [])}


def _selection(config: dict[str, Any]) -> dict[str, Any]:
    k = config.get("k")
    if not isinstance(k, (int, float)):
        raise UserError(f"{CONFIG}: k: expected a number, got {k!r}")
    return {"k": round(k), "norm_aware_selection": bool(config.get("rescale_acts_by_decoder_norm"))}


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


def _source(metadata: dict[str, Any]) -> ActivationSource:
    """What the metadata says of the activations."""
    hook = metadata.get("hf_hook_name") or metadata.get("hook_name")
    layer = metadata.get("hook_layer")
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_post|(?:\w+\.)+(?:layers|h)\.(\d+)", str(hook)):
        layer = int(found[1] or found[2])
    positions = metadata.get("seqpos_slice") or [0]
    model, context, bos = (metadata.get(key) for key in ("model_name", "context_size", "prepend_bos"))
    return ActivationSource(
        model=model if isinstance(model, str) else None,
        hook=None if hook is None or str(hook).startswith("blocks.") else str(hook),
        layer=layer if isinstance(layer, int) else None,
        context_length=context if isinstance(context, int) else None,
        skip_first=positions[0] if isinstance(positions[0], int) else 0,
        opens_with_bos=bos if isinstance(bos, bool) else None,
        text=None if metadata.get("dataset_path") is None else str(metadata["dataset_path"]),
    )
