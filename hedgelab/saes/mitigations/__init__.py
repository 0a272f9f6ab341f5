"""Mitigations of hedging and absorption, each in a file of its own; any of them combine."""

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
