"""What other libraries call models and hooks, in the names that ``data.model``, ``data.layer`` and ``data.hook`` take."""

from __future__ import annotations

from typing import Any

from hedgelab.data.llm.hook_names import HookPoint, read_hook_name
from hedgelab.data.llm.hub import find_model
from hedgelab.data.source import ActivationSource


def source_of(
    model: object, hook: str | None, why_not: str, unknown: dict[str, str] | None = None, **known: Any
) -> ActivationSource:
    """What an SAE reads, as far as its folder tells; what it does not tell is kept with the reason.

    Args:
        model: The model as the other library names it; None for not at all.
        hook: The hook as the other library names it; None where it is not known, or no place that ``data`` can name.
        why_not: Why ``hook`` is None.
        unknown: Reasons why the model, or other keys of ``data``, are not known.
        **known: Other attributes of the source.
    """
    unknown = dict(unknown or {})
    found = find_model(model) if isinstance(model, str) and "model" not in unknown else None
    if found is None and model is not None:
        unknown.setdefault("model", f"{model!r} is no model that hedgelab knows by this name")
    place = HookPoint(why_not=why_not) if hook is None else read_hook_name(hook)
    if place.why_not is not None:
        unknown["layer"] = place.why_not if hook is None else f"{hook!r} {place.why_not}"
    is_path = place.layer is not None and hook is not None and "." in hook and "hook_" not in hook
    return ActivationSource(
        model=found, hook=hook if is_path else place.hook, layer=place.layer, unknown=unknown, **known
    )
