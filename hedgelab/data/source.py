"""Where activations come from and how they were normalised, as it travels with an SAE (``activations.json``)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from hedgelab.errors import UserError

FILE = "activations.json"
Normalisation = Literal["none", "unit_norm", "centred"]


def measured_normalisation(rows: Tensor, kind: Normalisation) -> tuple[float, Tensor | None]:
    """Scale and mean that make activations ``(x - mean) * scale``, measured on rows ``[n, d_in]`` in float64.

    ``unit_norm`` gives a mean squared norm of 1, ``centred`` a mean of 0 (``[d_in]``, float32); ``none`` changes nothing.
    """
    if kind == "unit_norm":
        return float(rows.double().square().sum(dim=-1).mean().rsqrt()), None
    return 1.0, rows.double().mean(dim=0).float() if kind == "centred" else None


@dataclass(frozen=True)
class ActivationSource:
    """What an SAE reads: ``x = (activation - mean) · scale`` of a language model's hook.

    Attributes:
        model: Name of the model, as ``data.model`` took it.
        hook: Path of the hooked module in the transformers model, such as ``model.layers.12``.
        layer: The block whose residual stream it is, counted from zero; None for any other hook.
        context_length: Tokens the model sees at a time.
        skip_first: First positions of each context that were left out.
        opens_with_bos: Whether each context begins with the tokenizer's BOS token; None where that is not known.
        text: The text, in words.
        dataset: The text's name on the Hugging Face hub; None where it has none.
        normalisation: Name of the normalisation.
        scale: Factor of the (centred) activations.
        mean: What is subtracted first, ``d_in`` numbers; None for nothing.
        unknown: Why a key of ``data`` is not known though the SAE came with words about it, by key.
    """

    model: str | None = None
    hook: str | None = None
    layer: int | None = None
    context_length: int | None = None
    skip_first: int = 0
    opens_with_bos: bool | None = None
    text: str | None = None
    dataset: str | None = None
    normalisation: str = "none"
    scale: float = 1.0
    mean: tuple[float, ...] | None = field(default=None, repr=False)
    unknown: dict[str, str] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write ``activations.json`` into a folder."""
        (Path(folder) / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> ActivationSource | None:
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
