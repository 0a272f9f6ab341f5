"""hedgelab: find, measure and fix feature hedging in sparse autoencoders.

``import hedgelab as hl`` costs nothing: each name below is imported when it is first asked for.

- SAEs: ``VanillaSAE``, ``TopKSAE``, ``BatchTopKSAE``, ``JumpReLUSAE``, ``MatryoshkaSAE``; ``load`` reads a saved one
  (a folder, or ``models:/ID`` of MLflow), ``from_saelens`` takes one of SAELens.
- Data: ``ToyDataModule``, ``LLMDataModule``, ``TensorActivations``, ``DatasetActivations``, ``PlantedActivations``; each gives
  ``Batch`` values.
- Measures: ``hedging``, ``residual_hedging``, ``hedging_degree``, ``explained_variance``, ``l0``, ``mcc``.

>>> import hedgelab as hl, torch
>>> W_dec = torch.tensor([[0.8, 0.6, 0.0]])  # one latent that mixes .6 of a second feature in
>>> hl.hedging(W_dec, torch.eye(3)).norm
tensor([0.6000], dtype=torch.float64)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hedgelab.version import __version__ as __version__

if TYPE_CHECKING:
    from hedgelab.batch import Batch
    from hedgelab.data.llm import LLMDataModule
    from hedgelab.data.planting import PlantedActivations
    from hedgelab.data.tensors import DatasetActivations, TensorActivations
    from hedgelab.data.toy import ToyDataModule
    from hedgelab.errors import UserError
    from hedgelab.interop.saelens import from_saelens
    from hedgelab.metrics import hedging, hedging_degree, residual_hedging
    from hedgelab.metrics.functional import explained_variance, l0, mcc
    from hedgelab.saes import SAE, BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, SAEGroup, TopKSAE, VanillaSAE
    from hedgelab.saes.io import sae_from_checkpoint
    from hedgelab.tracking.runs import load

__all__ = [
    "SAE", "Batch", "BatchTopKSAE", "DatasetActivations", "JumpReLUSAE", "LLMDataModule", "MatryoshkaSAE",
    "PlantedActivations", "SAEGroup", "TensorActivations", "TopKSAE", "ToyDataModule", "UserError", "VanillaSAE",
    "explained_variance", "from_saelens", "hedging", "hedging_degree", "l0", "load", "mcc", "residual_hedging",
    "sae_from_checkpoint",
]  # fmt: skip
_PLACES = {
    "batch": "Batch", "data.llm": "LLMDataModule", "data.planting": "PlantedActivations",
    "data.tensors": "DatasetActivations TensorActivations",
    "data.toy": "ToyDataModule", "errors": "UserError", "interop.saelens": "from_saelens",
    "metrics": "hedging hedging_degree residual_hedging",
    "metrics.functional": "explained_variance l0 mcc", "tracking.runs": "load",
}  # fmt: skip
_PLACE = {name: module for module, names in _PLACES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"hedgelab has no '{name}'; it has {', '.join(__all__)}")
    globals()[name] = value = getattr(import_module(f"hedgelab.{_PLACE.get(name, 'saes')}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
