"""Before torch is imported: what need not be imported yet.

``import torchmetrics`` brings scipy.signal, and transformers where it is installed, which takes longer than Lightning itself.
Lightning and hedgelab use two names of it, and the rest is left for whoever asks for it.
"""

import logging
import sys
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

_NAME = "torchmetrics"


class _Deferred(ModuleType):
    """torchmetrics with its base classes only; it becomes the whole package as soon as another name of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self.__spec__ is None or self.__spec__.loader is None:
            raise AttributeError(f"module '{_NAME}' has no attribute '{name}'")
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def defer_torchmetrics() -> None:
    """Have ``import torchmetrics`` import its base classes only, until more of it is used.

    Where a release of torchmetrics does not allow that, it is imported whole, as if this had not been called.
    """
    spec = find_spec(_NAME) if _NAME not in sys.modules else None
    if spec is None:
        return
    module = sys.modules[_NAME] = module_from_spec(spec)
    module.__class__ = _Deferred
    module.__dict__.update(__version__=version(_NAME), _logger=logging.getLogger(_NAME))
    with suppress(ImportError, AttributeError):
        import_module(f"{_NAME}.utilities")  # before the classes, which import it and are imported by it
        module.__dict__["Metric"] = import_module(f"{_NAME}.metric").Metric
        module.__dict__["MetricCollection"] = import_module(f"{_NAME}.collections").MetricCollection
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == _NAME]:
        del sys.modules[name]
