"""One SAE in training: its loss terms since the last report, and the metrics of the validation pass under way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.training import guard
from hedgelab.training.sharding import average_gradients

if TYPE_CHECKING:
    from hedgelab.metrics.evaluation import SAEMetrics

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


class Trainee:
    """An SAE in training, alone (its name is empty) or as a member of a group.

    The shell asks of the SAE ``loss``, ``initialize``, ``before_optimizer_step``, ``after_step``, ``steps_done`` and
    ``training_numbers`` to train, ``encode``, ``decode`` and ``folded`` to measure.
    """

    def __init__(self, sae: Any, name: str = "") -> None:
        self.sae = sae
        self.name = name
        self.prefix = f"{name}/" if name else ""
        self._skipped = self._skipped_in_a_row = 0
        self._window: list[dict[str, Tensor]] = []
        self._metrics: SAEMetrics | None = None
        self._folded: Any = None

    # -- training ----------------------------------------------------------------------------------

    def prepare_gradients(self) -> None:
        """Average gradients of split latents, clip, and let the SAE adjust them, before the optimiser uses them."""
        average_gradients(self.sae.parameters(), self.sae.ranks)
        if self.sae.gradient_clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.sae.gradient_clip_norm)
        self.sae.before_optimizer_step()

    def finish_step(self, result: Any) -> None:
        """Advance what counts steps, and keep the loss terms until they are reported."""
        self._skipped_in_a_row = 0
        self.sae.after_step(result)
        self._window.append({name: term.detach() for name, term in result.terms.items()})

    def skip_step(self, step: int) -> None:
        """Count a batch that was passed over, and stop where weights are to blame or no batch has been good for long."""
        self._skipped += 1
        self._skipped_in_a_row += 1
        guard.check_parameters(self.sae, step, self.name)
        if self._skipped_in_a_row >= guard.MOST_SKIPPED:
            raise UserError(
                f"guard.on_nonfinite: the losses of {self._skipped_in_a_row} batches in a row are NaN or infinite, up to step "
                f"{step + 1}; go on from an earlier checkpoint with a lower learning rate, or mend the data"
            )
        self._window.append({})

    def check_window(self, step: int, data: Any) -> None:
        """See that no loss term since the last report is NaN or infinite."""
        guard.check_window(self._window, step, self.sae.ranks, data, self.name)

    def training_means(self, with_skipped: bool) -> dict[str, float]:
        """Each loss term's mean over the steps since the last call and over the ranks, and their sum, named ``train/...``.

        Batches that were passed over count in no mean; ``train/skipped_batches`` counts them, if asked for.
        """
        window, self._window = self._window, []
        skipped = {"train/skipped_batches": float(self._skipped)} if with_skipped else {}
        steps_taken = sum(1 for terms in window if terms)
        if not steps_taken:
            return skipped
        names = list(dict.fromkeys(name for terms in window for name in terms))
        sums = [torch.stack([terms[name].float() for terms in window if name in terms]).sum() for name in names]
        means = (self.sae.ranks.mean(torch.stack(sums)) / steps_taken).tolist()
        values: dict[str, float] = {f"train/{name}": mean for name, mean in zip(names, means, strict=True)}
        return {**values, "train/loss": sum(means), **self.sae.training_numbers(), **skipped}

    def latest_terms(self) -> dict[str, Tensor]:
        """The last step's loss terms and their sum, named ``train/...``; mean over the ranks. Empty after a skipped batch."""
        terms = self._window[-1] if self._window else {}
        values = {f"train/{name}": self.sae.ranks.mean(term.float()) for name, term in terms.items()}
        return values | {"train/loss": torch.stack(list(values.values())).sum()} if values else {}

    def window_state(self) -> dict[str, Any]:
        """The loss terms of the steps since the last report, for a checkpoint: means over the ranks."""
        names = dict.fromkeys(name for terms in self._window for name in terms)
        steps = {name: [i for i, terms in enumerate(self._window) if name in terms] for name in names}
        values = {name: torch.stack([self._window[i][name] for i in at]) for name, at in steps.items()}
        means = {name: self.sae.ranks.mean(value) for name, value in values.items()}
        return {"length": len(self._window), "steps": steps, "values": means, "skipped": self._skipped}

    def load_window_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, so that the next report is the mean over its whole interval."""
        self._skipped = state["skipped"]
        self._window = [{} for _ in range(state["length"])]
        for name, at in state["steps"].items():
            for i, value in zip(at, state["values"][name].to(self.sae.W_dec.device), strict=True):
                self._window[i][name] = value

    # -- measuring ---------------------------------------------------------------------------------

    def start_measuring(self, feature_directions: Tensor | None, device: torch.device) -> None:
        """Start from empty metrics."""
        from hedgelab.metrics.evaluation import SAEMetrics  # late: torchmetrics is slow to import

        sae = self.sae
        self._metrics = SAEMetrics(sae.d_in, sae.d_sae, feature_directions, ranks=sae.ranks).to(device)
        self._folded = sae.folded()  # now: weight averaging puts others in their place before the metrics are asked for

    @property
    def firing_rates(self) -> Tensor | None:
        """How often each latent fired on the examples measured so far, ``[d_sae]``; None where nothing is being measured.

        Summed over the ranks, so ask on every rank.
        """
        return None if self._metrics is None else self._metrics.firing.compute().reshape(-1)

    def measure(self, batch: Batch) -> None:
        """Add a batch to the metrics."""
        assert self._metrics is not None
        codes = self.sae.encode(batch.x)
        self._metrics.update(batch, self.sae.decode(codes), codes.gathered())

    def measurements(self, stage: str) -> dict[str, float]:
        """The metrics of everything measured, named ``<stage>/...``; they start again from nothing."""
        assert self._metrics is not None
        values = self._metrics.compute(self._folded.W_enc, self._folded.W_dec)
        self._metrics.reset()
        return {f"{stage}/{name}": float(value) for name, value in values.items()}
