"""SAELens' folders: ``cfg.json`` and ``sae_weights.safetensors``, as ``sae_lens.SAE.load_from_disk`` reads them.

SAELens knows no normalisation by measured constants, so that of the data is folded into the weights: an exported SAE reads
a model's activations as they come. Written after SAELens 6; older folders (before 6.0, flat configs) are read as well.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from hedgelab.data.llm.model import first_line, hub_problem
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.interop.foreign import PAYS, Layout, Parts, assemble, read_config, read_tensors, source_of, understood, widened
from hedgelab.saes import SAE, BatchTopKSAE, JumpReLUSAE, TopKSAE, VanillaSAE
from hedgelab.saes.widen import flat_part
from hedgelab.version import __version__

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
HookNames = Literal["transformers", "transformer_lens"]
WRITTEN_FOR = "6.54.12"  # the release of SAELens whose format exports have, and against which they are tested
_NAMES, _SCALED = ("W_enc", "b_enc", "W_dec", "b_dec"), ("scaling_factor", "finetuning_scaling_factor")
_GATED = ("W_enc", "b_mag", "W_dec", "b_dec", "b_gate", "r_mag")
LAYOUTS = {
    "standard": Layout("VanillaSAE", _NAMES),
    "topk": Layout("TopKSAE", _NAMES),
    "abstopk": Layout("AbsTopKSAE", _NAMES),
    "jumprelu": Layout("JumpReLUSAE", (*_NAMES, "threshold")),
    "gated": Layout("JumpReLUSAE", _GATED, Parts.ungated),
    "transcoder": Layout("InferenceSAE", _NAMES),
    "skip_transcoder": Layout("InferenceSAE", (*_NAMES, None, None, "W_skip")),
    "jumprelu_transcoder": Layout("InferenceSAE", (*_NAMES, "threshold")),
    "jumprelu_skip_transcoder": Layout("InferenceSAE", (*_NAMES, "threshold", None, "W_skip")),
    "batchtopk": Layout("BatchTopKSAE", (*_NAMES, "topk_threshold")),
    "matryoshka_batchtopk": Layout("MatryoshkaSAE", (*_NAMES, "topk_threshold")),
}
"""The architectures that are read; the last two are those of training checkpoints."""
_NORM_AWARE = ("batchtopk", "matryoshka_batchtopk")  # their thresholds are in units of pre-activation · decoder norm
_SELECTS_K = ("TopKSAE", "AbsTopKSAE")
_PER_ACTIVATION = ("layer_norm", "constant_norm_rescale")
_REFUSED = {
    "temporal": "reads earlier positions too, and hedgelab encodes each activation by itself",
    "matching_pursuit": "takes latents one after another, each by what the others leave, and hedgelab all at once",
    "covariance_whitening": "is not folded into the weights; call the SAE's fold_activation_whitening and save it again",
}
_SCALER = "activation_scaler.json"
_CHANGES_THE_MODEL = ("center_writing_weights", "revision", "checkpoint_index", "checkpoint_value")
_HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def export_saelens(
    sae: SAE, folder: str | Path, source: ActivationSource | None = None, hooks: HookNames = "transformers"
) -> dict[str, Any]:
    """Write an SAE for SAELens: vanilla as ``standard``, TopK as ``topk``, all others as ``jumprelu``; what ``cfg.json`` holds.

    Latents keep their activations, except where TopK selects norm-aware: there decoder norms are folded in, since that
    is what makes SAELens select alike. Training state (dead-latent clocks, optimiser) stays behind.

    The normalisation of the source is folded in; without one, no model and hook are written. ``hooks`` are named by module
    path, which SAELens finds with the class ``AutoModelForCausalLM`` in any model, or as TransformerLens names the residual
    stream. An SAE for which SAELens has nothing, or a hook for which TransformerLens has no name, is a UserError.
    """
    folder, flat = Path(folder), flat_part(sae)
    architecture, parts, extra = _for_saelens(sae)
    memory: dict[str, Any] = {"version": __version__, "sae": sae.config()}
    scale = 1.0 if source is None else source.scale
    if isinstance(flat, BatchTopKSAE):
        threshold = float(flat.threshold) / (scale if flat.norm_aware_selection else 1.0)  # in units of what is written
        memory["threshold"] = None if math.isnan(threshold) else threshold
    if source is not None:
        parts = parts.on_raw(scale, None if source.mean is None else torch.tensor(source.mean))
        memory["text"] = source.text
        memory["folded"] = {"normalisation": source.normalisation, "scale": scale, "centred": source.mean is not None}
    versions = {"sae_lens_version": WRITTEN_FOR, "sae_lens_training_version": None}
    config = {
        "architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none", **extra,
        "metadata": {**versions, **_metadata(source, hooks), "hedgelab": memory},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in parts._asdict().items() if value is not None}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return config


def _for_saelens(sae: SAE) -> tuple[str, Parts, dict[str, Any]]:
    """Architecture, weights and further arguments of SAELens's class that computes the same, if it has one."""
    flat: Any = flat_part(sae)
    kinds = {VanillaSAE: "standard", TopKSAE: "topk", BatchTopKSAE: "jumprelu", JumpReLUSAE: "jumprelu"}
    architecture = next((name for kind, name in kinds.items() if isinstance(flat, kind)), "")
    threshold = [flat.thresholds().expand(flat.d_sae)] if architecture == "jumprelu" else []
    tensors = (flat.W_enc, flat.b_enc, flat.W_dec, flat.b_dec, *threshold)
    parts = Parts(*(one.detach().cpu().float().clone() for one in tensors))
    extra = {"k": flat.k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}
    parts = parts.folded() if extra and flat.norm_aware_selection else parts
    if not architecture or not _computes(sae, parts, extra.get("k")):
        name = type(sae).__name__
        raise UserError(f"export: SAELens knows nothing that computes what {name} does; --format hedgelab keeps it")
    return architecture, parts, extra


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
    """What SAELens is told of the activations."""
    if source is None or source.model is None:
        return {}
    hook, model_class = source.hook, "HookedTransformer"
    name, is_path = hook, hook is not None and "hook_" not in hook
    if is_path and hooks == "transformers":
        model_class = "AutoModelForCausalLM"
        if str(hook).endswith(".input"):
            raise UserError(f"export: {hook} is what goes into a module; SAELens reads what comes out of one")
    elif source.layer is not None:
        name = f"blocks.{source.layer}.hook_resid_post"
    elif is_path:
        raise UserError(f"--hooks: TransformerLens has no name for {hook}; use --hooks transformers")
    dataset = None if source.dataset is None or Path(source.dataset).exists() else source.dataset  # not a local folder
    return {
        "model_name": _HUB_NAMES.get(source.model, source.model),
        **({} if name is None else {"hook_name": name, "model_class_name": model_class}),
        **({"hf_hook_name": hook} if is_path else {}),
        "context_size": source.context_length,
        "seqpos_slice": [source.skip_first, None],
        "prepend_bos": source.opens_with_bos,
        "exclude_special_tokens": True,
        **({} if dataset is None else {"dataset_path": dataset}),
    }


def import_saelens(folder: str | Path) -> tuple[SAE, ActivationSource]:
    """Read an SAE that SAELens, or :func:`export_saelens`, has written, and what it reads.

    An SAE that hedgelab exported comes back as the class that it was, others become what :data:`LAYOUTS` says, or an
    ``InferenceSAE`` where each activation is normalised by itself. Of activations that SAELens scaled by
    ``activation_scaler.json``, the factor is folded into the weights. What is missing or damaged, or computes something that
    hedgelab's SAEs do not, is a UserError.
    """
    path = Path(folder) / CONFIG
    return _converted(read_config(path), read_tensors(path.with_name(WEIGHTS)), path)


def from_saelens(sae: Any) -> tuple[SAE, ActivationSource]:
    """The same of an SAE of SAELens in memory, as ``SAE.from_pretrained`` or a training gives it; it is left as it is.

    ``encode`` and ``decode`` are those of the SAE, to float32 rounding (float64 where it is in that). The error term is none of
    them: SAELens adds it where it splices an SAE into a model. BatchTopK SAEs in training select by their threshold.

    >>> from types import SimpleNamespace as Made
    >>> shapes = {"W_enc": (1, 2), "b_enc": (2,), "W_dec": (2, 1), "b_dec": (1,)}
    >>> config = {"architecture": "standard", "metadata": {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post"}}
    >>> theirs = Made(cfg=Made(to_dict=lambda: config), state_dict=lambda: {k: torch.ones(v) for k, v in shapes.items()})
    >>> sae, source = from_saelens(theirs)
    >>> sae.encode(torch.tensor([[3.0]])).to_dense().tolist(), source.layer
    ([[3.0, 3.0]], 3)
    """
    if not hasattr(getattr(sae, "cfg", None), "to_dict"):
        raise UserError(f"from_saelens: expected an SAE of SAELens 6, got a {type(sae).__name__}")
    return _converted(dict(sae.cfg.to_dict()), widened(sae.state_dict()), f"SAELens's {type(sae).__name__}")


def import_pretrained(name: str) -> tuple[SAE, ActivationSource]:
    """The SAE that ``SAE.from_pretrained(release, id)`` gives, by ``release/id``; the release may be ``user/repository``."""
    try:
        import sae_lens
        from huggingface_hub import constants
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    except ImportError as error:
        raise UserError(f"saelens:{name}: SAELens is not there ({error}); pip install 'hedgelab[saelens]'") from None
    constants.HF_HUB_OFFLINE |= hub_problem() is not None  # the cache may have it; the client retries for a minute
    words = name.split("/")
    count = 1 if words[0] in get_pretrained_saes_directory() else 2
    try:
        found = sae_lens.SAE.from_pretrained("/".join(words[:count]), "/".join(words[count:]))
    except Exception as error:  # its own errors, and those of what it downloads with
        raise UserError(f"saelens:{name}: SAELens does not give it ({first_line(error)})") from error
    return from_saelens(found)


def _converted(config: dict[str, Any], tensors: dict[str, Tensor], where: Path | str) -> tuple[SAE, ActivationSource]:
    """The SAE of a config and weights; ``where`` is the config's file, or names an SAE in memory."""
    metadata = config.setdefault("metadata", dict(config))  # before 6.0 everything lay flat
    if not isinstance(metadata, dict):
        raise UserError(f"{where}: damaged (metadata: expected a mapping, got {metadata!r})")
    for key in ("architecture", "normalize_activations"):
        if reason := _REFUSED.get(str(config.get(key))):
            raise UserError(f"{where}: {key}: {config[key]!r} {reason}")
    architecture, k = understood(config, "architecture", where, *LAYOUTS), config.get("k")
    key = "activation_fn" if config.get("activation_fn") else "activation_fn_str"
    known = ("relu", "topk") if architecture in ("standard", "topk") else ("relu", architecture)
    if understood(config, key, where, *known) == "topk":
        arguments = config.get("activation_fn_kwargs")
        architecture, k = "topk", arguments.get("k", k) if isinstance(arguments, dict) else k
    layout, norm_aware = LAYOUTS[architecture], architecture in _NORM_AWARE
    selects_k, transcodes = layout.becomes in _SELECTS_K, layout.becomes == "InferenceSAE"
    factors = [tensors.pop(name) for name in _SCALED if name in tensors]
    folder = where.parent if isinstance(where, Path) else where
    parts = layout.read(tensors, folder)
    if not understood(config, "apply_b_dec_to_input", where, True, False) and not transcodes:
        parts = parts.subtracting_b_dec()
    scale, kind = _input_scale(config, where)
    parts = parts.on_raw(scale)
    rescaled = understood(config, "rescale_acts_by_decoder_norm", where, norm_aware, not norm_aware)
    if rescaled := rescaled and (norm_aware or selects_k):
        parts = parts.folded()._replace(threshold=None if parts.threshold is None else parts.threshold / scale)
    is_tuned = understood(config, "finetuning_scaling_factor", where, False, True) and not rescaled
    parts = _tuned(parts, factors, is_tuned, where)
    sae = _as_it_was(metadata.get("hedgelab"), parts, where) if kind == "none" else None
    if kind != "none" or transcodes:
        arguments = {"k": k, "signed": layout.becomes == "AbsTopKSAE"} if selects_k else {}
        if transcodes:
            writes = {"d_out": parts.W_dec.shape[1], "hook_out": metadata.get("hook_name_out")}
            arguments = {**writes, "skip": parts.W_skip is not None}
        sae = assemble({"class": "InferenceSAE", "normalize_activations": kind, **arguments}, parts, folder)
    if sae is None:
        cost, levels = config.get(PAYS.get(layout.becomes, "")), config.get("matryoshka_widths", [])
        sae = layout.sae(parts, folder, k, cost, levels, norm_aware_selection=rescaled)
    return sae, _source(config, where)


def _tuned(parts: Parts, factors: list[Tensor], is_tuned: bool, where: object) -> Parts:
    """Weights with what SAELens before 6.0 multiplied activations by where it decoded them, ``[d_sae]``."""
    for factor in factors:
        if factor.shape != parts.b_enc.shape:
            raise UserError(f"{where}: scaling_factor: expected {list(parts.b_enc.shape)}, got {list(factor.shape)}")
        if not is_tuned and not torch.allclose(factor, torch.ones_like(factor)):
            raise UserError(f"{where}: finetuning_scaling_factor: is false, but the weights hold a scaling_factor")
        parts = parts._replace(W_dec=parts.W_dec * factor[:, None].to(parts.W_dec))
    return parts


def _input_scale(config: dict[str, Any], where: Path | str) -> tuple[float, str]:
    """What the SAE wants activations to be multiplied by before it reads them, and how it normalises each by itself."""
    known = ("none", "expected_average_only_in", *_PER_ACTIVATION, True, False)
    kind = understood(config, "normalize_activations", where, *known)
    if kind in ("none", False, *_PER_ACTIVATION):
        return 1.0, kind or "none"
    if isinstance(where, str):
        fix = "call its fold_activation_norm_scaling_factor(sqrt(d_in) / mean norm of the activations) first"
        raise UserError(f"{where}: normalize_activations: {kind!r} is not folded into the weights; {fix}")
    file = where.with_name(_SCALER)
    if not file.is_file():
        fix = f'put {_SCALER} with {{"scaling_factor": sqrt(d_in) / mean norm of the activations}} beside it'
        raise UserError(f"{where}: normalize_activations: {kind!r} needs the factor; {fix}")
    scale: Any = read_config(file).get("scaling_factor")
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise UserError(f"{file}: scaling_factor: expected a number above 0, got {scale!r}")
    return float(scale), "none"


def _as_it_was(memory: Any, parts: Parts, where: object) -> SAE | None:
    """The SAE that hedgelab exported, if this is one and its thresholds still are those of that class; else None."""
    try:
        threshold = parts.threshold
        if "threshold" in memory:
            threshold = torch.tensor(float("nan" if memory["threshold"] is None else memory["threshold"]))
        sae = assemble(memory["sae"], parts._replace(threshold=threshold), where)
        if threshold is None:
            return sae
        thresholds: Any = flat_part(sae).thresholds().expand(sae.d_sae)  # type: ignore[operator]
        return sae if torch.allclose(thresholds, parts.threshold, rtol=1e-4, atol=0) else None  # type: ignore[arg-type]
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _source(config: dict[str, Any], where: object) -> ActivationSource:
    """What the metadata says of the activations, and what it says that hedgelab's data cannot do."""
    metadata, unknown = config["metadata"], {}
    name = metadata.get("hf_hook_name") or metadata.get("hook_name") or metadata.get("hook_point")
    head = metadata.get("hook_head_index", metadata.get("hook_point_head_index"))
    if name is None:
        unknown["layer"] = f"{CONFIG} names no hook"
    elif head is not None:
        unknown["layer"] = f"it reads one head of {name!r} (hook_head_index: {head}), and hedgelab all of them"
    elif understood(config, "reshape_activations", where, "none", "hook_z") == "hook_z" and "hook_z" not in str(name):
        unknown["layer"] = f"reshape_activations is 'hook_z', but the hook is {name!r}"
    positions = metadata.get("seqpos_slice")
    try:
        taken = slice(*([None] if positions is None else positions))
        taken.indices(1)
    except (TypeError, ValueError):
        raise UserError(f"{where}: seqpos_slice: expected a list such as [1, null], got {positions!r}") from None
    skip_first = taken.start or 0
    if skip_first < 0 or taken.stop is not None or taken.step not in (None, 1):
        unknown["skip_first"] = f"it reads positions {positions} (seqpos_slice); only first ones can be left out here"
        skip_first = 0
    model, loaded = metadata.get("model_name"), metadata.get("model_from_pretrained_kwargs")
    for key in _CHANGES_THE_MODEL:
        if isinstance(loaded, dict) and loaded.get(key):
            unknown["model"] = f"{model} was loaded with {key}: {loaded[key]}, which data.model cannot say"
    context, bos, text = (metadata.get(key) for key in ("context_size", "prepend_bos", "dataset_path"))
    context, bos = context if type(context) is int else None, bos if isinstance(bos, bool) else None
    text, dataset = None if text is None else str(text), text if isinstance(text, str) else None
    reads = {"context_length": context, "skip_first": skip_first, "opens_with_bos": bos}
    return source_of(model, name, unknown, **reads, text=text, dataset=dataset)
