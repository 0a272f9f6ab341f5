"""NaN and infinity in training: which step, which term, which batch; and the choice to pass over such a batch.

Stopping costs nothing: loss terms are kept until they are reported anyway, and looked at then and before every checkpoint, so
that none holds what came after. Passing over a batch needs its loss before the optimiser's step: a GPU waits once a step.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

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
        pl_module.on_nonfinite = self.on_nonfinite  # type: ignore[assignment]


def check_measured(counts: Tensor, stage: str, on_nonfinite: OnNonfinite, ranks: Ranks) -> None:
    """Stop, or warn, if batches of a pass hold NaN or infinity; ``counts`` are all of them and those left out.

    Every rank must call it. The run stops where none may be left out, or there is nothing else.
    """
    seen, left_out = ranks.sum(counts).tolist()
    found = f"data: {left_out} of {seen} batches of stage {stage} hold activations that are NaN or infinite"
    if left_out and (on_nonfinite != "skip" or left_out == seen):
        raise UserError(f"{found}; mend the data, or leave such batches out with guard.on_nonfinite=skip")
    if left_out and ranks.rank == 0:
        _logger.warning("%s: left out", found)


def check_window(window: Sequence[Mapping[str, Tensor]], end: int, ranks: Ranks, data: Any = None, whose: str = "") -> None:
    """Stop the run if a loss term of the last steps, up to step ``end``, is not finite; every rank must call it."""
    every = [term for terms in window for term in terms.values()]
    if not every or math.isfinite(float(ranks.sum(torch.stack(every).sum()))):
        return
    for index, terms in enumerate(window, start=end - len(window)):
        if wrong := [repr(name) for name, term in terms.items() if ranks.any(~torch.isfinite(term))]:
            at = f"step {index + 1} (batch {index} of stage train{_look_at(index, data)})"
            fix = "mend the data, lower the learning rate, or pass over such batches with guard.on_nonfinite=skip"
            raise UserError(f"model: loss term {', '.join(wrong)}{whose} is NaN or infinite at {at}; {fix}")


def check_parameters(module: Any, step: int, whose: str = "") -> None:
    """Stop the run if a weight is not finite. Of latents split over ranks every rank must call it, and all stop or none."""
    for name, parameter in module.named_parameters():
        total = (parameter.detach() * 0).sum()  # 0, or NaN
        if not math.isfinite(float(full_tensor(total))):  # of split latents all ranks come to the same end
            found = f"model.{name}{whose}: holds NaN or infinity after step {step}; the checkpoint before it is kept"
            raise UserError(f"{found}; lower the learning rate or set model.gradient_clip_norm")


def check_fits(module: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise a UserError that names the first weight in which a checkpoint's SAE differs from the one that is to take it up."""
    own = module.state_dict()
    for name in {**own, **state}:
        there, here = ("×".join(map(str, part[name].shape)) if name in part else "none" for part in (state, own))
        if there != here:
            sizes = f"its {name} is {there or 'a number'}, the config's {here or 'a number'}"
            raise UserError(f"ckpt_path: the checkpoint is of another SAE: {sizes}")


def _look_at(index: int, data: Any) -> str:
    """Whether the batch itself is to blame: the DataModule makes it again, whatever came between."""
    try:
        count = int((~torch.isfinite(data.batch("train", index).x)).sum())
    except Exception:  # whatever is wrong with the data, the message matters more
        return ""
    return f", which holds {count} activations that are not finite" if count else ", whose activations are all finite"
