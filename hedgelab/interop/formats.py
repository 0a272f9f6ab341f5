"""Which library wrote a folder, and reading it whichever it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.interop import dictionary_learning, saelens, sparsify
from hedgelab.saes import SAE


class Format(NamedTuple):
    """The two files of a library's folder, and what reads it."""

    config: str
    weights: str
    read: Callable[[str | Path], tuple[SAE, ActivationSource]]


FORMATS = {
    "saelens": Format(saelens.CONFIG, saelens.WEIGHTS, saelens.import_saelens),
    "sparsify": Format(sparsify.CONFIG, sparsify.WEIGHTS, sparsify.import_sparsify),
    "dictionary_learning": Format(
        dictionary_learning.CONFIG, dictionary_learning.WEIGHTS, dictionary_learning.import_dictionary_learning
    ),
}


def format_of(folder: Path) -> str:
    """The library whose files a folder holds."""
    for name, known in FORMATS.items():
        if (folder / known.weights).is_file() and (folder / known.config).is_file():
            return name
    expected = "; ".join(f"{known.config} and {known.weights} ({name})" for name, known in FORMATS.items())
    raise UserError(f"{folder}: holds no SAE of a known library; expected {expected}")


def import_folder(path: Path, name: str | None = None) -> tuple[SAE, ActivationSource, str]:
    """The SAE of a folder (or of one of its two files), what it reads as far as that tells, and the library's name."""
    folder = path.parent if path.is_file() else path
    name = name or format_of(folder)
    return *FORMATS[name].read(folder), name


def config_lines(sae: SAE, source: ActivationSource, folder: Path) -> list[str]:
    """A config of ``hedgelab fit`` that goes on from an imported SAE; ``???`` and a line where its folder does not tell."""
    model = _section(sae.config())
    flat = model["init_args"].get("inner", model)
    flat["init_args"]["init"] = {"weights": str(folder)}
    where = {"hook": source.hook} if source.layer is None and source.hook is not None else {"layer": source.layer}
    missing = {"model": source.model, **where}
    known = {"context_length": source.context_length, "skip_first": source.skip_first or None}
    reads = {key: "???" if value is None else value for key, value in missing.items()}
    reads |= {key: value for key, value in known.items() if value is not None}
    config = {
        "trainer": {"max_steps": 1000},
        "data": {"class_path": "LLMDataModule", "init_args": {**reads, "normalisation": "none"}},
        "model": model,
    }
    reasons = {key: "the folder does not say" for key, value in missing.items() if value is None} | source.unknown
    lines = [f"# data.{key} is not known: {reason}" for key, reason in reasons.items()]
    return [*lines, *yaml.safe_dump(config, sort_keys=False, default_flow_style=None).rstrip().splitlines()]


def _section(config: dict[str, Any]) -> dict[str, Any]:
    """What :meth:`SAE.config` says, as a section of a config file."""
    arguments = {key: value for key, value in config.items() if key not in ("class", "d_in")}
    if "inner" in arguments:
        arguments["inner"] = _section(arguments["inner"])
    return {"class_path": config["class"], "init_args": arguments}
