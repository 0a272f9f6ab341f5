"""NaN and infinity in training: which step, which term, which batch; and the choice to pass over such a batch.

Stopping costs nothing a step: loss terms are kept until they are reported anyway, and are looked at then and before every
checkpoint, so that no checkpoint ever holds what came after. Passing over a batch needs its loss before the optimiser's
step, which on a GPU waits for the device once a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.kernels.ranks import Ranks

OnNonfinite = Literal["stop", "skip"]


class FiniteGuard(L.Callback):
    """What to do with a batch whose loss is NaN or infinite.

    Args:
        on_nonfinite: ``stop`` ends the run with the step, the term and the batch, and leaves the last good checkpoint;
            ``skip`` passes over the batch (no weight moves) and counts it as ``train/skipped_batches``.
    """

    def __init__(self, on_nonfinite: OnNonfinite = "stop") -> None:
        super().__init__()
        self.on_nonfinite = on_nonfinite

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tell the SAE, or every member of a group."""
        from hedgelab.saes.base import SAE  # late: it imports this module

        for module in pl_module.modules():
            if isinstance(module, SAE):
                module.on_nonfinite = self.on_nonfinite


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
    """Stop the run if a weight is not finite.

    Raises:
        UserError: One is not.
    """
    for name, parameter in module.named_parameters():
        total = parameter.detach().float().sum()
        local = total.to_local() if hasattr(total, "to_local") else total
        if not math.isfinite(float(local)) and not bool(torch.isfinite(parameter.detach()).all()):
            whose = f" of member '{member}'" if member else ""
            raise UserError(
                f"model.{name}{whose}: holds NaN or infinity after step {step}; the checkpoint before it is kept; lower the "
                "learning rate or set model.gradient_clip_norm"
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
