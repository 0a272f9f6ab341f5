"""Protocols on several ranks: every rank runs the whole protocol, and rank zero looks up what is on disk for all of them."""

import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed as dist

from hedgelab.errors import UserError

T = TypeVar("T")


def on_every_rank(trainer: L.Trainer, work: Callable[[], T]) -> T:
    """Do ``work`` in every process of a trainer, started here where no launcher (torchrun, srun) has started them.

    Fits within ``work`` have trainers of their own, with the same strategy and devices; they find the processes there. A
    strategy whose processes last for one fit only is refused.
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

    A :class:`~hedgelab.errors.UserError` of its is raised on every rank; any other error as a RuntimeError on the others.
    """
    if ranks_at_work() == 1:
        return decide()
    error: Exception | None = None
    answer: list[Any] = [None, None]  # the value, or what the other ranks raise
    if dist.get_rank() == 0:
        try:
            answer[0] = decide()
        except Exception as caught:
            error = caught
            answer[1] = (UserError if isinstance(caught, UserError) else RuntimeError)(str(caught))
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise error or answer[1]
    return answer[0]  # type: ignore[no-any-return]


def ranks_at_work() -> int:
    """How many ranks there are, once :func:`on_every_rank` has them at work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@rank_zero_only
def say(line: str) -> None:
    """Tell the user a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def say_names(what: str, names: Sequence[str]) -> None:
    """Tell the user what happens to things with names, of which the first few are shown."""
    shown = names if len(names) <= 6 else [*names[:5], f"… ({len(names)} in all)"]
    say(f"{what} {', '.join(shown)}")


class _Nobody(L.LightningModule):
    """Stands where strategies want to see a module before they let processes find each other."""

    def configure_model(self) -> None:
        """Nothing; without the method the sharded strategy refuses the module."""
