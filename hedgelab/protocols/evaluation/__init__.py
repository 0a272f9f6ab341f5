"""Evaluations of trained SAEs: suites of scores, from one pass of the language model for all SAEs together."""

from hedgelab.protocols.evaluation.options import SUITES, EvaluationOptions
from hedgelab.protocols.evaluation.reader import ModelReader
from hedgelab.protocols.evaluation.scores import Scores, Suite

__all__ = ["SUITES", "EvaluationOptions", "ModelReader", "Scores", "Suite"]
