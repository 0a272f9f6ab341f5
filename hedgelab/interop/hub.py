"""SAEs from and to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hedgelab.data.llm.model import first_line, hub_problem
from hedgelab.errors import UserError

_WANTED = ("*.json", "*.safetensors", "*.pt")
_CARD = """\
---
library_name: saelens
tags: [sparse-autoencoder, interpretability, saelens, hedgelab]
---

# {title}

A sparse autoencoder trained with hedgelab. `cfg.json` names its model, hook and context; any normalisation
of the activations is folded into the weights.

```python
from sae_lens import SAE

sae = SAE.from_pretrained("{name}", "{folder}")
```
"""


def fetch(name: str) -> Path:
    """A folder of the hub, on this machine; ``user/repository``, or ``user/repository/folder/below``."""
    user, _, rest = name.partition("/")
    repository, _, below = rest.partition("/")
    if not user or not repository:
        raise UserError(f"'{name}' is neither a folder nor an id of the hub; expected user/repository[/folder]")
    client = _client()
    try:
        patterns = [f"{below}/{pattern}" if below else pattern for pattern in _WANTED]
        return Path(client.snapshot_download(f"{user}/{repository}", allow_patterns=patterns)) / below
    except Exception as error:  # the client's own errors, and those of what it downloads with
        raise UserError(
            f"the hub does not give '{name}' ({first_line(error)}); give an existing folder instead"
        ) from error


def push(folder: Path, name: str) -> str:
    """Upload what ``hedgelab export`` has written, with a card; its address. The repository is made if missing."""
    if name.count("/") != 1:
        raise UserError(f"--push: expected user/repository, got '{name}'")
    card = _CARD.format(title=name.partition("/")[2], name=name, folder=folder.name)
    client = _client()
    try:
        api = client.HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, path_in_repo=folder.name)
        api.upload_file(repo_id=name, path_or_fileobj=card.encode(), path_in_repo="README.md")
    except Exception as error:
        raise UserError(
            f"--push: the hub refuses '{name}' ({first_line(error)}); what was exported is in {folder}"
        ) from error
    return f"https://huggingface.co/{name}"


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("the hub needs huggingface_hub, which is not installed; pip install 'hedgelab[llm]'") from None
    if problem := hub_problem():
        raise UserError(f"{problem}; an SAE in a folder needs no hub")
    return huggingface_hub
