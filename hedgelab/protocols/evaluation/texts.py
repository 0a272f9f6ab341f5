"""Suites on whole texts: targeted probe perturbation and spurious correlation removal.

The field advises against both: TPP falls as training goes on, and SCR with many latents goes against the truth on synthetic
SAEs (Chanin, *Are SAE Benchmarks Reliable?*, arXiv 2605.18229). They are kept for comparison with published numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hedgelab.data.llm.labelled import ClassifiedTexts
from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.probing import linear_probes
from hedgelab.metrics.functional.removal import (
    PooledTexts,
    biased_probes,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from hedgelab.plots.evaluation import scores_by_count
from hedgelab.protocols.evaluation.reader import ModelReader, Readings
from hedgelab.protocols.evaluation.suite import Scores, Suite, Title, encode_rows, rows_of, whole_numbers
from hedgelab.saes import SAE


class TextActivations(NamedTuple):
    """Activations ``x [rows, d_in]`` of every token with the text it belongs to, and their means over each text.

    ``labels`` (bool ``[texts, classes]``) and ``test`` (bool ``[texts]``) are of the texts.
    """

    x: Tensor
    text: Tensor
    pooled: Tensor
    labels: Tensor
    test: Tensor

    def of(self, sae: SAE) -> tuple[PooledTexts, PooledTexts]:
        """Texts for training and for testing, by their mean activations and latents."""
        texts = PooledTexts(self.pooled, pooled(encode_rows(sae, self.x), self.text, len(self.labels)), self.labels)
        train, test = (PooledTexts(*(part[kind] for part in texts)) for kind in (~self.test, self.test))
        return train, test


def text_activations(reader: ModelReader, texts: ClassifiedTexts, name: str) -> TextActivations:
    """Activations of texts; ``name`` is shown beside the progress."""
    data = texts.load(reader.tokenizer)
    usable = torch.ones_like(data.tokens, dtype=torch.bool)
    usable[:, : reader.data.skip_first] = False
    rows = reader.rows(name, data.tokens, usable)
    text = usable.nonzero()[:, 0][rows.kept]
    total = torch.zeros(len(data.tokens), rows.x.shape[1]).index_add_(0, text, rows.x)
    means = total / torch.bincount(text, minlength=len(data.tokens)).clamp_min(1)[:, None]
    return TextActivations(rows.x, text, means, data.labels, data.test)


def pooled(codes: Codes, text_of_row: Tensor, texts: int) -> Tensor:
    """Mean latents of each text, ``[texts, d_sae]`` float32; ``text_of_row``: ``[rows]`` int64."""
    _, latents, values = codes.csr()
    total = torch.zeros(texts * codes.d_sae)
    total.index_add_(0, text_of_row[codes.rows()] * codes.d_sae + latents, values.float())
    return total.view(texts, codes.d_sae) / torch.bincount(text_of_row, minlength=texts).clamp_min(1)[:, None]


class TPPSuite(Suite):
    """Targeted probe perturbation (see :mod:`hedgelab.metrics.functional.removal`); the field advises against it.

    Args:
        topics: Texts of several classes; without them it cannot be had.
        silenced: Numbers of latents silenced.
    """

    name = "tpp"
    needs = "topics"
    titles: ClassVar[Mapping[str, Title]] = {
        f"tpp/n{n}": Title(f"TPP, {n} latents", "higher", drawn=n == 10) for n in (2, 10, 20)
    }

    def __init__(self, topics: ClassifiedTexts | None = None, silenced: list[int] = [2, 5, 10, 20, 50]) -> None:  # noqa: B006
        self.topics, self.silenced = topics, whole_numbers("silenced", silenced)

    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        assert self.topics is not None
        data, counts = text_activations(readings.model, self.topics, self.name), self.silenced
        probe = linear_probes(data.pooled[~data.test], data.labels[~data.test], C=0.01)  # one classifier a class
        for name, sae in saes.items():
            scores = targeted_probe_perturbation(probe, *data.of(sae), sae.W_dec.detach().cpu(), counts)
            metrics = {f"tpp/n{count}": float(value) for count, value in zip(counts, scores.total, strict=True)}
            tables = {"tpp/counts.csv": rows_of({"silenced": counts, **scores._asdict()})}
            draw = partial(scores_by_count, counts, scores._asdict(), "Targeted probe perturbation", "accuracy lost")
            yield name, Scores(metrics, tables, {"tpp.png": draw})


class SCRSuite(Suite):
    """Spurious correlation removal (see :mod:`hedgelab.metrics.functional.removal`); the field advises against it.

    Args:
        removal: Texts with a label and a spurious property; without them it cannot be had.
        silenced: Numbers of latents silenced.
    """

    name = "scr"
    needs = "removal"
    titles: ClassVar[Mapping[str, Title]] = {
        f"scr/n{n}": Title(f"SCR, {n} latents", "higher", drawn=n == 20) for n in (2, 10, 20)
    }

    def __init__(self, removal: ClassifiedTexts | None = None, silenced: list[int] = [2, 5, 10, 20, 50]) -> None:  # noqa: B006
        self.removal, self.silenced = removal, whole_numbers("silenced", silenced)
        if removal is not None and removal.spurious is None:
            raise UserError("removal.spurious: missing; spurious correlation removal needs a second property")

    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        assert self.removal is not None
        data, counts = text_activations(readings.model, self.removal, self.name), self.silenced
        label, spurious = data.labels[~data.test].T
        probes = biased_probes(data.pooled[~data.test], label, spurious, C=0.01)
        for name, sae in saes.items():
            scores = spurious_correlation_removal(probes, *data.of(sae), sae.W_dec.detach().cpu(), counts)
            metrics = {f"scr/n{count}": float(value) for count, value in zip(counts, scores.score, strict=True)}
            metrics |= {
                "scr/accuracy_biased": float(scores.biased.min()),
                "scr/accuracy_clean": float(scores.clean.mean()),
            }
            columns = {"score": scores.score, "label_kept": scores.both[0], "spurious_kept": scores.both[1]}
            tables = {"scr/counts.csv": rows_of({"silenced": counts, **columns})}
            lines = {"score": scores.score, "label kept": scores.both[0], "spurious property kept": scores.both[1]}
            draw = partial(scores_by_count, counts, lines, "Spurious correlation removal", "accuracy regained")
            yield name, Scores(metrics, tables, {"scr.png": draw})
