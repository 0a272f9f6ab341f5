"""What a suite gives for an SAE, and how activations become codes."""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from hedgelab.kernels.codes import Codes
from hedgelab.saes import SAE

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Scores:
    """Results of one suite on one SAE.

    Attributes:
        metrics: Numbers, named ``<suite>/...``.
        tables: Details as CSV, by file name.
        figures: Figures, made when asked for, by file name.
    """

    metrics: dict[str, float]
    tables: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Callable[[], Figure]] = field(default_factory=dict)


class Suite(ABC):
    """Scores SAEs that read the same activations.

    What does not depend on an SAE (activations, labels, dense probes) is made once, when the first is scored.
    """

    name: str

    @abstractmethod
    def score(self, saes: Mapping[str, SAE]) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE, by its name, as they come."""


@torch.no_grad()
def encode_rows(sae: SAE, x: Tensor) -> Codes:
    """Latents of activations ``x [rows, d_in]`` as the SAE reads them, in sparse form, on the CPU."""
    device = sae.W_dec.device
    rows, latents, values = [], [], []
    for part in torch.split(x, _ROWS_AT_ONCE):
        crow, columns, active = sae.encode(part.to(device)).csr()
        rows.append(crow.diff().cpu())
        latents.append(columns.cpu())
        values.append(active.cpu())
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(rows).cumsum(0)])
    return Codes.from_csr(crow, torch.cat(latents), torch.cat(values), sae.d_sae)


def pooled(codes: Codes, text_of_row: Tensor, texts: int) -> Tensor:
    """Mean latents of each text, ``[texts, d_sae]`` float32; ``text_of_row``: ``[rows]`` int64."""
    _, latents, values = codes.csr()
    total = torch.zeros(texts * codes.d_sae)
    total.index_add_(0, text_of_row[codes.rows()] * codes.d_sae + latents, values.float())
    return total.view(texts, codes.d_sae) / torch.bincount(text_of_row, minlength=texts).clamp_min(1)[:, None]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """CSV text; numbers with six digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])
    return text.getvalue()
