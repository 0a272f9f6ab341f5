"""What protocols need where their fits run on several ranks: all ranks at work from the start, deciding alike.

Every rank runs the whole protocol. What it finds on disk or in the tracking store, rank zero looks up for all of them; what it
computes from trained SAEs, every rank computes for itself, from the same weights.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import lightning as L
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import distributed as dist

from hedgelab.errors import UserError
from hedgelab.saes import SAE
from hedgelab.saes.io import copy_of

T = TypeVar("T")


class _Answer(NamedTuple):
    """What rank zero tells the others: a value, or why there is none."""

    value: Any = None
    mistake: str | None = None
    bug: str | None = None


def on_every_rank(trainer: L.Trainer, work: Callable[[], T]) -> T:
    """Do ``work`` in every process of a trainer, started here where no launcher (torchrun, srun) has started them.

    Fits within ``work`` have trainers of their own, with the same strategy and devices; they find the processes there.

    Args:
        trainer: Says how many processes there are, and how they find each other.
        work: What each of them does.

    Raises:
        UserError: A strategy whose processes last for one fit only.
    """
    if isinstance(trainer.strategy, SingleDeviceStrategy):
        return work()

    def joined() -> T:
        trainer.strategy.connect(_Nobody())
        trainer.strategy.setup_environment()
        return work()

    launcher = trainer.strategy.launcher
    if launcher is None:
        return joined()
    if not isinstance(launcher, _SubprocessScriptLauncher):
        raise UserError(
            "trainer.strategy: hedge and sweep train in several fits, whose processes must outlast each of them; take ddp or "
            "sharded"
        )
    try:
        return launcher.launch(joined, trainer=trainer)  # type: ignore[no-any-return]
    except BaseException:
        launcher.kill(signal.SIGTERM)
        raise


def decided_by_rank_zero(decide: Callable[[], T]) -> T:
    """What ``decide`` gives on rank zero, on every rank; all must call this at the same point.

    Args:
        decide: Looks something up; called on rank zero only.

    Raises:
        UserError: ``decide`` has raised it: on every rank, with the same words.
        RuntimeError: ``decide`` has raised anything else.
    """
    if ranks_at_work() == 1:
        return decide()
    error: Exception | None = None
    answer: list[_Answer] = [_Answer()]
    if dist.get_rank() == 0:
        try:
            answer = [_Answer(decide())]
        except Exception as caught:
            error, words = caught, str(caught)
            answer = [_Answer(mistake=words) if isinstance(caught, UserError) else _Answer(bug=words)]
    dist.broadcast_object_list(answer, src=0)
    if error is not None:
        raise error
    ((value, mistake, bug),) = answer
    if mistake is not None:
        raise UserError(mistake)
    if bug is not None:
        raise RuntimeError(f"rank 0: {bug}")
    return value  # type: ignore[no-any-return]


def found_by_rank_zero(find: Callable[[], SAE | None]) -> SAE | None:
    """The SAE that ``find`` gives on rank zero, whole on every rank, each with memory of its own; None where it finds none."""
    if ranks_at_work() == 1:
        return find()

    def described() -> tuple[dict[str, Any], dict[str, Any]] | None:
        sae = find()
        return None if sae is None else (sae.config(), sae.state_dict())

    parts = decided_by_rank_zero(described)
    return None if parts is None else copy_of(*parts)


def ranks_at_work() -> int:
    """How many ranks there are, once :func:`on_every_rank` has them at work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Nobody(L.LightningModule):
    """Stands where strategies want to see a module before they let processes find each other."""

    def configure_model(self) -> None:
        """Nothing; without the method the sharded strategy refuses the module."""
