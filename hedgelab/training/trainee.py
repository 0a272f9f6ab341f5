"""One SAE in training: its loss terms since the last report, and the metrics of the validation pass under way."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.training import guard
from hedgelab.training.captured import StepGraph
from hedgelab.training.sharding import average_gradients

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


class Trainee:
    """An SAE in training, alone (its name is empty) or as a member of a group."""

    def __init__(self, sae: Any, name: str = "") -> None:
        self.sae = sae
        self.name = name
        self.prefix, self.whose = (f"{name}/", f" of member '{name}'") if name else ("", "")
        self._skipped = self._skipped_in_a_row = 0
        self._window: list[dict[str, Tensor]] = []
        self._metrics: Any = None
        self._folded: Any = None
        self.graph = StepGraph(sae)

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
        guard.check_parameters(self.sae, step, self.whose)
        if self._skipped_in_a_row >= guard.MOST_SKIPPED:
            bad = f"the losses of {self._skipped_in_a_row} batches in a row are NaN or infinite, up to step {step + 1}"
            raise UserError(f"guard.on_nonfinite: {bad}; go on from an earlier checkpoint, or mend the data")
        self._window.append({})

    def check_window(self, step: int, data: Any) -> None:
        """See that no loss term since the last report is NaN or infinite."""
        guard.check_window(self._window, step, self.sae.ranks, data, self.whose)

    def training_means(self, with_skipped: bool) -> dict[str, float]:
        """Each loss term's mean over ranks and the good steps since the last call, and their sum, named ``train/...``."""
        values: dict[str, float] = {}
        if steps := [terms for terms in self._window if terms]:
            names, means = self._means(steps)
            values = {f"train/{name}": mean for name, mean in zip(names, means.tolist(), strict=True)}
            values |= {"train/loss": sum(values.values()), **self.sae.training_numbers()}
        self._window = []
        return values | ({"train/skipped_batches": float(self._skipped)} if with_skipped else {})

    def latest_terms(self) -> dict[str, Tensor]:
        """The last step's loss terms and their sum, named ``train/...``; mean over the ranks. Empty after a skipped batch."""
        if not self._window or not self._window[-1]:
            return {}
        names, means = self._means(self._window[-1:])
        return {f"train/{name}": mean for name, mean in zip(names, means, strict=True)} | {"train/loss": means.sum()}

    def _means(self, steps: list[dict[str, Tensor]]) -> tuple[Iterable[str], Tensor]:
        names = dict.fromkeys(name for terms in steps for name in terms)
        sums = [torch.stack([terms[name].float() for terms in steps if name in terms]).sum() for name in names]
        return names, self.sae.ranks.mean(torch.stack(sums)) / len(steps)

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

    def start_measuring(self, data: Any, device: torch.device, last: bool = True) -> None:
        """Start from empty metrics, of what ``data`` knows; the ``last`` pass measures what is too dear for every one."""
        from hedgelab.metrics.evaluation import SAEMetrics  # late: torchmetrics is slow to import

        sae = self.sae
        directions, parents, null = (getattr(data, name, None) for name in ("feature_directions", "parents", "null_directions"))
        self._metrics = SAEMetrics(sae.d_in, sae.d_sae, directions, parents, null, sae.ranks, last).to(device)
        self._folded = sae.folded()  # now: weight averaging puts others in their place before the metrics are asked for

    @property
    def firing_rates(self) -> Tensor | None:
        """How often each latent fired so far, ``[d_sae]``, summed over the ranks, all of which must ask; None before."""
        return None if self._metrics is None else self._metrics.firing.compute().reshape(-1)

    def measure(self, batch: Batch) -> None:
        """Add a batch to the metrics."""
        codes = self.sae.encode(batch.x)
        self._metrics.update(batch, self.sae.decode(codes), codes.gathered())

    def measurements(self, stage: str) -> dict[str, float]:
        """The metrics of everything measured, named ``<stage>/...``; their sums are let go of, for some are large."""
        values = self._metrics.compute(self._folded.W_enc, self._folded.W_dec)
        self._metrics = self._folded = None
        return {f"{stage}/{name}": float(value) for name, value in values.items()}
