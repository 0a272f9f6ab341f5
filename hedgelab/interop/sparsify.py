"""sparsify's folders: ``cfg.json`` and ``sae.safetensors``, a TopK SAE of one hookpoint."""

from __future__ import annotations

from pathlib import Path

from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError, whole_number
from hedgelab.interop.foreign import Layout, assemble, read_config, read_tensors, source_of
from hedgelab.saes import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
LAYOUT = Layout("TopKSAE", ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
_SIZES_AND_TRAINING = {"d_in", "num_latents", "expansion_factor", "k", "normalize_decoder", "multi_topk"}


def import_sparsify(folder: str | Path) -> tuple[SAE, ActivationSource]:
    """Read a TopK SAE that sparsify has written; the folder's name tells the hook, as sparsify names them."""
    folder = Path(folder)
    path = folder / CONFIG
    config = read_config(path)
    for key in ("transcode", "skip_connection"):
        if config.pop(key, None):
            raise UserError(f"{path}: {key}: hedgelab's SAEs reconstruct what they read; this one does not")
    if (activation := config.pop("activation", "topk")) != "topk":
        raise UserError(f"{path}: activation: hedgelab reads 'topk', got {activation!r}")
    for key in config.keys() - _SIZES_AND_TRAINING:
        if config[key]:
            raise UserError(
                f"{path}: {key}: hedgelab does not know what {config[key]!r} changes; expected none or false"
            )
    parts = LAYOUT.read(read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    selection = {
        "k": whole_number(f"{path}: k", config.get("k")),
        "normalize_decoder": bool(config.get("normalize_decoder", True)),
    }
    run = folder.resolve().parent / "config.json"  # the training run's, if it lies above as sparsify writes it
    model = read_config(run).get("model") if run.is_file() else None
    source = source_of(model, folder.resolve().name, "")
    return assemble({"class": LAYOUT.becomes, **selection}, parts, folder), source
