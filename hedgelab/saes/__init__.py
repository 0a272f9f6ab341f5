"""Sparse autoencoders as LightningModules."""

from hedgelab.saes.abs_topk import AbsTopKSAE as AbsTopKSAE
from hedgelab.saes.base import SAE as SAE
from hedgelab.saes.base import FoldedWeights as FoldedWeights
from hedgelab.saes.base import fold as fold
from hedgelab.saes.batch_topk import BatchTopKSAE as BatchTopKSAE
from hedgelab.saes.flat import FlatSAE as FlatSAE
from hedgelab.saes.initialization import Initialization as Initialization
from hedgelab.saes.io import load_sae as load_sae
from hedgelab.saes.io import sae_from_checkpoint as sae_from_checkpoint
from hedgelab.saes.io import save_sae as save_sae
from hedgelab.saes.io import weights_sha256 as weights_sha256
from hedgelab.saes.jumprelu import JumpReLUSAE as JumpReLUSAE
from hedgelab.saes.losses import LossTerms as LossTerms
from hedgelab.saes.matryoshka import MatryoshkaSAE as MatryoshkaSAE
from hedgelab.saes.mitigations import LISTA as LISTA
from hedgelab.saes.mitigations import DetachedInnerLevels as DetachedInnerLevels
from hedgelab.saes.mitigations import Mitigation as Mitigation
from hedgelab.saes.mitigations import RandomPrefixes as RandomPrefixes
from hedgelab.saes.mitigations import SortedLatents as SortedLatents
from hedgelab.saes.mitigations import TiltedLoss as TiltedLoss
from hedgelab.saes.topk import TopKSAE as TopKSAE
from hedgelab.saes.vanilla import VanillaSAE as VanillaSAE
from hedgelab.saes.widen import duplicate as duplicate
from hedgelab.saes.widen import fresh as fresh
from hedgelab.saes.widen import widen as widen
from hedgelab.training.shell import SAEGroup as SAEGroup
