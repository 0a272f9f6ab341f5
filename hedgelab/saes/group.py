"""Several SAEs trained on one stream of activations, each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.kernels.ranks import ALONE
from hedgelab.saes.base import SAE, UNREPORTED, count_steps_for_validation, is_logged, known_directions
from hedgelab.saes.guard import check_fits, check_parameters, is_finite
from hedgelab.saes.parallel import batch_ranks


@dataclass(frozen=True)
class StepBatches:
    """The batches of one step where some members of a group see other data than the rest.

    Attributes:
        shared: What every other member sees.
        own: Batches of single members, by name.
    """

    shared: Batch
    own: dict[str, Batch] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        """The shared activations, ``[batch, d_in]``."""
        return self.shared.x

    def of(self, name: str) -> Batch:
        """The batch that a member sees."""
        return self.own.get(name, self.shared)

    def to(self, device: torch.device | str) -> StepBatches:
        """The same batches on another device."""
        return StepBatches(self.shared.to(device), {name: batch.to(device) for name, batch in self.own.items()})


class MemberOptimizers(Optimizer):
    """The optimisers of several SAEs, and their schedules, stepping as one.

    Lightning counts a step for every optimiser that steps; this one keeps ``global_step`` the number of batches.

    Args:
        optimizers: Each member's optimiser, by name.
        schedules: Schedules of those members that have one.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], schedules: Mapping[str, LRScheduler]) -> None:
        self.members, self.schedules = dict(optimizers), dict(schedules)
        groups = [group for optimizer in self.members.values() for group in optimizer.param_groups]
        super().__init__([parameter for group in groups for parameter in group["params"]], {})
        self.param_groups = groups  # the very groups whose learning rates the schedules set

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every optimiser, then its schedule."""
        result = None if closure is None else closure()
        for name, optimizer in self.members.items():
            optimizer.step()
            if name in self.schedules:
                self.schedules[name].step()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of every member."""
        for optimizer in self.members.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """States of all optimisers and schedules, by member."""
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.members.items()},
            "schedules": {name: schedule.state_dict() for name, schedule in self.schedules.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from saved states."""
        for name, optimizer in self.members.items():
            optimizer.load_state_dict(state_dict["optimizers"][name])
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state_dict["schedules"][name])
        self.param_groups = [group for optimizer in self.members.values() for group in optimizer.param_groups]


class SAEGroup(L.LightningModule):
    """Trains several SAEs, of any kinds, widths and seeds, on one stream; the result of each is what it were alone.

    Every member keeps its own optimiser, schedule, warm-ups, dead-latent clock and metrics. Members that are not
    initialised start from the first training batch.

    Args:
        members: The SAEs, by name.
        loggers: Each member's own logger, by name; None reports to the trainer's, the names in front of the numbers.

    Raises:
        UserError: No members, widths of activations that differ, or a name with a dot.
    """

    members: nn.ModuleDict

    def __init__(self, members: Mapping[str, SAE], loggers: Mapping[str, Logger] | None = None) -> None:
        super().__init__()
        if not members:
            raise UserError("members: a group needs at least one SAE")
        widths = {name: sae.d_in for name, sae in members.items()}
        if len(set(widths.values())) > 1:
            raise UserError(f"members: all need the same d_in, got {widths}")
        if dotted := [name for name in members if "." in name]:
            raise UserError(f"members: a name must not contain a dot, got '{dotted[0]}'")
        self.automatic_optimization = False
        self.members = nn.ModuleDict(members)
        self.member_loggers = dict(loggers or {})

    def saes(self) -> dict[str, SAE]:
        """The members, by name."""
        return dict(self.members.items())  # type: ignore[arg-type]

    # -- training ----------------------------------------------------------------------------------

    def configure_optimizers(self) -> MemberOptimizers:
        """Every member's own optimiser and schedule, behind one."""
        optimizers: dict[str, Optimizer] = {}
        schedules: dict[str, LRScheduler] = {}
        for name, sae in self.saes().items():
            made = sae.configure_optimizers()
            if isinstance(made, dict):
                schedules[name] = made["lr_scheduler"]["scheduler"]
                made = made["optimizer"]
            optimizers[name] = made
        return MemberOptimizers(optimizers, schedules)

    def setup(self, stage: str) -> None:
        """Find out over which ranks batches are split."""
        for sae in self.saes().values():
            sae.join(batch_ranks(self.trainer))

    def teardown(self, stage: str) -> None:
        """Work alone again."""
        for sae in self.saes().values():
            sae.join(ALONE)

    def configure_model(self) -> None:
        """Under the sharded strategy, leave each process its part of every member's latents."""
        if self.device_mesh is not None:
            for sae in self.saes().values():
                sae.split_latents(self.device_mesh, self.trainer)

    def on_fit_start(self) -> None:
        """Initialise from data the members that are not, at the first step of a run."""
        if self.trainer.global_step == 0 and self.trainer.ckpt_path is None:
            for sae in self.saes().values():
                sae.initialize_from(getattr(self.trainer, "datamodule", None), self.device)

    def on_train_start(self) -> None:
        """Let validation intervals count optimiser steps, whatever the chunk."""
        count_steps_for_validation(self.trainer)

    def training_step(self, chunk: list[Batch] | list[StepBatches], batch_idx: int) -> None:
        """Take one step of every member for each batch of the chunk."""
        optimizer, saes = self.optimizers(), self.saes()
        step = self.trainer.global_step
        for batch in chunk:
            results = {}
            for name, sae in saes.items():
                sae.set_steps_done(step)
                results[name] = sae.loss(batch.of(name) if isinstance(batch, StepBatches) else batch)
            for sae in saes.values():
                sae.zero_grad()
            good = {
                name
                for name, sae in saes.items()
                if sae.on_nonfinite == "stop" or is_finite(results[name].total, sae.ranks)
            }
            # One backward pass of the sum: members share no parameters, so each gets exactly its own gradients, and DDP
            # sees every parameter used.
            if good:
                self.manual_backward(torch.stack([results[name].total for name in saes if name in good]).sum())
            for name in saes:
                if name in good:
                    saes[name].adjust_gradients()
            optimizer.step()  # type: ignore[union-attr]
            for name, sae in saes.items():
                if name in good:
                    sae.finish_step(results[name])
                else:
                    sae.skip_step()
            step += 1
        for sae in saes.values():
            sae.set_steps_done(step)
        if is_logged(self.trainer, step):
            self._check_windows(step)
            self.report({name: sae.training_means() for name, sae in saes.items()}, step)

    def check_finite(self, step: int) -> None:
        """See that everything a checkpoint would hold is finite.

        Raises:
            UserError: It is not; names the member.
        """
        self._check_windows(step)
        for name, sae in self.saes().items():
            check_parameters(sae, step, name)

    def _check_windows(self, step: int) -> None:
        for name, sae in self.saes().items():
            sae.check_window(step, name)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what has not been reported yet."""
        checkpoint[UNREPORTED] = {name: sae.window_state() for name, sae in self.saes().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what had not been reported yet, if it is a checkpoint of such SAEs.

        Raises:
            UserError: It is of another.
        """
        check_fits(self, checkpoint["state_dict"])
        for sae in self.saes().values():
            sae.mark_initialized()
        for name, state in checkpoint.get(UNREPORTED, {}).items():
            if name in self.members:
                self.saes()[name].load_window_state(state)

    def report(self, values: Mapping[str, dict[str, float]], step: int) -> None:
        """Send each member's numbers to its logger; callbacks and the progress bar get all, and the mean training loss."""
        named = {f"{name}/{key}": value for name, own in values.items() for key, value in own.items()}
        for name, logger in self.member_loggers.items():
            logger.log_metrics(values[name], step=step)
        if not self.member_loggers:
            for shared in self.loggers:
                shared.log_metrics(named, step=step)
        losses = [own["train/loss"] for own in values.values() if "train/loss" in own]
        if losses:
            named["train/loss"] = sum(losses) / len(losses)
        self.log_dict(named, logger=False, batch_size=1)

    # -- measuring ---------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Start from empty metrics; in a fit, see first that there is something to measure."""
        for name, sae in self.saes().items():
            if self.trainer.state.fn == "fit":
                check_parameters(sae, self.trainer.global_step, name)
            sae.start_measuring(known_directions(self.trainer), self.device)

    def validation_step(self, chunk: list[Batch], batch_idx: int) -> None:
        """Measure every member on a chunk of validation batches."""
        for sae in self.saes().values():
            sae.measure(chunk)

    def on_validation_epoch_end(self) -> None:
        """Report the metrics of every member."""
        self._report_measurements("val")

    def on_test_start(self) -> None:
        """Start from empty metrics."""
        self.on_validation_start()

    def test_step(self, chunk: list[Batch], batch_idx: int) -> None:
        """Measure every member on a chunk of test batches."""
        self.validation_step(chunk, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Report the metrics of every member."""
        self._report_measurements("test")

    def _report_measurements(self, stage: str) -> None:
        self.report({name: sae.measurements(stage) for name, sae in self.saes().items()}, self.trainer.global_step)
