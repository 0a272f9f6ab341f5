"""What TransformerLens and SAELens call models, in ids of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

_MODELS = {
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
    found = ((re.fullmatch(pattern, name), hub_id) for pattern, hub_id in _MODELS.items())
    return next((match.expand(hub_id) for match, hub_id in found if match), None)
