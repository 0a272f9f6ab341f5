"""Suites on single tokens: k-sparse probing of tagged words, and the first-letter task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hedgelab.data.llm.labelled import TaggedWords
from hedgelab.data.llm.letters import FirstLetters
from hedgelab.metrics.functional.first_letter import first_letter_scores
from hedgelab.metrics.functional.logistic import linear_probes
from hedgelab.metrics.functional.probing import k_sparse_probing
from hedgelab.plots.evaluation import absorption_by_letter, probing_by_class
from hedgelab.protocols.evaluation.reader import ModelReader, Readings
from hedgelab.protocols.evaluation.suite import NEEDS_TEXT, Scores, Suite, Title, encode_rows, table, whole_numbers
from hedgelab.saes import SAE


class LabelledActivations(NamedTuple):
    """Activations with classes, in two splits.

    Attributes:
        train: ``[n, d_in]``.
        train_labels: bool ``[n, classes]``.
        test: ``[m, d_in]``.
        test_labels: bool ``[m, classes]``.
        classes: Names of the classes.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: list[str]


def split(x: Tensor, labels: Tensor, test: Tensor, classes: list[str]) -> LabelledActivations:
    """Both splits of activations whose labels and split are known."""
    return LabelledActivations(x[~test], labels[~test], x[test], labels[test], classes)


class ProbingSuite(Suite):
    """k-sparse probing of tagged words (see :mod:`hedgelab.metrics.functional.probing`).

    Args:
        words: Tagged words; without them there is no probing.
        ks: Numbers of latents of the probes.
    """

    name = "probing"
    titles: ClassVar[Mapping[str, Title]] = {
        f"probing/f1_k{k}": Title(f"probing F1, k = {k}", "higher", drawn=k != 2) for k in (1, 2, 5, 10)
    }

    def __init__(self, words: TaggedWords | None = None, ks: list[int] = [1, 2, 5, 10]) -> None:  # noqa: B006 (never changed)
        self.words, self.ks = words, whole_numbers("ks", ks)

    def lacks(self) -> str | None:
        """Its words."""
        return NEEDS_TEXT.format("words") if self.words is None else None

    def activations(self, reader: ModelReader) -> LabelledActivations:
        """Activations at the last token of every word."""
        assert self.words is not None
        data = self.words.load(reader.tokenizer)
        usable = torch.zeros_like(data.tokens, dtype=torch.bool)
        usable[data.positions[:, 0], data.positions[:, 1]] = True
        usable[:, : reader.data.skip_first] = False
        place = torch.full_like(data.tokens, -1)
        place[data.positions[:, 0], data.positions[:, 1]] = torch.arange(len(data.positions))
        word = place[usable]  # in reading order
        rows = reader.rows("probing", data.tokens, usable)
        word = word[rows.kept]
        return split(rows.x, data.labels[word], data.test[word], data.classes)

    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        data, ks = self.activations(readings.model), self.ks
        for name, sae in saes.items():
            scores = k_sparse_probing(
                encode_rows(sae, data.train), data.train_labels, encode_rows(sae, data.test), data.test_labels, ks
            )
            metrics: dict[str, float] = {}
            for column, k in enumerate(ks):
                metrics[f"probing/f1_k{k}"] = float(scores.f1[:, column].nanmean())
                metrics[f"probing/auc_k{k}"] = float(scores.auc[:, column].nanmean())
            rows = [
                [label, k, float(scores.f1[i, c]), float(scores.auc[i, c]), float(scores.C[i, c]),
                 " ".join(map(str, scores.latents[i, :k].tolist()))]
                for i, label in enumerate(data.classes)
                for c, k in enumerate(ks)
            ]  # fmt: skip
            draw = partial(probing_by_class, data.classes, ks, scores.f1)
            tables = {"probing/classes.csv": table(["class", "k", "f1", "auc", "C", "latents"], rows)}
            yield name, Scores(metrics, tables, {"probing.png": draw})


class AbsorptionSuite(Suite):
    """First-letter absorption and splitting (see :mod:`hedgelab.metrics.functional.first_letter`).

    Args:
        letters: The first-letter task.
    """

    name = "absorption"
    titles: ClassVar[Mapping[str, Title]] = {
        "absorption/full": Title("full absorption", "lower"),
        "absorption/fraction": Title("absorption fraction", "lower", drawn=False),
        "absorption/split_latents": Title("latents a letter is split into", "lower"),
        "absorption/f1_k1": Title("first letter F1, k = 1", "higher"),
    }

    def __init__(self, letters: FirstLetters = FirstLetters()) -> None:  # noqa: B008 (frozen)
        self.letters = letters

    def activations(self, reader: ModelReader) -> LabelledActivations:
        """Activations at every word."""
        words = self.letters.load(reader.tokenizer)
        rows = reader.word_rows(words)
        return split(rows.x, words.labels[rows.kept], words.test[rows.kept], words.letters)

    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        data = self.activations(readings.model)
        probe = linear_probes(data.train, data.train_labels)  # dense: it knows the letters
        for name, sae in saes.items():
            scores = first_letter_scores(
                encode_rows(sae, data.train), data.train_labels, encode_rows(sae, data.test), data.test_labels,
                data.test, probe, sae.W_dec.detach().cpu(),
            )  # fmt: skip
            metrics = {
                "absorption/full": float(scores.full.nanmean()),
                "absorption/fraction": float(scores.fraction.nanmean()),
                "absorption/split_latents": float(scores.splits.nanmean()),
                "absorption/f1_k1": float(scores.f1.nanmean()),
                "absorption/probe_f1": float(scores.probe_f1.nanmean()),
                "absorption/letters": float((~scores.full.isnan()).sum()),
            }
            columns = [values.tolist() for values in scores]
            rows = [list(row) for row in zip(data.classes, *columns, strict=True)]
            tables = {"absorption/letters.csv": table(["letter", *scores._fields], rows)}
            draw = partial(absorption_by_letter, data.classes, scores.full, scores.fraction)
            yield name, Scores({k: v for k, v in metrics.items() if v == v}, tables, {"absorption.png": draw})
