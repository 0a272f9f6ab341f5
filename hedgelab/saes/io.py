"""SAEs on disk, read back."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hedgelab.errors import UserError, one_line
from hedgelab.saes.base import CONFIG, SAE, WEIGHTS, decoder_weights
from hedgelab.training.sharding import is_split

save_sae = SAE.save


def load_sae(folder: str | Path, cls: type[SAE] | None = None) -> SAE:
    """Read back what :meth:`SAE.save` wrote, ready to measure or to train on.

    ``cls`` is its class, or one that it inherits from; needed for a class of one's own that is not imported yet. What is
    missing, damaged or of another class is a :class:`~hedgelab.errors.UserError`.
    """
    folder = Path(folder)
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: holds no {name}; expected a folder written by save_sae")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError, MemoryError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged SAE ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: damaged SAE (expected a mapping, got a {type(config).__name__})")
    config.pop("hedgelab", None)
    if (W_dec := decoder_weights(tensors)) is None:
        raise UserError(f"{folder / WEIGHTS}: holds no W_dec; expected the weights of an SAE")
    inner = config["inner"] if isinstance(config.get("inner"), dict) else config
    said, found = (inner.get("d_sae"), config.get("d_out") or config.get("d_in")), tuple(W_dec.shape)
    if len(found) != 2 or any(a not in (None, b) for a, b in zip(said, found, strict=True)):
        # before anything of that size is made
        raise UserError(f"{folder / CONFIG}: d_sae and d_in are {said}, but W_dec in {WEIGHTS} is {found}")
    try:
        sae = (cls or SAE).from_state(config, tensors)
    except RuntimeError as error:  # names or shapes that differ
        reason = one_line(str(error)).partition(": ")[2]
        raise UserError(f"{folder / WEIGHTS}: does not fit {config.get('class')}: {reason}") from error
    if spoiled := [name for name, value in sae.named_parameters() if not torch.isfinite(value).all()]:
        raise UserError(f"{folder / WEIGHTS}: {spoiled[0]} holds NaN or infinity")
    return sae.to(torch.promote_types(sae.W_dec.dtype, torch.float32))


def sae_from_checkpoint(path: str | Path, member: str | None = None, cls: type[SAE] | None = None) -> SAE:
    """The SAE of a training checkpoint, as :meth:`SAE.load_from_checkpoint` reads it; of any imported class, or of ``cls``."""
    return (cls or SAE).load_from_checkpoint(path, member=member)


def gathered(sae: SAE) -> SAE:
    """The SAE, or where its latents are split over processes a copy with all of them; to be called on all processes."""
    return SAE.from_state(sae.config(), sae.full_state()) if is_split(sae.W_dec) else sae


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of a folder's weights: two runs gave the same SAE if and only if it is equal."""
    return hashlib.sha256((Path(folder) / WEIGHTS).read_bytes()).hexdigest()
