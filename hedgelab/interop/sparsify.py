"""sparsify's folders: ``cfg.json`` and ``sae.safetensors``, a TopK SAE of one hookpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.interop.parts import Parts, assemble, read_tensors, take
from hedgelab.saes import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def import_sparsify(folder: str | Path) -> tuple[SAE, ActivationSource]:
    """Read a TopK SAE that sparsify has written; the folder's name tells the hook, as sparsify names them.

    Raises:
        UserError: A file is missing or damaged, or it is a transcoder, has a skip connection or another activation.
    """
    folder = Path(folder)
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        k = int(config["k"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read ({type(error).__name__}: {error})") from error
    for key in ("transcode", "skip_connection"):
        if config.get(key):
            raise UserError(f"{folder / CONFIG}: {key}: hedgelab's SAEs reconstruct what they read; this one does not")
    if config.get("activation", "topk") != "topk":
        raise UserError(f"{folder / CONFIG}: activation: hedgelab reads 'topk', got {config['activation']!r}")
    names = ["encoder.weight", "encoder.bias", "W_dec", "b_dec"]
    encoder, b_enc, W_dec, b_dec = take(read_tensors(folder / WEIGHTS), names, str(folder / WEIGHTS))
    normalised = bool(config.get("normalize_decoder", True))
    described = {"class": "TopKSAE", "k": k, "normalize_decoder": normalised}
    sae = assemble(described, Parts(encoder.t(), b_enc, W_dec, b_dec), str(folder))
    return sae, _source(folder.resolve().name)


def _source(hookpoint: str) -> ActivationSource:
    """The hook that a folder is named after, such as ``layers.12`` (below the model's body) or ``layers.12.mlp``."""
    found = re.fullmatch(r"(?:model\.)?(layers\.(\d+)(\..+)?)", hookpoint)
    if not found:
        return ActivationSource()
    return ActivationSource(hook=f"model.{found[1]}", layer=None if found[3] else int(found[2]))
