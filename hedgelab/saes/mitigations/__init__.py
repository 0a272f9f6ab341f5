"""Mitigations of hedging and absorption, each in a file of its own; any of them combine."""

from hedgelab.saes.mitigations.base import Mitigation as Mitigation
