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
from hedgelab.interop.foreign import Layout, Parts, assemble, read_config, read_tensors, source_of
from hedgelab.saes import SAE, BatchTopKSAE, JumpReLUSAE, TopKSAE, VanillaSAE
from hedgelab.saes.widen import flat_part

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
HookNames = Literal["transformers", "transformer_lens"]
WRITTEN_FOR = "6.54.12"
"""The release of SAELens whose format exports have, and against which they are tested."""
_NAMES, _SCALED = ("W_enc", "b_enc", "W_dec", "b_dec"), ("scaling_factor", "finetuning_scaling_factor")
LAYOUTS = {
    "standard": Layout("VanillaSAE", _NAMES, spare=_SCALED, coefficient="l1_coefficient"),
    "topk": Layout("TopKSAE", _NAMES, spare=_SCALED),
    "jumprelu": Layout("JumpReLUSAE", (*_NAMES, "threshold"), spare=_SCALED, coefficient="l0_coefficient"),
    "batchtopk": Layout("BatchTopKSAE", (*_NAMES, "topk_threshold"), spare=_SCALED),
    "matryoshka_batchtopk": Layout("MatryoshkaSAE", (*_NAMES, "topk_threshold"), spare=_SCALED),
}
"""The architectures that are read; the last two are those of training checkpoints."""
_NORM_AWARE = ("batchtopk", "matryoshka_batchtopk")
"""Architectures whose thresholds are in units of pre-activation times decoder norm."""
_SCALER = "activation_scaler.json"
_CHANGES_THE_MODEL = ("center_writing_weights", "revision", "checkpoint_index", "checkpoint_value")
_HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


# -- export --------------------------------------------------------------------------------------------


def export_saelens(
    sae: SAE, folder: str | Path, source: ActivationSource | None = None, hooks: HookNames = "transformers"
) -> dict[str, Any]:
    """Write an SAE for SAELens: vanilla as ``standard``, TopK as ``topk``, all others as ``jumprelu``; what ``cfg.json`` holds.

    Latents keep their activations, except where TopK selects norm-aware: there decoder norms are folded in, since that
    is what makes SAELens select alike. Training state (dead-latent clocks, optimiser) stays behind.

    Args:
        sae: The SAE.
        folder: Made if missing.
        source: What the SAE reads; its normalisation is folded in. None writes no model and hook.
        hooks: How the hook is named: by module path, which SAELens finds with the model class ``AutoModelForCausalLM`` in
            any model, or as TransformerLens names the residual stream.

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
    """Architecture, weights and further arguments of SAELens's class that computes the same, if it has one."""
    flat: Any = getattr(sae, "inner", sae)
    kinds = {VanillaSAE: "standard", TopKSAE: "topk", BatchTopKSAE: "jumprelu", JumpReLUSAE: "jumprelu"}
    architecture = next((name for kind, name in kinds.items() if isinstance(flat, kind)), None)
    if architecture is not None:
        parts = Parts.of(flat, flat.thresholds().expand(flat.d_sae) if architecture == "jumprelu" else None)
        extra = {"k": flat.k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}
        parts = parts.folded() if extra and flat.norm_aware_selection else parts
        if _computes(sae, parts, extra.get("k")):
            return architecture, parts, extra
    raise UserError(
        f"export: SAELens knows nothing that computes what {type(sae).__name__} does; --format hedgelab keeps it"
    )


@torch.no_grad()
def _computes(sae: SAE, parts: Parts, k: int | None) -> bool:
    """Whether an SAE computes what ReLU, threshold or TopK make of these weights, by trying it on random activations."""
    sizes, generator = torch.logspace(-2, 2, 64)[:, None], torch.Generator().manual_seed(0)
    x = torch.randn(64, sae.d_in, generator=generator) * sizes + parts.b_dec
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
    hook, name = source.hook, {}
    is_path = hook is not None and "hook_" not in hook
    if is_path and hooks == "transformers":
        if str(hook).endswith(".input"):
            raise UserError(f"export: {hook} is what goes into a module; SAELens reads what comes out of one")
        name = {"hook_name": hook, "model_class_name": "AutoModelForCausalLM"}
    elif source.layer is not None:
        name = {"hook_name": f"blocks.{source.layer}.hook_resid_post", "model_class_name": "HookedTransformer"}
    elif is_path:
        raise UserError(f"--hooks: TransformerLens has no name for {hook}; use --hooks transformers")
    elif hook is not None:
        name = {"hook_name": hook, "model_class_name": "HookedTransformer"}
    dataset = None if source.dataset is None or Path(source.dataset).exists() else source.dataset  # not a local folder
    return {
        "model_name": _HUB_NAMES.get(source.model, source.model),
        **name,
        **({"hf_hook_name": hook} if is_path else {}),
        "context_size": source.context_length,
        "seqpos_slice": [source.skip_first, None],
        "prepend_bos": source.opens_with_bos,
        "exclude_special_tokens": True,
        **({} if dataset is None else {"dataset_path": dataset}),
    }


# -- import --------------------------------------------------------------------------------------------


def import_saelens(folder: str | Path) -> tuple[SAE, ActivationSource]:
    """Read an SAE that SAELens, or :func:`export_saelens`, has written.

    An SAE that hedgelab exported comes back as the class that it was, others become what :data:`LAYOUTS` says. Of activations
    that SAELens scaled by ``activation_scaler.json``, the factor is folded into the weights.

    Raises:
        UserError: A file is missing or damaged, or the SAE computes something that hedgelab's do not.
    """
    folder = Path(folder)
    path = folder / CONFIG
    config = _config(path)
    layout, norm_aware = LAYOUTS[config["architecture"]], config["architecture"] in _NORM_AWARE
    tensors = read_tensors(folder / WEIGHTS)
    factors = [tensors[name].float() for name in _SCALED if name in tensors]
    if any(not torch.allclose(one, torch.ones_like(one)) for one in factors) if factors else config[_SCALED[1]]:
        raise UserError(
            f"{path}: finetuning_scaling_factor: a fine-tuned scaling factor for each latent, which hedgelab's SAEs have not"
        )
    parts = layout.read(tensors, folder / WEIGHTS)
    if not config["apply_b_dec_to_input"]:
        parts = parts.subtracting_b_dec()
    scale = _input_scale(config, path)
    if scale != 1:
        parts = parts.on_raw(scale, None)
    rescaled = config["rescale_acts_by_decoder_norm"]
    if rescaled:
        threshold = parts.threshold / scale if norm_aware and parts.threshold is not None else None
        parts = parts._replace(threshold=None).folded()._replace(threshold=threshold)
    sae = _as_it_was(config, parts, folder)
    if sae is None:
        selection = {"k": _k(config.get("k"), path), "norm_aware_selection": rescaled} if layout.selects else {}
        sae = assemble(layout.config(config, selection, config.get("matryoshka_widths", [])), parts, folder)
    return sae, _source(config, path)


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
    if not isinstance(architecture, str) or architecture not in LAYOUTS:
        raise UserError(f"{path}: architecture: hedgelab reads {', '.join(LAYOUTS)}, got {architecture!r}")
    norm_aware = architecture in _NORM_AWARE
    flags = {
        "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": norm_aware,
        "finetuning_scaling_factor": False,
    }
    for key, default in flags.items():
        config[key] = default if config.get(key) is None else config[key]
        if not isinstance(config[key], bool):
            raise UserError(f"{path}: {key}: expected true or false, got {config[key]!r}")
    config["rescale_acts_by_decoder_norm"] &= norm_aware or architecture == "topk"
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


def _k(k: Any, path: Path) -> int:
    if not isinstance(k, (int, float)):
        raise UserError(f"{path}: k: expected a number, got {k!r}")
    # SAELens allows a fraction as the mean over a batch
    return whole_number(f"{path}: k", round(k) if isinstance(k, float) and abs(k) < 1e9 else k)


def _as_it_was(config: dict[str, Any], parts: Parts, where: Path) -> SAE | None:
    """The SAE that hedgelab exported, if this is one and its weights still are those of that class; else None."""
    try:
        memory = config["metadata"]["hedgelab"]
        if config["architecture"] != "jumprelu":
            return assemble(memory["sae"], parts._replace(threshold=None), where)
        if "threshold" not in memory:
            return assemble(memory["sae"], parts, where)
        threshold = torch.tensor(float("nan") if memory["threshold"] is None else float(memory["threshold"]))
        sae: Any = assemble(memory["sae"], parts._replace(threshold=threshold), where)
        thresholds: Tensor = flat_part(sae).thresholds().expand(sae.d_sae)  # type: ignore[operator]
        return sae if torch.allclose(thresholds, parts.threshold, rtol=1e-4, atol=0) else None  # type: ignore[arg-type]
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _source(config: dict[str, Any], path: Path) -> ActivationSource:
    """What the metadata says of the activations, and what it says that hedgelab's data cannot do."""
    metadata = config["metadata"]
    name = metadata.get("hf_hook_name") or metadata.get("hook_name") or metadata.get("hook_point")
    head = metadata.get("hook_head_index", metadata.get("hook_point_head_index"))
    reshaped = config.get("reshape_activations") or "none"
    if reshaped not in ("none", "hook_z"):
        raise UserError(f"{path}: reshape_activations: expected 'none' or 'hook_z', got {reshaped!r}")
    why_not = "" if name is not None else f"{CONFIG} names no hook"
    if head is not None:
        why_not = f"it reads one head of {name!r} (hook_head_index: {head}), and hedgelab all of them"
    elif reshaped == "hook_z" and "hook_z" not in str(name):
        why_not = f"reshape_activations is 'hook_z', but the hook is {name!r}"
    unknown: dict[str, str] = {}
    positions = metadata.get("seqpos_slice")
    numbers = [None] if positions is None else positions if isinstance(positions, list) else []
    if not 1 <= len(numbers) <= 3 or not all(one is None or type(one) is int for one in numbers):
        raise UserError(f"{path}: seqpos_slice: expected a list such as [1, null], got {positions!r}")
    taken = slice(*numbers)
    skip_first = taken.start or 0
    if skip_first < 0 or taken.stop is not None or taken.step not in (None, 1):
        unknown["skip_first"] = (
            f"it reads positions {positions} (seqpos_slice), and only first ones can be left out here"
        )
        skip_first = 0
    model, loaded = metadata.get("model_name"), metadata.get("model_from_pretrained_kwargs")
    for key in _CHANGES_THE_MODEL:
        if isinstance(loaded, dict) and loaded.get(key):
            unknown["model"] = f"{model} was loaded with {key}: {loaded[key]}, which data.model cannot say"
    context, bos, text = (metadata.get(key) for key in ("context_size", "prepend_bos", "dataset_path"))
    return source_of(
        model,
        None if why_not else str(name),
        why_not,
        unknown,
        context_length=context if type(context) is int else None,
        skip_first=skip_first,
        opens_with_bos=bos if isinstance(bos, bool) else None,
        text=None if text is None else str(text),
        dataset=text if isinstance(text, str) else None,
    )
