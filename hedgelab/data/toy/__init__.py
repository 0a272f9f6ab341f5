"""Toy activations with known features: dictionaries, firing distributions, and their DataModule."""

from hedgelab.data.toy.conditional import ConditionalFiring, CorrelatedPair
from hedgelab.data.toy.copula import CopulaFiring, LowRankCorrelation
from hedgelab.data.toy.datamodule import ToyDataModule
from hedgelab.data.toy.dictionary import Dictionary, Orthogonalised, correlated_features, make_dictionary, orthonormal_features
from hedgelab.data.toy.firing import Firing, IndependentFiring
from hedgelab.data.toy.gaussian import GaussianFiring
from hedgelab.data.toy.hierarchy import Forest, Hierarchy
from hedgelab.data.toy.laws import Exponential, FoldedNormal, Law, Linear, Zipf
from hedgelab.data.toy.modifiers import Cooccurrence, ModifiedFiring, Modifier, MutualExclusion, ParentChild, Suppression
from hedgelab.data.toy.synthetic_model import SyntheticModelFolder
from hedgelab.data.toy.tree import TreeFiring

__all__ = [
    "ConditionalFiring", "Cooccurrence", "CopulaFiring", "CorrelatedPair", "Dictionary", "Exponential", "Firing",
    "FoldedNormal", "Forest", "GaussianFiring", "Hierarchy", "IndependentFiring", "Law", "Linear", "LowRankCorrelation",
    "ModifiedFiring", "Modifier", "MutualExclusion", "Orthogonalised", "ParentChild", "Suppression", "SyntheticModelFolder",
    "ToyDataModule", "TreeFiring", "Zipf", "correlated_features", "make_dictionary", "orthonormal_features",
]  # fmt: skip
