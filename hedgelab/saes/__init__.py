"""Sparse autoencoders as LightningModules."""

from hedgelab.saes.base import SAE, FoldedWeights, fold
from hedgelab.saes.batch_topk import BatchTopKSAE
from hedgelab.saes.flat import FlatSAE
from hedgelab.saes.initialization import Initialization
from hedgelab.saes.io import load_sae, sae_from_checkpoint, save_sae, weights_sha256
from hedgelab.saes.jumprelu import JumpReLUSAE
from hedgelab.saes.losses import LossTerms
from hedgelab.saes.matryoshka import MatryoshkaSAE
from hedgelab.saes.topk import TopKSAE
from hedgelab.saes.vanilla import VanillaSAE
from hedgelab.saes.widen import duplicate, fresh, widen
from hedgelab.training.shell import SAEGroup

__all__ = [
    "SAE",
    "BatchTopKSAE",
    "FlatSAE",
    "FoldedWeights",
    "Initialization",
    "JumpReLUSAE",
    "LossTerms",
    "MatryoshkaSAE",
    "SAEGroup",
    "TopKSAE",
    "VanillaSAE",
    "duplicate",
    "fold",
    "fresh",
    "load_sae",
    "sae_from_checkpoint",
    "save_sae",
    "weights_sha256",
    "widen",
]
