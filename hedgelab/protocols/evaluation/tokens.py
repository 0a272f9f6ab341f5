"""Suites on single tokens: k-sparse probing of tagged words, and the first-letter task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from hedgelab.data.llm.labelled import FirstLetters, TaggedWords
from hedgelab.metrics.functional.first_letter import first_letter_scores
from hedgelab.metrics.functional.probing import k_sparse_probing, linear_probes
from hedgelab.plots.evaluation import absorption_by_letter, probing_by_class
from hedgelab.protocols.evaluation.reader import ModelReader, Readings
from hedgelab.protocols.evaluation.suite import Scores, Suite, Title, encode_rows, finite, rows_of, whole_numbers
from hedgelab.saes import SAE

Labelled = tuple[Tensor, Tensor, Tensor]
"""Activations ``[n, d_in]``, their classes (bool ``[n, classes]``), and which of them are for testing (bool ``[n]``)."""


class ProbingSuite(Suite):
    """k-sparse probing of tagged words (see :mod:`hedgelab.metrics.functional.probing`).

    Args:
        words: Tagged words; without them there is no probing.
        ks: Numbers of latents of the probes.
    """

    name = "probing"
    needs = "words"
    titles: ClassVar[Mapping[str, Title]] = {
        f"probing/f1_k{k}": Title(f"probing F1, k = {k}", "higher", drawn=k != 2) for k in (1, 2, 5, 10)
    }

    def __init__(self, words: TaggedWords | None = None, ks: list[int] = [1, 2, 5, 10]) -> None:  # noqa: B006 (never changed)
        self.words, self.ks = words, whole_numbers("ks", ks)

    def activations(self, reader: ModelReader) -> Labelled:
        """Activations at the last token of every word."""
        assert self.words is not None
        data = self.words.load(reader.tokenizer)
        context, position = data.positions.T
        word = (context * data.tokens.shape[1] + position).argsort()  # in reading order
        word = word[position[word] >= reader.data.skip_first]
        usable = torch.zeros_like(data.tokens, dtype=torch.bool)
        usable[context[word], position[word]] = True
        rows = reader.rows("probing", data.tokens, usable)
        word = word[rows.kept]
        return rows.x, data.labels[word], data.test[word]

    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        (x, labels, test), ks = self.activations(readings.model), self.ks
        classes = list(self.words.classes) if self.words is not None else []
        for name, sae in saes.items():
            scores = k_sparse_probing(
                encode_rows(sae, x[~test]), labels[~test], encode_rows(sae, x[test]), labels[test], ks
            )
            metrics = {
                f"probing/{kind}_k{k}": float(values[:, column].nanmean())
                for column, k in enumerate(ks)
                for kind, values in (("f1", scores.f1), ("auc", scores.auc))
            }
            rows = [
                {
                    "class": label,
                    "k": k,
                    "f1": float(scores.f1[i, c]),
                    "auc": float(scores.auc[i, c]),
                    "C": float(scores.C[i, c]),
                    "latents": scores.latents[i, :k].tolist(),
                }
                for i, label in enumerate(classes)
                for c, k in enumerate(ks)
            ]
            draw = partial(probing_by_class, classes, ks, scores.f1)
            yield name, Scores(metrics, {"probing/classes.csv": rows}, {"probing.png": draw})


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

    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        words = self.letters.load(readings.model.tokenizer)
        rows = readings.model.word_rows(words)
        x, labels, test = rows.x, words.labels[rows.kept], words.test[rows.kept]
        probe = linear_probes(x[~test], labels[~test])  # dense: it knows the letters
        for name, sae in saes.items():
            scores = first_letter_scores(
                encode_rows(sae, x[~test]), labels[~test], encode_rows(sae, x[test]), labels[test], x[test], probe,
                sae.W_dec.detach().cpu(),
            )  # fmt: skip
            metrics = {
                "absorption/full": scores.full.nanmean(),
                "absorption/fraction": scores.fraction.nanmean(),
                "absorption/split_latents": scores.splits.nanmean(),
                "absorption/f1_k1": scores.f1.nanmean(),
                "absorption/probe_f1": scores.probe_f1.nanmean(),
                "absorption/letters": (~scores.full.isnan()).sum(),
            }
            tables = {"absorption/letters.csv": rows_of({"letter": words.letters, **scores._asdict()})}
            draw = partial(absorption_by_letter, words.letters, scores.full, scores.fraction)
            yield name, Scores(finite(metrics), tables, {"absorption.png": draw})
