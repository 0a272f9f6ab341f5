"""Loss recovered: the language model runs on with an SAE's reconstruction in place of its activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from hedgelab.data.llm.hook import Replacement
from hedgelab.errors import whole_number
from hedgelab.metrics import LossRecovered
from hedgelab.metrics.functional.loss_recovered import baseline_sums
from hedgelab.plots.evaluation import losses_spliced
from hedgelab.protocols.evaluation.reader import Readings
from hedgelab.protocols.evaluation.suite import Scores, Suite, Title, finite
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
        parts = list(zip(torch.split(tokens, _CONTEXTS_AT_ONCE), torch.split(usable, _CONTEXTS_AT_ONCE), strict=True))
        total = sum(model.activations(part)[where].double().sum(0) for part, where in parts)
        mean = (torch.as_tensor(total) / usable.sum()).float()
        metrics = {name: LossRecovered().to(model.device) for name in saes}
        with tqdm(total=len(parts) * (len(saes) + 3), desc="Loss recovered", unit="pass", delay=1) as bar:
            for part, where in parts:

                def logits(
                    replacement: Replacement | None = None, part: Tensor = part, where: Tensor = where
                ) -> Tensor:
                    bar.update()
                    return model.logits(part, replacement and partial(replaced, where, replacement))

                clean = logits()
                baselines = baseline_sums(part, where, clean, logits(torch.zeros_like), logits(mean.expand_as))
                for name, sae in saes.items():

                    def reconstruct(rows: Tensor, sae: SAE = sae) -> Tensor:
                        x = reader.normalise(rows.float()).to(sae.W_dec.device)
                        return reader.restore(sae(x).to(rows.device))

                    metrics[name].update(part, where, clean, logits(reconstruct))
                    metrics[name].add_to(**baselines)
        for name, metric in metrics.items():
            losses = {key: float(value) for key, value in metric.compute()._asdict().items()}
            values = finite({f"loss_recovered/{key}": value for key, value in losses.items()})
            yield name, Scores(values, {}, {"loss_recovered.png": partial(losses_spliced, losses)})


def replaced(where: Tensor, by: Replacement, hooked: Tensor) -> Tensor:
    """Hooked activations ``[n, length, d_in]`` with the rows at ``where [n, length]`` put through ``by``."""
    result = hooked.clone()
    result[where] = by(hooked[where]).to(hooked.dtype)
    return result
