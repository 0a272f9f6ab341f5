"""hedgelab: find, measure and fix feature hedging in sparse autoencoders.

``import hedgelab as hl`` costs nothing: each name below is imported when it is first asked for.

- SAEs: ``VanillaSAE``, ``TopKSAE``, ``BatchTopKSAE``, ``JumpReLUSAE``, ``MatryoshkaSAE``; ``load`` reads a saved one.
- Data: ``ToyDataModule``, ``LLMDataModule``, ``TensorActivations``, ``DatasetActivations``; each gives ``Batch`` values.
- Measures: ``hedging``, ``residual_hedging``, ``hedging_degree``, ``explained_variance``, ``l0``, ``mcc``.

>>> import hedgelab as hl, torch
>>> W_dec = torch.tensor([[0.8, 0.6, 0.0]])  # one latent that mixes .6 of a second feature in
>>> hl.hedging(W_dec, torch.eye(3)).norm
tensor([0.6000], dtype=torch.float64)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hedgelab.batch import Batch as Batch
    from hedgelab.data.llm import LLMDataModule as LLMDataModule
    from hedgelab.data.tensors import DatasetActivations as DatasetActivations
    from hedgelab.data.tensors import TensorActivations as TensorActivations
    from hedgelab.data.toy import ToyDataModule as ToyDataModule
    from hedgelab.errors import UserError as UserError
    from hedgelab.metrics import hedging as hedging
    from hedgelab.metrics import hedging_degree as hedging_degree
    from hedgelab.metrics import residual_hedging as residual_hedging
    from hedgelab.metrics.functional import explained_variance as explained_variance
    from hedgelab.metrics.functional import l0 as l0
    from hedgelab.metrics.functional import mcc as mcc
    from hedgelab.saes import SAE as SAE
    from hedgelab.saes import BatchTopKSAE as BatchTopKSAE
    from hedgelab.saes import JumpReLUSAE as JumpReLUSAE
    from hedgelab.saes import MatryoshkaSAE as MatryoshkaSAE
    from hedgelab.saes import SAEGroup as SAEGroup
    from hedgelab.saes import TopKSAE as TopKSAE
    from hedgelab.saes import VanillaSAE as VanillaSAE
    from hedgelab.saes import load_sae as load  # noqa: F401
    from hedgelab.saes import sae_from_checkpoint as sae_from_checkpoint

__version__ = "0.2.0"

_PLACES = {
    "hedgelab.batch": "Batch",
    "hedgelab.data.llm": "LLMDataModule",
    "hedgelab.data.tensors": "DatasetActivations TensorActivations",
    "hedgelab.data.toy": "ToyDataModule",
    "hedgelab.errors": "UserError",
    "hedgelab.metrics": "hedging hedging_degree residual_hedging",
    "hedgelab.metrics.functional": "explained_variance l0 mcc",
    "hedgelab.saes": (
        "SAE BatchTopKSAE JumpReLUSAE MatryoshkaSAE SAEGroup TopKSAE VanillaSAE load sae_from_checkpoint"
    ),
}
_PLACE = {name: module for module, names in _PLACES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _PLACE:
        raise AttributeError(f"hedgelab has no '{name}'; it has {', '.join(sorted(_PLACE))}")
    value = getattr(import_module(_PLACE[name]), {"load": "load_sae"}.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACE])
