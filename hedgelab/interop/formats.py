"""Which library wrote a folder, and reading it whichever it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.interop import dictionary_learning, saelens, sparsify
from hedgelab.saes import SAE


class Format(NamedTuple):
    """How a library keeps an SAE in a folder."""

    weights: str
    config: str
    read: Callable[[str | Path], tuple[SAE, ActivationSource]]


FORMATS = {
    "saelens": Format(saelens.WEIGHTS, saelens.CONFIG, saelens.import_saelens),
    "sparsify": Format(sparsify.WEIGHTS, sparsify.CONFIG, sparsify.import_sparsify),
    "dictionary_learning": Format(
        dictionary_learning.WEIGHTS, dictionary_learning.CONFIG, dictionary_learning.import_dictionary_learning
    ),
}


def format_of(folder: Path) -> str:
    """The library whose files a folder holds.

    Raises:
        UserError: None's.
    """
    for name, known in FORMATS.items():
        if (folder / known.weights).is_file() and (folder / known.config).is_file():
            return name
    expected = "; ".join(f"{known.config} and {known.weights} ({name})" for name, known in FORMATS.items())
    raise UserError(f"{folder}: holds no SAE of a known library; expected {expected}")


def import_folder(folder: Path, name: str | None = None) -> tuple[SAE, ActivationSource, str]:
    """An SAE of another library, what it reads as far as its folder tells, and the library's name.

    Args:
        folder: The folder.
        name: The library; None finds out.

    Raises:
        UserError: It is none of a known library, damaged, or beyond what hedgelab's SAEs can do.
    """
    name = name or format_of(folder)
    sae, source = FORMATS[name].read(folder)
    return sae, source, name
