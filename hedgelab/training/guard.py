"""NaN and infinity in training: which step, which term, which batch; and the choice to pass over such a batch.

Stopping costs nothing a step: loss terms are kept until they are reported anyway, and are looked at then and before every
checkpoint, so that no checkpoint ever holds what came after. Passing over a batch needs its loss before the optimiser's
step, which on a GPU waits for the device once a step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.kernels.ranks import Ranks
from hedgelab.training.sharding import full_tensor

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

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tell the shell, which looks at losses and batches anyway."""
        shell: Any = pl_module
        shell.on_nonfinite, shell.measured_finite = self.on_nonfinite, MeasuredBatches()


class MeasuredBatches:
    """Counts the batches of a validation or test pass, and those left out because they hold NaN or infinity."""

    def __init__(self) -> None:
        self.seen = self.left_out = 0

    def is_good(self, batch: Batch) -> bool:
        """Whether a batch may be measured; counts it."""
        good = bool(torch.isfinite(batch.x).all())
        self.seen += 1
        self.left_out += not good
        return good

    def check(self, stage: str, on_nonfinite: OnNonfinite, ranks: Ranks, device: torch.device) -> None:
        """At the end of a pass, stop or say how many batches were left out; every rank must call it.

        Raises:
            UserError: There are some and ``on_nonfinite`` is ``stop``, or there is nothing else.
        """
        seen, left_out = ranks.sum(torch.tensor([self.seen, self.left_out], device=device)).tolist()
        self.seen = self.left_out = 0
        if not left_out:
            return
        found = f"data: {left_out} of {seen} batches of stage {stage} hold activations that are NaN or infinite"
        if on_nonfinite == "stop" or left_out == seen:
            raise UserError(f"{found}; mend the data, or leave such batches out with guard.on_nonfinite=skip")
        if ranks.rank == 0:
            _logger.warning("%s: left out", found)


def is_finite(total: Tensor, ranks: Ranks) -> bool:
    """Whether a loss is finite on every rank."""
    return bool(torch.isfinite(ranks.sum(total.detach())))


def check_window(
    window: Sequence[Mapping[str, Tensor]], end: int, ranks: Ranks, data: Any = None, member: str = ""
) -> None:
    """Stop the run if a loss term of the last steps is not finite. Every rank must call it, and all stop or none.

    Args:
        window: Loss terms of the last steps.
        end: Number of the step after them.
        ranks: The ranks that share the batches.
        data: The DataModule, which can make the batch to blame again.
        member: Name of the SAE in its group; empty for one alone.

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
    raise UserError(_describe(end - len(window) + first, wrong, data, member))


def check_parameters(module: Any, step: int, member: str = "") -> None:
    """Stop the run if a weight is not finite. Of latents split over ranks every rank must call it, and all stop or none.

    Raises:
        UserError: One is not.
    """
    for name, parameter in module.named_parameters():
        total = (parameter.detach() * 0).sum()  # 0, or NaN
        if not math.isfinite(float(full_tensor(total))):  # of split latents all ranks come to the same end
            whose = f" of member '{member}'" if member else ""
            raise UserError(
                f"model.{name}{whose}: holds NaN or infinity after step {step}; the checkpoint before it is kept; lower the "
                "learning rate or set model.gradient_clip_norm"
            )


def check_skips(in_a_row: int, step: int) -> None:
    """Stop the run if it cannot be single batches that make losses NaN or infinite.

    Raises:
        UserError: Many batches in a row were passed over.
    """
    if in_a_row >= MOST_SKIPPED:
        raise UserError(
            f"guard.on_nonfinite: the losses of {in_a_row} batches in a row are NaN or infinite, up to step "
            f"{step + 1}; go on from an earlier checkpoint with a lower learning rate, or mend the data"
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


def _describe(index: int, terms: Sequence[str], data: Any, member: str) -> str:
    """One line about the batch whose loss was not finite first; steps count from 1, batches from 0."""
    whose = f" of member '{member}'" if member else ""
    head = f"model: loss term {', '.join(repr(term) for term in terms)}{whose} is NaN or infinite at step {index + 1}"
    what = _look_at(index, data)
    return (
        f"{head} (batch {index} of stage train{what}); the last checkpoint is from before it; mend the data, lower the "
        "learning rate, or pass over such batches with guard.on_nonfinite=skip"
    )


def _look_at(index: int, data: Any) -> str:
    """Whether the batch itself is to blame: the DataModule makes it again, whatever came between."""
    if data is None:
        return ""
    try:
        x = data.batch("train", index).x
    except Exception:  # whatever is wrong with the data, the message matters more
        return ""
    count = int((~torch.isfinite(x)).sum())
    return f", which holds {count} activations that are not finite" if count else ", whose activations are all finite"
