"""Evaluations of trained SAEs: suites of scores, from one pass of the language model for all SAEs together."""

from hedgelab.protocols.evaluation.reader import ModelReader, Readings
from hedgelab.protocols.evaluation.suite import Scores, Suite, suite_classes

__all__ = ["ModelReader", "Readings", "Scores", "Suite", "suite_classes"]
