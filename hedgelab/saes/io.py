"""SAEs on disk: weights as safetensors, architecture as JSON; loading executes nothing."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hedgelab import __version__
from hedgelab.errors import UserError
from hedgelab.saes.base import SAE, init_parameters
from hedgelab.training.sharding import full_tensor, is_split

WEIGHTS, CONFIG = "sae.safetensors", "sae.json"


def save_sae(sae: SAE, folder: str | Path) -> None:
    """Write ``sae.safetensors`` (weights and buffers) and ``sae.json`` (architecture) into a folder, made if missing.

    Of an SAE whose latents are split over processes, all of them must call this; the process of rank 0 writes.
    """
    folder = Path(folder)
    tensors = {name: full_tensor(value).cpu().contiguous() for name, value in sae.state_dict().items()}
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
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError, MemoryError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged SAE ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: damaged SAE (expected a mapping, got a {type(config).__name__})")
    config.pop("hedgelab", None)
    _check_size(config, tensors, folder)
    sae = build_sae(config).to(torch.promote_types(_weights_type(tensors), torch.float32))
    try:
        problems = sae.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # shapes that differ
        reason = " ".join(str(error).split()).partition(": ")[2]
        raise UserError(f"{folder / WEIGHTS}: does not fit {config.get('class')}: {reason}") from error
    if spoiled := [name for name, value in sae.named_parameters() if not torch.isfinite(value).all()]:
        raise UserError(f"{folder / WEIGHTS}: {spoiled[0]} holds NaN or infinity")
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
    if unknown := arguments.keys() - (init_parameters(cls) - cls.not_architecture):
        raise UserError(f"sae.json: {min(unknown)!r}: unknown key of {name}")
    if isinstance(arguments.get("inner"), dict):
        inner = arguments["inner"]
        arguments["inner"] = functools.partial(_build_inner, inner)
    try:
        return cls(**arguments)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"sae.json: cannot be made into a {name} ({' '.join(str(error).split())})") from error


def _check_size(config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """See that the architecture has the weights' size before anything of that size is made.

    Raises:
        UserError: It has not.
    """
    inner = config["inner"] if isinstance(config.get("inner"), dict) else config
    said = (inner.get("d_sae"), config.get("d_in"))
    found = next((tuple(value.shape) for name, value in tensors.items() if name.rpartition(".")[2] == "W_dec"), None)
    if found is None:
        raise UserError(f"{folder / WEIGHTS}: holds no W_dec; expected the weights of an SAE")
    if said != found:
        raise UserError(f"{folder / CONFIG}: d_sae and d_in are {said}, but W_dec in {WEIGHTS} is {found}")


def _build_inner(config: dict[str, Any], d_in: int) -> SAE:
    return build_sae({**config, "d_in": d_in})


def gathered(sae: SAE) -> SAE:
    """The SAE, or where its latents are split over processes a whole copy of it; to be called on all processes."""
    if not is_split(sae.W_dec):
        return sae
    return copy_of(sae.config(), {name: full_tensor(value).cpu() for name, value in sae.state_dict().items()})


def copy_of(config: dict[str, Any], state: Mapping[str, torch.Tensor]) -> SAE:
    """The SAE that another's :meth:`SAE.config` and ``state_dict`` tell of, ready to measure or to train on."""
    copy = build_sae(config).to(_weights_type(state))
    copy.load_state_dict(state)
    copy.initialized = True
    return copy


def _weights_type(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The type of the decoder of a ``state_dict``."""
    return next((value.dtype for name, value in state.items() if name.rpartition(".")[2] == "W_dec"), torch.float32)


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of a folder's weights: two runs gave the same SAE if and only if it is equal."""
    return hashlib.sha256((Path(folder) / WEIGHTS).read_bytes()).hexdigest()


def same_weights(a: SAE, b: SAE) -> bool:
    """Whether two SAEs hold bit-identical weights and buffers; a threshold that is not set yet (NaN) equals another."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(value.nan_to_num(), second[name].nan_to_num()) and torch.equal(value.isnan(), second[name].isnan())
        for name, value in first.items()
    )
