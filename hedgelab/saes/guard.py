"""NaN and infinity in training: which step, which term, which batch; and the choice to pass over such a batch.

Stopping costs nothing a step: loss terms are kept until they are reported anyway, and are looked at then and before every
checkpoint, so that no checkpoint ever holds what came after. Passing over a batch needs its loss before the optimiser's
step, which on a GPU waits for the device once a step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.kernels.ranks import Ranks

if TYPE_CHECKING:
    from hedgelab.saes.base import SAE

OnNonfinite = Literal["stop", "skip"]
MOST_SKIPPED = 100
_logger = logging.getLogger(__name__)


class FiniteGuard(L.Callback):
    """What to do with a batch whose loss, or in validation and tests whose activations, are NaN or infinite.

    Args:
        on_nonfinite: ``stop`` ends the run with the step, the term and the batch, and leaves the last good checkpoint;
            ``skip`` passes over the batch (no weight moves) and counts it as ``train/skipped_batches``. Weights that are
            NaN or infinite end the run either way, and so do a hundred such batches in a row.
    """

    def __init__(self, on_nonfinite: OnNonfinite = "stop") -> None:
        super().__init__()
        self.on_nonfinite = on_nonfinite
        self._measured = self._spoiled = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tell the SAE, or every member of a group."""
        for module in _saes(pl_module):
            module.on_nonfinite = self.on_nonfinite

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from zero."""
        self._measured = self._spoiled = 0

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Leave batches that would spoil every metric out of the chunk."""
        good = [part for part in batch if torch.isfinite(part.x).all()]
        self._measured += len(batch)
        self._spoiled += len(batch) - len(good)
        batch[:] = good

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop, or say how many were left out.

        Raises:
            UserError: There are some, or there is nothing else.
        """
        counts = torch.tensor([self._measured, self._spoiled], device=pl_module.device)
        measured, spoiled = next(iter(_saes(pl_module))).ranks.sum(counts).tolist()
        if not spoiled:
            return
        stage = "test" if trainer.testing else "val"
        said = f"data: {spoiled} of {measured} batches of stage {stage} hold activations that are NaN or infinite"
        if self.on_nonfinite == "stop" or spoiled == measured:
            raise UserError(f"{said}; mend the data, or leave such batches out with guard.on_nonfinite=skip")
        if trainer.is_global_zero:
            _logger.warning("%s: left out", said)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from zero."""
        self.on_validation_epoch_start(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As in validation."""
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As in validation."""
        self.on_validation_epoch_end(trainer, pl_module)


def _saes(module: torch.nn.Module) -> Iterator[SAE]:
    from hedgelab.saes.base import SAE  # late: it imports this module

    return (part for part in module.modules() if isinstance(part, SAE))


def is_finite(total: Tensor, ranks: Ranks) -> bool:
    """Whether a loss is finite on every rank."""
    return bool(torch.isfinite(ranks.sum(total.detach())))


def check_window(
    window: Sequence[Mapping[str, Tensor]], end: int, ranks: Ranks, trainer: L.Trainer | None, member: str | None = None
) -> None:
    """Stop the run if a loss term of the last steps is not finite. Every rank must call it, and all stop or none.

    Args:
        window: Loss terms of the last steps.
        end: Number of the step after them.
        ranks: The ranks that share the batches.
        trainer: Gives access to the batch to blame.
        member: Name of the SAE in its group.

    Raises:
        UserError: One is not; says step, term and batch.
    """
    every = [term for terms in window for term in terms.values()]
    if not every or math.isfinite(float(ranks.sum(torch.stack(every).sum()))):
        return
    seen = {name: term for terms in window for name, term in terms.items()}
    names = list(seen)
    zero = torch.zeros((), device=seen[names[0]].device)
    values = torch.stack([torch.stack([terms.get(name, zero).float() for name in names]) for terms in window])
    bad = ranks.any(~torch.isfinite(values))
    if not bad.any():
        return
    first = int(bad.any(dim=1).nonzero()[0])
    wrong = [name for name, is_bad in zip(names, bad[first].tolist(), strict=True) if is_bad]
    raise UserError(_describe(end - len(window) + first, wrong, trainer, member))


def check_parameters(module: torch.nn.Module, step: int, member: str | None = None) -> None:
    """Stop the run if a weight is not finite. Of latents split over ranks every rank must call it, and all stop or none.

    Raises:
        UserError: One is not.
    """
    for name, parameter in module.named_parameters():
        total = (parameter.detach() * 0).sum()  # 0, or NaN
        whole = total.full_tensor() if hasattr(total, "full_tensor") else total  # all ranks must come to the same end
        if not math.isfinite(float(whole)):
            whose = f" of member '{member}'" if member else ""
            raise UserError(
                f"model.{name}{whose}: holds NaN or infinity after step {step}; the checkpoint before it is kept; lower the "
                "learning rate or set model.gradient_clip_norm"
            )


def check_skips(sae: SAE, in_a_row: int) -> None:
    """Stop the run if it is the weights that make losses NaN or infinite, and not single batches.

    Raises:
        UserError: Weights are not finite, or many batches in a row were passed over.
    """
    check_parameters(sae, sae.steps_done)
    if in_a_row >= MOST_SKIPPED:
        raise UserError(
            f"guard.on_nonfinite: the losses of {in_a_row} batches in a row are NaN or infinite, up to step "
            f"{sae.steps_done + 1}; go on from an earlier checkpoint with a lower learning rate, or mend the data"
        )


def check_fits(module: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """See that a checkpoint is of an SAE like the one that is to take it up.

    Raises:
        UserError: It is not; names the first weight that differs.
    """
    own = module.state_dict()
    for name in [*own, *(name for name in state if name not in own)]:
        here, there = (tuple(part[name].shape) if name in part else None for part in (own, state))
        if here != there:
            shown = ["none" if shape is None else "×".join(map(str, shape)) or "a number" for shape in (there, here)]
            raise UserError(
                f"ckpt_path: the checkpoint is of another SAE: its {name} is {shown[0]}, the config's {shown[1]}"
            )


def _describe(index: int, terms: Sequence[str], trainer: L.Trainer | None, member: str | None) -> str:
    """One line about the batch whose loss was not finite first; steps count from 1, batches from 0."""
    whose = f" of member '{member}'" if member else ""
    head = f"model: loss term {', '.join(repr(term) for term in terms)}{whose} is NaN or infinite at step {index + 1}"
    what = _look_at(index, trainer)
    return (
        f"{head} (batch {index} of stage train{what}); the last checkpoint is from before it; mend the data, lower the "
        "learning rate, or pass over such batches with guard.on_nonfinite=skip"
    )


def _look_at(index: int, trainer: L.Trainer | None) -> str:
    """Whether the batch itself is to blame: it can be had again, whatever came between."""
    data: Any = getattr(trainer, "datamodule", None)
    if data is None:
        return ""
    try:
        x = data.batch("train", index).x
    except Exception:  # whatever is wrong with the data, the message matters more
        return ""
    count = int((~torch.isfinite(x)).sum())
    return f", which holds {count} activations that are not finite" if count else ", whose activations are all finite"
