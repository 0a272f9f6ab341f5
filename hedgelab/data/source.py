"""Where activations come from and how they were normalised, as it travels with an SAE (``activations.json``)."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from hedgelab.errors import UserError

FILE = "activations.json"
Normalisation = Literal["none", "unit_norm", "centred"]


@dataclass(frozen=True)
class ActivationSource:
    """What an SAE reads: ``x = (activation - mean) · scale`` of a language model's hook; None for what is not known."""

    model: str | None = None  # as ``data.model`` took it
    hook: str | None = None  # path of the hooked module in the transformers model, such as ``model.layers.12``
    layer: int | None = None  # the block whose residual stream it is, from zero; None for any other hook
    context_length: int | None = None
    skip_first: int = 0  # positions of each context that were left out
    opens_with_bos: bool | None = None  # whether each context begins with the tokenizer's BOS token
    text: str | None = None  # in words
    dataset: str | None = None  # name of the text on the Hugging Face hub; None where it has none
    normalisation: str = "none"
    scale: float = 1.0
    mean: tuple[float, ...] | None = field(default=None, repr=False)  # None for nothing to subtract
    unknown: dict[str, str] = field(default_factory=dict)  # why a key of ``data`` is not known though the SAE names it

    def save(self, folder: str | Path) -> None:
        """Write ``activations.json`` into a folder."""
        (Path(folder) / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self | None:
        """Read it back from beside an SAE; None where nothing is known."""
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
            names = {one.name for one in fields(cls)}
            known = {key: value for key, value in document.items() if key in names}
            known["scale"] = float(known.get("scale", 1.0))
            if known.get("mean") is not None:
                known["mean"] = tuple(map(float, known["mean"]))
            return cls(**known)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({error})") from error
