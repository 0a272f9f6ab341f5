"""SAEs on disk: weights as safetensors, architecture as JSON; loading executes nothing."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hedgelab import __version__
from hedgelab.errors import UserError
from hedgelab.saes.base import SAE
from hedgelab.saes.parallel import is_split, whole

WEIGHTS, CONFIG = "sae.safetensors", "sae.json"


def save_sae(sae: SAE, folder: str | Path) -> None:
    """Write ``sae.safetensors`` (weights and buffers) and ``sae.json`` (architecture) into a folder, made if missing.

    Of an SAE whose latents are split over processes, all of them must call this; the process of rank 0 writes.
    """
    folder = Path(folder)
    tensors = {name: whole(value).cpu().contiguous() for name, value in sae.state_dict().items()}
    if is_split(sae.W_dec) and torch.distributed.get_rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"hedgelab": __version__, **sae.config()}, indent=2) + "\n")


def load_sae(folder: str | Path) -> SAE:
    """Read an SAE back, ready to measure or to train on.

    Raises:
        UserError: A file is missing or damaged, or names an SAE that hedgelab does not have.
    """
    folder = Path(folder)
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: holds no {name}; expected a folder written by save_sae")
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged SAE ({error})") from error
    config.pop("hedgelab", None)
    sae = build_sae(config)
    problems = sae.load_state_dict(tensors, strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        wrong = ", ".join([*problems.missing_keys, *problems.unexpected_keys])
        raise UserError(f"{folder / WEIGHTS}: does not fit {config.get('class')}: check {wrong}")
    sae.initialized = True
    return sae


def build_sae(config: dict[str, Any]) -> SAE:
    """An SAE of the architecture that :meth:`SAE.config` described, with fresh weights."""
    import hedgelab.saes as saes

    arguments = dict(config)
    name = arguments.pop("class", None)
    cls = getattr(saes, name, None) if isinstance(name, str) and name in saes.__all__ else None
    if not (isinstance(cls, type) and issubclass(cls, SAE)):
        raise UserError(f"sae.json: class: must be an SAE of hedgelab, got {name!r}")
    if isinstance(arguments.get("inner"), dict):
        inner = arguments["inner"]
        arguments["inner"] = functools.partial(_build_inner, inner)
    try:
        return cls(**arguments)
    except TypeError as error:
        raise UserError(f"sae.json: {error}") from error


def _build_inner(config: dict[str, Any], d_in: int) -> SAE:
    return build_sae({**config, "d_in": d_in})


def gathered(sae: SAE) -> SAE:
    """The SAE, or where its latents are split over processes a whole copy of it; to be called on all processes."""
    if not is_split(sae.W_dec):
        return sae
    copy = build_sae(sae.config())
    copy.load_state_dict({name: whole(value).cpu() for name, value in sae.state_dict().items()})
    copy.initialized = True
    return copy


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of a folder's weights: two runs gave the same SAE if and only if it is equal."""
    return hashlib.sha256((Path(folder) / WEIGHTS).read_bytes()).hexdigest()


def same_weights(a: SAE, b: SAE) -> bool:
    """Whether two SAEs hold bit-identical weights and buffers."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
