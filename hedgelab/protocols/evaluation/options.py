"""What is evaluated, and on which labelled text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from hedgelab.data.llm.classified import ClassifiedTexts
from hedgelab.data.llm.labelled import TaggedWords
from hedgelab.data.llm.letters import FirstLetters
from hedgelab.errors import UserError

Suites = Literal["density", "geometry", "probing", "absorption", "loss_recovered", "tpp", "scr"]
SUITES: tuple[str, ...] = get_args(Suites)
_NEEDS = {"probing": "words", "tpp": "topics", "scr": "removal"}


@dataclass(frozen=True)
class EvaluationOptions:
    """The suites of an evaluation.

    Attributes:
        suites: Which ones; ``all`` are all for which there is text.
        words: Tagged words for k-sparse probing.
        topics: Texts of several classes for targeted probe perturbation.
        removal: Texts with a label and a spurious property for spurious correlation removal.
        letters: The first-letter task, for absorption and splitting.
        ks: Numbers of latents of the k-sparse probes.
        silenced: Numbers of latents silenced in targeted probe perturbation and spurious correlation removal.
        loss_contexts: Contexts of the test stage on which loss recovered is measured.
        rows: Activations of the validation stage on which density is measured, at least.
    """

    suites: list[str] = field(default_factory=lambda: ["all"])
    words: TaggedWords | None = None
    topics: ClassifiedTexts | None = None
    removal: ClassifiedTexts | None = None
    letters: FirstLetters = field(default_factory=FirstLetters)
    ks: list[int] = field(default_factory=lambda: [1, 2, 5, 10])
    silenced: list[int] = field(default_factory=lambda: [2, 5, 10, 20, 50])
    loss_contexts: int = 8
    rows: int = 8192

    def __post_init__(self) -> None:
        for name in self.suites:
            if name not in (*SUITES, "all"):
                raise UserError(f"--suite: expected some of {', '.join(SUITES)}, or all, got {name!r}")
        for key, values in (("ks", self.ks), ("silenced", self.silenced)):
            if not values or min(values) < 1:
                raise UserError(f"{key}: expected whole numbers of at least 1, got {values}")
        for key, value in (("loss_contexts", self.loss_contexts), ("rows", self.rows)):
            if value < 1:
                raise UserError(f"{key}: must be at least 1, got {value}")
        if self.removal is not None and self.removal.spurious is None:
            raise UserError("removal.spurious: missing; spurious correlation removal needs a second property")

    def chosen(self, language_model: bool) -> tuple[list[str], dict[str, str]]:
        """The suites to be run, and why others are left out.

        Args:
            language_model: Whether activations come from a language model.

        Raises:
            UserError: A suite that was asked for by name cannot be run.
        """
        reasons = {suite: reason for suite in SUITES if (reason := self._lacks(suite, language_model))}
        for name in self.suites:
            if name in reasons:
                raise UserError(f"--suite {name}: {reasons[name]}")
        wanted: Sequence[str] = SUITES if "all" in self.suites else [name for name in SUITES if name in self.suites]
        left_out = {name: reason for name, reason in reasons.items() if name in wanted}
        return [name for name in wanted if name not in reasons], left_out

    def _lacks(self, suite: str, language_model: bool) -> str | None:
        if suite in ("density", "geometry"):
            return None
        if not language_model:
            return "needs activations of a language model"
        key = _NEEDS.get(suite)
        if key is not None and getattr(self, key) is None:
            return f"needs labelled text; set {key} (see configs/llm/evaluate_brown.yaml)"
        return None
