"""Hyper-parameters as MLflow wants them: flat, named within its alphabet, short."""

import hashlib
import json
import re
from argparse import Namespace
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

MAX_VALUE = 6000  # MLflow's limit for a parameter value
_MAX_KEY = 250
_FORBIDDEN = r"[^\w\-. :/]"
_NAMES_DATA = ("class_path", "model", "layer", "hook", "path", "x")
_HOUSEKEEPING = frozenset({"config", "name", "experiment", "ckpt_path", "resume", "record", "progress", "checkpoint"})


@lru_cache(4096)
def clean_key(key: str) -> str:
    """The nearest name that MLflow accepts for a parameter, metric or tag.

    >>> clean_key("train/loss@[0]")
    'train/loss_0_'
    """
    if re.search(_FORBIDDEN, key):
        key = re.sub(r"_+", "_", re.sub(_FORBIDDEN, "_", key))
    if len(key) > _MAX_KEY:
        return f"{key[: _MAX_KEY - 9]}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return key


def flatten(params: Mapping[str, Any] | Namespace, prefix: str = "") -> dict[str, str]:
    """Flat text parameters: dots between nested keys, numbers for items of lists that hold mappings, JSON for the rest.

    >>> flatten({"model": {"k": 3, "levels": [1, 2]}, "callbacks": [{"class_path": "A"}], "name": "x", "seed": None})
    {'model.k': '3', 'model.levels': '[1, 2]', 'callbacks.0.class_path': 'A', 'name': 'x', 'seed': 'null'}
    """
    flat: dict[str, str] = {}
    for key, value in (vars(params) if isinstance(params, Namespace) else params).items():
        name = f"{prefix}{key}"
        if isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, Namespace)) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, (Mapping, Namespace)) and (inner := flatten(value, f"{name}.")):
            flat |= inner
        else:
            flat[clean_key(name)] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def dataset_of(flat: Mapping[str, str]) -> dict[str, str]:
    """What a run is trained on, as MLflow describes data, from its flat parameters; nothing where they do not say.

    The digest is that of every parameter below ``data`` that changes numbers.

    >>> data = {"data.class_path": "hedgelab.data.llm.LLMDataModule", "data.init_args.model": "smollm2", "seed": "1"}
    >>> {key: value for key, value in dataset_of(data).items() if key in ("name", "source")}
    {'name': 'LLMDataModule smollm2', 'source': '{"class_path": "hedgelab.data.llm.LLMDataModule", "model": "smollm2"}'}
    """
    from hedgelab.identity import loaded, where_and_how

    own = {key.removeprefix("data.").replace("init_args.", ""): one for key, one in flat.items() if key[:5] == "data."}
    if "class_path" not in own:
        return {}
    classes = [loaded(value) for key, value in own.items() if key.rpartition(".")[2] == "class_path"]
    marked = {name for cls in classes for name in where_and_how(cls)}
    facts = json.dumps({key: own[key] for key in sorted(own) if key.rpartition(".")[2] not in marked})
    source = {key: value for key, value in own.items() if key.rpartition(".")[2] in _NAMES_DATA and value != "null"}
    names = [value.rpartition(".")[2] if key.endswith("class_path") else value for key, value in source.items()]
    digest = hashlib.sha256(facts.encode()).hexdigest()[:8]
    return {"name": " ".join(names)[:200], "digest": digest, "source_type": "hedgelab", "source": json.dumps(source)}


def searchable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved config is worth searching and comparing runs by; all of it is in the artifact ``config.yaml``.

    Left out: the run's name and how it was watched, which differ between any two runs, and what is not set.

    >>> searchable({"name": "x", "trainer": {"max_steps": 3, "logger": {"uri": "y"}, "profiler": None}, "checkpoint": {"a": 1}})
    {'trainer': {'max_steps': 3}}
    """
    kept = {key: value for key, value in config.items() if key not in _HOUSEKEEPING and value is not None}
    if "trainer" in kept:
        kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key != "logger"}
    return {key: _without_nothing(value) for key, value in kept.items()}


def _without_nothing(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nothing(one) for key, one in value.items() if one is not None}
    return value
