"""Suites on whole texts: targeted probe perturbation and spurious correlation removal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.data.llm.classified import ClassifiedTexts
from hedgelab.metrics.functional.logistic import LinearProbe, linear_probes
from hedgelab.metrics.functional.removal import (
    BiasedProbes,
    PooledTexts,
    biased_probes,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from hedgelab.plots.evaluation import scores_by_count
from hedgelab.protocols.evaluation.reader import ModelReader
from hedgelab.protocols.evaluation.scores import Scores, Suite, encode_rows, pooled, table
from hedgelab.saes import SAE


class TextActivations(NamedTuple):
    """Activations of texts, token by token and pooled.

    Attributes:
        x: Of every token, ``[rows, d_in]``.
        text: Which text it belongs to, ``[rows]`` int64.
        pooled: Means of the texts, ``[texts, d_in]``.
        labels: bool ``[texts, classes]``.
        test: bool ``[texts]``.
    """

    x: Tensor
    text: Tensor
    pooled: Tensor
    labels: Tensor
    test: Tensor

    def of(self, sae: SAE) -> tuple[PooledTexts, PooledTexts]:
        """Texts for training and for testing, by their mean activations and latents."""
        codes = pooled(encode_rows(sae, self.x), self.text, len(self.labels))
        return (
            PooledTexts(self.pooled[~self.test], codes[~self.test]),
            PooledTexts(self.pooled[self.test], codes[self.test]),
        )


class _TextSuite(Suite):
    def __init__(self, reader: ModelReader, texts: ClassifiedTexts, counts: Sequence[int]) -> None:
        self._reader, self._texts, self._counts = reader, texts, list(counts)

    @cached_property
    def activations(self) -> TextActivations:
        """Activations of the texts."""
        data = self._texts.load(self._reader.tokenizer)
        usable = torch.ones_like(data.tokens, dtype=torch.bool)
        usable[:, : self._reader.data.skip_first] = False
        rows = self._reader.rows(self.name, data.tokens, usable)
        text = usable.nonzero()[:, 0][rows.kept]
        total = torch.zeros(len(data.tokens), rows.x.shape[1]).index_add_(0, text, rows.x)
        means = total / torch.bincount(text, minlength=len(data.tokens)).clamp_min(1)[:, None]
        return TextActivations(rows.x, text, means, data.labels, data.test)


class TPPSuite(_TextSuite):
    """Targeted probe perturbation (see :mod:`hedgelab.metrics.functional.removal`)."""

    name = "tpp"

    @cached_property
    def probe(self) -> LinearProbe:
        """One classifier a class, on mean activations."""
        data = self.activations
        return linear_probes(data.pooled[~data.test], data.labels[~data.test], C=0.01)

    def score(self, saes: Mapping[str, SAE]) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        data, counts = self.activations, self._counts
        labels = data.labels[~data.test], data.labels[data.test]
        for name, sae in saes.items():
            train, test = data.of(sae)
            W_dec = sae.W_dec.detach().cpu()
            scores = targeted_probe_perturbation(self.probe, train, labels[0], test, labels[1], W_dec, counts)
            metrics = {f"tpp/n{count}": float(value) for count, value in zip(counts, scores.total, strict=True)}
            rows = [list(row) for row in zip(counts, *(values.tolist() for values in scores), strict=True)]
            tables = {"tpp/counts.csv": table(["silenced", *scores._fields], rows)}
            draw = partial(scores_by_count, counts, scores._asdict(), "Targeted probe perturbation", "accuracy lost")
            yield name, Scores(metrics, tables, {"tpp.png": draw})


class SCRSuite(_TextSuite):
    """Spurious correlation removal (see :mod:`hedgelab.metrics.functional.removal`)."""

    name = "scr"

    @cached_property
    def probes(self) -> BiasedProbes:
        """The biased probe and the unbiased ones."""
        data = self.activations
        train = ~data.test
        return biased_probes(data.pooled[train], data.labels[train, 0], data.labels[train, 1], C=0.01)

    def score(self, saes: Mapping[str, SAE]) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        data, counts = self.activations, self._counts
        labels = data.labels[~data.test], data.labels[data.test]
        for name, sae in saes.items():
            train, test = data.of(sae)
            W_dec = sae.W_dec.detach().cpu()
            scores = spurious_correlation_removal(self.probes, train, labels[0], test, labels[1], W_dec, counts)
            metrics = {f"scr/n{count}": float(value) for count, value in zip(counts, scores.score, strict=True)}
            metrics |= {
                "scr/accuracy_biased": float(scores.biased.min()),
                "scr/accuracy_clean": float(scores.clean.mean()),
            }
            columns = [values.tolist() for values in (scores.score, *scores.both)]
            rows = [list(row) for row in zip(counts, *columns, strict=True)]
            tables = {"scr/counts.csv": table(["silenced", "score", "label_kept", "spurious_kept"], rows)}
            lines = {"score": scores.score, "label kept": scores.both[0], "spurious property kept": scores.both[1]}
            draw = partial(scores_by_count, counts, lines, "Spurious correlation removal", "accuracy regained")
            yield name, Scores(metrics, tables, {"scr.png": draw})
