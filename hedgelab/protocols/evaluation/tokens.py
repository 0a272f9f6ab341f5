"""Suites on single tokens: k-sparse probing of tagged words, and the first-letter task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.data.llm.labelled import TaggedWords
from hedgelab.data.llm.letters import FirstLetters
from hedgelab.metrics.functional.first_letter import first_letter_scores
from hedgelab.metrics.functional.logistic import LinearProbe, linear_probes
from hedgelab.metrics.functional.probing import k_sparse_probing
from hedgelab.plots.evaluation import absorption_by_letter, probing_by_class
from hedgelab.protocols.evaluation.reader import ModelReader
from hedgelab.protocols.evaluation.scores import Scores, Suite, encode_rows, table
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
        reader: The language model.
        words: The words.
        ks: Numbers of latents.
    """

    name = "probing"

    def __init__(self, reader: ModelReader, words: TaggedWords, ks: Sequence[int]) -> None:
        self._reader, self._words, self._ks = reader, words, list(ks)

    @cached_property
    def activations(self) -> LabelledActivations:
        """Activations at the last token of every word."""
        data = self._words.load(self._reader.tokenizer)
        usable = torch.zeros_like(data.tokens, dtype=torch.bool)
        usable[data.positions[:, 0], data.positions[:, 1]] = True
        usable[:, : self._reader.data.skip_first] = False
        place = torch.full_like(data.tokens, -1)
        place[data.positions[:, 0], data.positions[:, 1]] = torch.arange(len(data.positions))
        word = place[usable]  # in reading order
        rows = self._reader.rows("probing", data.tokens, usable)
        word = word[rows.kept]
        return split(rows.x, data.labels[word], data.test[word], data.classes)

    def score(self, saes: Mapping[str, SAE]) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        data, ks = self.activations, self._ks
        for name, sae in saes.items():
            scores = k_sparse_probing(
                encode_rows(sae, data.train), data.train_labels, encode_rows(sae, data.test), data.test_labels, ks
            )
            metrics: dict[str, float] = {}
            for column, k in enumerate(ks):
                metrics[f"probing/f1_k{k}"] = float(scores.f1[:, column].mean())
                metrics[f"probing/auc_k{k}"] = float(scores.auc[:, column].mean())
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
        reader: The language model.
        letters: The task.
    """

    name = "absorption"

    def __init__(self, reader: ModelReader, letters: FirstLetters) -> None:
        self._reader, self._letters = reader, letters

    @cached_property
    def activations(self) -> LabelledActivations:
        """Activations at every word."""
        words = self._letters.load(self._reader.tokenizer)
        rows = self._reader.word_rows(words)
        return split(rows.x, words.labels[rows.kept], words.test[rows.kept], words.letters)

    @cached_property
    def probe(self) -> LinearProbe:
        """The dense probes, which know the letters."""
        return linear_probes(self.activations.train, self.activations.train_labels)

    def score(self, saes: Mapping[str, SAE]) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        data = self.activations
        for name, sae in saes.items():
            scores = first_letter_scores(
                encode_rows(sae, data.train), data.train_labels, encode_rows(sae, data.test), data.test_labels,
                data.test, self.probe, sae.W_dec.detach().cpu(),
            )  # fmt: skip
            metrics = {
                "absorption/full": float(scores.full.nanmean()),
                "absorption/fraction": float(scores.fraction.nanmean()),
                "absorption/split_latents": float(scores.splits.nanmean()),
                "absorption/f1_k1": float(scores.f1.nanmean()),
                "absorption/probe_f1": float(scores.probe_f1.mean()),
                "absorption/letters": float((~scores.full.isnan()).sum()),
            }
            columns = [values.tolist() for values in scores]
            rows = [list(row) for row in zip(data.classes, *columns, strict=True)]
            tables = {"absorption/letters.csv": table(["letter", *scores._fields], rows)}
            draw = partial(absorption_by_letter, data.classes, scores.full, scores.fraction)
            yield name, Scores({k: v for k, v in metrics.items() if v == v}, tables, {"absorption.png": draw})
