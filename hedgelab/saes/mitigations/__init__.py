"""Mitigations of hedging and absorption, each in a file of its own.

=====================  ==============================================================  =================================
class                  what it does                                                    works in
=====================  ==============================================================  =================================
`LISTA`                encodes again with what the first pass left unexplained         any SAE, or the inner one
`DetachedInnerLevels`  inner levels feel no gradient but the last level's              matryoshka, without credit
`SortedLatents`        levels hold the latents that fire most often                    matryoshka
`TiltedLoss`           examples that are reconstructed badly count for more            any SAE
`RandomPrefixes`       levels of other sizes each step                                 matryoshka, without adaptive
`OrthogonalDecoder`    decoder rows with a large cosine cost (OrtSAE)                  any SAE, or the inner one
`OwnRowCredit`         outer latents' share off each row's own direction is spared         matryoshka
`FrozenDecoder`        decoder rows stay, or stay near, where they started (control)   any SAE
`FrozenEncoder`        the encoder stays where it started (control)                    any SAE
=====================  ==============================================================  =================================

They combine: an SAE asks each in the order given, so what encodes comes one after the other, and terms add up. LISTA-Matryoshka
(chanind/claude-auto-research-synthsaebench, 2026) is a :class:`~hedgelab.saes.MatryoshkaSAE` over a BatchTopK SAE whose k and,
at the end, learning rate fall (:class:`~hedgelab.training.optimizers.LateDecay`), with ``[LISTA, DetachedInnerLevels,
SortedLatents, TiltedLoss]``. A level's weight (β), credit and adaptive weights are arguments of the SAE itself. Ensembles take
no mitigations, and where latents are split over processes only those that change the target alone are taken.
"""

from hedgelab.saes.mitigations.base import Mitigation as Mitigation
from hedgelab.saes.mitigations.detached import DetachedInnerLevels as DetachedInnerLevels
from hedgelab.saes.mitigations.frozen import FrozenDecoder as FrozenDecoder
from hedgelab.saes.mitigations.frozen import FrozenEncoder as FrozenEncoder
from hedgelab.saes.mitigations.lista import LISTA as LISTA
from hedgelab.saes.mitigations.orthogonal import OrthogonalDecoder as OrthogonalDecoder
from hedgelab.saes.mitigations.own_row_credit import OwnRowCredit as OwnRowCredit
from hedgelab.saes.mitigations.prefixes import RandomPrefixes as RandomPrefixes
from hedgelab.saes.mitigations.sorted import SortedLatents as SortedLatents
from hedgelab.saes.mitigations.tilted import TiltedLoss as TiltedLoss
