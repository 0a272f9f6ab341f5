"""sparsify's folders: ``cfg.json`` and ``sae.safetensors``, a TopK SAE of one hookpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError, whole_number
from hedgelab.interop.names import source_of
from hedgelab.interop.parts import Parts, assemble, read_config, read_tensors
from hedgelab.saes import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_SIZES_AND_TRAINING = {"d_in", "num_latents", "expansion_factor", "k", "normalize_decoder", "multi_topk"}


def import_sparsify(folder: str | Path) -> tuple[SAE, ActivationSource]:
    """Read a TopK SAE that sparsify has written; the folder's name tells the hook, as sparsify names them.

    Raises:
        UserError: A file is missing or damaged, or it is a transcoder, or does anything else that hedgelab's TopK does not.
    """
    folder = Path(folder)
    path = folder / CONFIG
    config = read_config(path)
    for key in ("transcode", "skip_connection"):
        if config.get(key):
            raise UserError(f"{path}: {key}: hedgelab's SAEs reconstruct what they read; this one does not")
    if (activation := config.get("activation", "topk")) != "topk":
        raise UserError(f"{path}: activation: hedgelab reads 'topk', got {activation!r}")
    for key in config.keys() - _SIZES_AND_TRAINING - {"transcode", "skip_connection", "activation"}:
        if config[key]:
            raise UserError(
                f"{path}: {key}: hedgelab does not know what {config[key]!r} changes; expected none or false"
            )
    names = ["encoder.weight", "encoder.bias", "W_dec", "b_dec"]
    parts = Parts.read(read_tensors(folder / WEIGHTS), names, str(folder / WEIGHTS))
    described = {
        "class": "TopKSAE",
        "k": whole_number(f"{path}: k", config.get("k")),
        "normalize_decoder": bool(config.get("normalize_decoder", True)),
    }
    return assemble(described, parts, str(folder)), source_of(_trained_on(folder), folder.resolve().name, "")


def _trained_on(folder: Path) -> Any:
    """The model that the training run's config names, if it lies above as sparsify writes it."""
    run = folder.resolve().parent / "config.json"
    return read_config(run).get("model") if run.is_file() else None
