"""Loss recovered: the language model runs on with an SAE's reconstruction in place of its activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from hedgelab.data.llm.splice import Replacement
from hedgelab.errors import whole_number
from hedgelab.metrics.functional.loss_recovered import RecoveredLoss
from hedgelab.metrics.loss_recovered import LossRecovered, baseline_sums
from hedgelab.plots.evaluation import losses_spliced
from hedgelab.protocols.evaluation.reader import ModelReader, Readings
from hedgelab.protocols.evaluation.suite import Scores, Suite, Title
from hedgelab.saes import SAE

_CONTEXTS_AT_ONCE = 2  # logits of a large vocabulary are what takes memory


class LossSuite(Suite):
    """Loss recovered on contexts that training never saw.

    Activations are replaced at the positions that training used; the others stay as they are. The untouched model and both
    ablations run once for all SAEs.

    Args:
        loss_contexts: Contexts of the test stage on which it is measured, the first ones.
    """

    name = "loss_recovered"
    titles: ClassVar[Mapping[str, Title]] = {
        "loss_recovered/recovered": Title("loss recovered", "higher"),
        "loss_recovered/kl_recovered": Title("KL recovered", "higher", drawn=False),
    }

    def __init__(self, loss_contexts: int = 8) -> None:
        self.loss_contexts = whole_number("loss_contexts", loss_contexts)

    @torch.inference_mode()
    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE, all at the end."""
        reader = readings.model
        model = reader.spliced
        contexts = reader.data.stage_contexts("test")
        tokens = contexts.tokens[: self.loss_contexts].long().to(model.device)
        usable = contexts.usable(reader.data.skip_first)[: self.loss_contexts].to(model.device)
        mean = _mean(reader, tokens, usable)
        metrics = {name: LossRecovered().to(model.device) for name in saes}
        parts = list(zip(torch.split(tokens, _CONTEXTS_AT_ONCE), torch.split(usable, _CONTEXTS_AT_ONCE), strict=True))
        with tqdm(total=len(parts) * (len(saes) + 3), desc="Loss recovered", unit="pass", delay=1) as bar:
            for part, where in parts:
                clean = model.logits(part)
                bar.update()
                zero = model.logits(part, partial(replaced, where, torch.zeros_like))
                bar.update()
                ablated = model.logits(part, partial(replaced, where, mean.expand_as))
                bar.update()
                baselines = baseline_sums(part, where, clean, zero, ablated)
                del zero, ablated
                for name, sae in saes.items():
                    metrics[name].update(
                        part, where, clean, model.logits(part, partial(replaced, where, _through(reader, sae)))
                    )
                    metrics[name].update_baselines(baselines)
                    bar.update()
        for name, metric in metrics.items():
            result = metric.compute()
            values = {f"loss_recovered/{key}": float(value) for key, value in result._asdict().items()}
            yield name, Scores(_finite(values), {}, {"loss_recovered.png": partial(losses_spliced, _plain(result))})


def _mean(reader: ModelReader, tokens: Tensor, usable: Tensor) -> Tensor:
    """Mean activation of the model over the replaced positions, ``[d_in]``."""
    rows = reader.spliced.activations
    parts = zip(torch.split(tokens, _CONTEXTS_AT_ONCE), torch.split(usable, _CONTEXTS_AT_ONCE), strict=True)
    total = sum((rows(part)[where].double().sum(0) for part, where in parts), torch.zeros(1, dtype=torch.float64))
    return (total / usable.sum()).float()


def _through(reader: ModelReader, sae: SAE) -> Replacement:
    def reconstruct(rows: Tensor) -> Tensor:
        x = reader.normalise(rows.float())
        return reader.restore(sae(x.to(sae.W_dec.device)).to(rows.device))

    return reconstruct


def replaced(where: Tensor, by: Replacement, hooked: Tensor) -> Tensor:
    """Hooked activations ``[n, length, d_in]`` with the rows at ``where [n, length]`` put through ``by``."""
    result = hooked.clone()
    result[where] = by(hooked[where]).to(hooked.dtype)
    return result


def _finite(values: dict[str, float]) -> dict[str, float]:
    """Only finite numbers."""
    return {key: value for key, value in values.items() if value == value}


def _plain(result: RecoveredLoss) -> dict[str, float]:
    return {name: float(value) for name, value in result._asdict().items()}
