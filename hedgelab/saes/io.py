"""SAEs on disk: weights as safetensors, architecture as JSON; loading executes nothing."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hedgelab import __version__
from hedgelab.errors import UserError, one_line
from hedgelab.training.checkpoints import VerifiedCheckpointIO
from hedgelab.training.sharding import full_tensor, is_split
from hedgelab.training.shell import ARCHITECTURES

if TYPE_CHECKING:
    from hedgelab.saes.base import SAE

WEIGHTS, CONFIG = "sae.safetensors", "sae.json"
CLASSES: dict[str, type[SAE]] = {}
"""Every SAE class that is imported, by the name that files give it. Loading an SAE never imports anything."""


def class_name(cls: type) -> str:
    """What files call a class: its name for those of hedgelab, its full path for others."""
    return cls.__name__ if cls.__module__.startswith("hedgelab.") else f"{cls.__module__}.{cls.__qualname__}"


def _find_class(name: Any, cls: type[SAE] | None) -> type[SAE]:
    """The imported class of a name, which must be or inherit from ``cls``; ``cls`` itself where there is none."""
    found = CLASSES.get(name) if isinstance(name, str) else None
    if found is None and cls is not None and not inspect.isabstract(cls):
        return cls
    if found is None and isinstance(name, str) and "." in name:
        raise UserError(
            f"sae.json: class: {name!r} is not imported; import it first, or give it: load_sae(folder, cls=…)"
        )
    if found is None:
        raise UserError(f"sae.json: class: must be an SAE of hedgelab or an imported class of your own, got {name!r}")
    if cls is not None and not issubclass(found, cls):
        raise UserError(f"sae.json: class: the SAE is a {name}, not a {class_name(cls)}")
    return found


def save_sae(sae: SAE, folder: str | Path) -> None:
    """Write ``sae.safetensors`` (weights and buffers) and ``sae.json`` (architecture) into a folder, made if missing.

    Of an SAE whose latents are split over processes, all of them must call this; the process of rank 0 writes.
    """
    folder = Path(folder)
    tensors = _full_state(sae)
    if is_split(sae.W_dec) and torch.distributed.get_rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"hedgelab": __version__, **sae.config()}, indent=2) + "\n")


def load_sae(folder: str | Path, cls: type[SAE] | None = None) -> SAE:
    """Read an SAE back, ready to measure or to train on.

    Args:
        folder: What :func:`save_sae` wrote.
        cls: The class of the SAE, or one that it inherits from; needed for a class of one's own that is not imported yet.

    Raises:
        UserError: A file is missing or damaged, or names a class that is not imported.
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
    _check_size(config, tensors, folder)
    try:
        sae = copy_of(config, tensors, cls)
    except RuntimeError as error:  # names or shapes that differ
        reason = one_line(str(error)).partition(": ")[2]
        raise UserError(f"{folder / WEIGHTS}: does not fit {config.get('class')}: {reason}") from error
    if spoiled := [name for name, value in sae.named_parameters() if not torch.isfinite(value).all()]:
        raise UserError(f"{folder / WEIGHTS}: {spoiled[0]} holds NaN or infinity")
    return sae.to(torch.promote_types(sae.W_dec.dtype, torch.float32))


def sae_from_checkpoint(
    path: str | Path,
    member: str | None = None,
    cls: type[SAE] | None = None,
    strict: bool = True,
    given: Mapping[str, Any] | None = None,
) -> SAE:
    """The SAE of a training checkpoint, ready to measure or to train on.

    Args:
        path: The checkpoint.
        member: Which SAE, where several were trained together.
        cls: The class that it must be or inherit from; None for any that is imported.
        strict: Whether weights that are missing or too many are an error.
        given: Arguments of ``__init__`` besides, or instead of, what the checkpoint says.

    Raises:
        UserError: The checkpoint is damaged, is of another class, or does not say what it is of and ``given`` does not either.
    """
    given = given or {}
    checkpoint = VerifiedCheckpointIO().load_checkpoint(path, map_location="cpu")
    configs: dict[str, Any] = checkpoint.get(ARCHITECTURES, {"": {}})
    name = next(iter(configs)) if member is None and len(configs) == 1 else member
    if name not in configs:
        raise UserError(f"{path}: holds the SAEs {', '.join(configs)}; name one of them as member, got {member!r}")
    config = {key: value for key, value in configs[name].items() if key not in given}
    if not config and (cls is None or inspect.isabstract(cls)):
        raise UserError(
            f"{path}: does not say which SAE it holds; call load_from_checkpoint of its class, with its arguments"
        )
    prefix = f"members.{name}." if name else ""
    state = {key.removeprefix(prefix): v for key, v in checkpoint["state_dict"].items() if key.startswith(prefix)}
    return copy_of(config, state, cls, strict, **given)


def copy_of(
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    cls: type[SAE] | None = None,
    strict: bool = True,
    **training: Any,
) -> SAE:
    """The SAE that another's :meth:`SAE.config` and ``state_dict`` tell of, ready to measure or to train on."""
    copy = build_sae(config, cls, **training).to(_weights_type(state))
    copy.load_state_dict(state, strict=strict)
    copy.initialized = True
    return copy


def gathered(sae: SAE) -> SAE:
    """The SAE, or where its latents are split over processes a copy with all of them; to be called on all processes."""
    return copy_of(sae.config(), _full_state(sae)) if is_split(sae.W_dec) else sae


def build_sae(config: dict[str, Any], cls: type[SAE] | None = None, **training: Any) -> SAE:
    """An SAE of the architecture that :meth:`SAE.config` described, with fresh weights; ``training`` are other arguments.

    It must be a ``cls`` or inherit from it, which is used itself where the description names no imported class.
    """
    arguments = dict(config)
    name = arguments.pop("class", None)
    cls = _find_class(name, cls)
    if unknown := arguments.keys() - (init_arguments(cls).keys() - cls.not_architecture):
        raise UserError(f"sae.json: {min(unknown)!r}: unknown key of {name}")
    if isinstance(inner := arguments.get("inner"), dict):
        arguments["inner"] = partial(_build_inner, inner)
    try:
        return cls(**arguments, **training)
    except UserError as error:
        raise UserError(f"sae.json: {str(error).removeprefix('sae.json: ').removeprefix('model.')}") from error
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"sae.json: cannot be made into a {name} ({one_line(str(error))})") from error


def _build_inner(config: dict[str, Any], d_in: int) -> SAE:
    return build_sae({**config, "d_in": d_in})


def init_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """All ``__init__`` arguments of a class, those it passes on to its parents through ``**kwargs`` included, by name."""
    found: dict[str, inspect.Parameter] = {}
    for parent in cls.__mro__:
        if "__init__" not in vars(parent):
            continue
        parameters = inspect.signature(vars(parent)["__init__"]).parameters.values()
        found = {p.name: p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"} | found
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return found


def _check_size(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """Refuse an architecture of another size than the weights before anything of that size is made."""
    inner = config["inner"] if isinstance(config.get("inner"), dict) else config
    said = (inner.get("d_sae"), config.get("d_in"))
    W_dec = _W_dec(tensors)
    if W_dec is None:
        raise UserError(f"{folder / WEIGHTS}: holds no W_dec; expected the weights of an SAE")
    found = tuple(W_dec.shape)
    if any(a not in (None, b) for a, b in zip(said, found, strict=False)) or len(found) != 2:
        raise UserError(f"{folder / CONFIG}: d_sae and d_in are {said}, but W_dec in {WEIGHTS} is {found}")


def _W_dec(state: Mapping[str, Tensor]) -> Tensor | None:
    return next((value for name, value in state.items() if name.rpartition(".")[2] == "W_dec"), None)


def _weights_type(state: Mapping[str, Tensor]) -> torch.dtype:
    W_dec = _W_dec(state)
    return torch.float32 if W_dec is None else W_dec.dtype


def _full_state(sae: SAE) -> dict[str, Tensor]:
    return {name: full_tensor(value).cpu().contiguous() for name, value in sae.state_dict().items()}


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
