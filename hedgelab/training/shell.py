"""The shell around one SAE or several: Lightning's hooks, said once for both."""

import copy
import json
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Set
from contextlib import suppress
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from hedgelab.errors import UserError
from hedgelab.kernels.ranks import ALONE, Ranks
from hedgelab.training import flags, guard, steps
from hedgelab.training.checkpoints import use_verified_io
from hedgelab.training.optimizers import MemberOptimizers, lr_factors, make_optimizer, make_schedule
from hedgelab.training.sharding import batch_ranks, exchange_full_states, is_split, split_latents
from hedgelab.training.trainee import Trainee

UNREPORTED = "hedgelab_unreported"  # where a checkpoint keeps loss terms that have not been reported yet
ARCHITECTURES = "hedgelab_saes"  # where it keeps what its SAEs are, to be made without the config of the run
_MOST_RETURNED = 4  # SAEs whose numbers all go to callback_metrics where a process returns them through a pipe


class TrainingShell(L.LightningModule):
    """Trains, measures, guards and reports the SAEs of a LightningModule, which says what they are by :meth:`saes`.

    A batch is one optimiser step, or a list of batches as many steps (:mod:`hedgelab.training.steps`). Optimisation is
    manual in Lightning's sense, so ``global_step`` counts optimiser steps either way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        # Without a FiniteGuard, training stops at NaN and infinity, and validation measures whatever comes.
        self.on_nonfinite: guard.OnNonfinite | None = None
        self.member_loggers: dict[str, Logger] = {}  # numbers of an SAE without one go to the trainer's
        self.ranks: Ranks = ALONE  # over which each batch is split; the loss is the mean over them
        self._trainees: dict[str, Trainee] = {}
        self._threads_before: int | None = None
        self._followed = False
        self._plain = False  # nobody listens to single steps, and all of one is this process's
        self._good: Set[str] = frozenset()

    @abstractmethod
    def saes(self) -> Mapping[str, Any]:
        """The SAEs to train, by name; the name is empty where there is one alone."""

    @property
    def trainees(self) -> list[Trainee]:
        """The SAEs with what is known about their training."""
        if not self._trainees:
            self._trainees = {name: Trainee(sae, name) for name, sae in self.saes().items()}
        return list(self._trainees.values())

    def trainee(self, name: str = "") -> Trainee:
        """One of them."""
        return next(trainee for trainee in self.trainees if trainee.name == name)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: no training under way, and no connections to loggers."""
        return {**super().__getstate__(), "_trainees": {}, "member_loggers": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with weights of its own, and the same optimiser factories: those of a config cannot always be copied."""
        made = memo[id(self)] = type(self).__new__(type(self))
        state = self.__getstate__()
        shared = ("optimizer", "lr_scheduler")
        copied = {key: v if key in shared else copy.deepcopy(v, memo) for key, v in state.items()}
        made.__setstate__(copied)  # type: ignore[no-untyped-call]
        return made

    def configure_callbacks(self) -> list[L.Callback]:
        """No callbacks of its own; the moment at which impossible settings are found, before anything costly begins."""
        # Lightning means modules that keep their weights of before each step; others are saved as they are after it.
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        warnings.filterwarnings("ignore", message="You called `self.log.* but have no logger")  # results are returned
        use_verified_io(self.trainer)
        if self.trainer.state.fn == "fit":
            flags.check_trainer(self.trainer)
            for sae in self.saes().values():
                self._optimizer(sae, {"": nn.Parameter(torch.zeros(1))})
        return []

    def setup(self, stage: str) -> None:
        """Find out over which ranks batches are split, and take as many threads as the work is worth."""
        flags.check_device(self.trainer.strategy.root_device)
        self._split_batches_over(batch_ranks(self.trainer))
        if stage == "fit":
            self._threads_before = steps.use_threads(self.trainer, self._products_a_step())
            if self.device_mesh is not None:  # latents are split next
                self.trainer.precision_plugin.convert_module(self)
                self._initialize()

    def teardown(self, stage: str) -> None:
        """Work alone again, with the threads of before."""
        self._split_batches_over(ALONE)
        for trainee in self.trainees:
            trainee.graph.release()
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None

    def _split_batches_over(self, ranks: Ranks) -> None:
        for part in self.modules():  # SAEs within others too
            if isinstance(part, TrainingShell):
                part.ranks = ranks

    def _products_a_step(self) -> int:
        """Products of a step, ``batch_size · d_in · d_sae`` summed over SAEs; 0 where the data's batch size is unknown."""
        rows = int(getattr(self._data(), "batch_size", 0))
        return sum(rows * sae.d_in * sae.d_sae for sae in self.saes().values())

    def steps_a_batch(self, most: int) -> int:
        """How many steps the data may send at once."""
        return steps.steps_a_batch(self.trainer, most, self._products_a_step())

    def configure_optimizers(self) -> Any:
        """Each SAE's optimiser and schedule; those of several step as one."""
        made = {name: self._optimizer(sae, dict(sae.named_parameters())) for name, sae in self.saes().items()}
        if set(made) != {""}:
            schedules = {name: schedule for name, (_, schedule) in made.items() if schedule is not None}
            return MemberOptimizers({name: optimizer for name, (optimizer, _) in made.items()}, schedules)
        optimizer, schedule = made[""]
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _optimizer(self, sae: Any, parameters: Mapping[str, Any]) -> tuple[Any, Any]:
        trainer = self._trainer
        scaled = trainer is not None and getattr(trainer.precision_plugin, "scaler", None) is not None
        # A fused optimiser unscales gradients itself, after they have been clipped.
        factors = [(parameters[name], factor) for name, factor in lr_factors(sae).items() if name in parameters]
        optimizer = make_optimizer(sae.optimizer, parameters.values(), not scaled, factors)
        if is_split(sae.W_dec):
            exchange_full_states(optimizer)
        if sae.lr_scheduler is None:
            return optimizer, None
        return optimizer, make_schedule(sae.lr_scheduler, optimizer, -1 if trainer is None else trainer.max_steps)

    def configure_model(self) -> None:
        """Under the sharded strategy, leave each process its part of every SAE's latents."""
        if self.device_mesh is not None and not any(is_split(parameter) for parameter in self.parameters()):
            self.trainer.precision_plugin.convert_module(self)
            for part in self.modules():
                if isinstance(part, TrainingShell) and hasattr(part, "d_sae"):
                    split_latents(part, self.device_mesh["tensor_parallel"])

    def on_fit_start(self) -> None:
        """Initialise SAEs from data, and see that what callbacks monitor will be there."""
        self._initialize()
        self._followed = any(steps.watches_steps(callback) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        alone = isinstance(self.trainer.strategy, SingleDeviceStrategy)
        self._plain = alone and not (self._followed or scaled or self.on_nonfinite == "skip")
        flags.check_monitors(self.trainer, self)

    def _initialize(self) -> None:
        """Initialise SAEs from the first batch at the first step of a run; those resumed or loaded have their weights."""
        if self._data() is None:
            raise UserError("data: fit needs a hedgelab DataModule")
        begins = not self.trainer.global_step and self.trainer.ckpt_path is None
        for name, sae in self.saes().items():
            if begins and not sae.initialized:
                own = self._data(name)
                sae.initialize(own.batch("train", 0).to(sae.W_dec.device), own.feature_directions)
                sae.initialized = True

    def _data(self, member: str = "") -> Any:
        data: Any = getattr(self._trainer, "datamodule", None)
        return data.of_member(member) if member and hasattr(data, "of_member") else data

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """Take one optimiser step of every SAE, or as many as there are batches in a list; the last loss is returned."""
        step, total = self.trainer.global_step, None
        for one in steps.batches_of(batch):
            total = self._take_step(one, step)
            step += 1
        for trainee in self.trainees:
            trainee.sae.steps_done = step
        if isinstance(batch, list):  # Lightning counts batches where it logs, and steps are meant
            self.trainer.fit_loop.epoch_loop._batches_that_stepped += len(batch) - 1
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == self.trainer.max_steps or (every and step % every == 0):
            for trainee in self.trainees:
                trainee.check_window(step, self._data(trainee.name))
            skips = self.on_nonfinite == "skip"
            self.report({trainee.name: trainee.training_means(skips) for trainee in self.trainees}, step)
        elif self._followed:
            latest = {t.prefix + name: term for t in self.trainees for name, term in t.latest_terms().items()}
            self.log_dict(latest, logger=False, batch_size=1)
        return None if total is None else {"loss": total.detach()}

    def _take_step(self, batch: Any, step: int) -> Tensor | None:
        """One optimiser step; the sum of the losses, None where all were passed over."""
        self.zero_grad()  # first: the last step's gradients and this one's pre-activations are never held at once
        results: dict[str, Any] = {}
        done: dict[str, Any] = {}  # replayed, backward pass included
        for trainee in self.trainees:
            trainee.sae.steps_done = step
            own = steps.batch_of(batch, trainee.name)
            if self._plain and (replayed := trainee.graph.take(own)) is not None:
                done[trainee.name] = replayed
                continue
            result = trainee.sae.loss(own)
            if self.on_nonfinite != "skip" or bool(torch.isfinite(self.ranks.sum(result.total.detach()))):
                results[trainee.name] = result
        # One backward pass of the sum: SAEs share no parameters, so each gets exactly its own gradients, and DDP sees every
        # parameter used.
        totals = [result.total for result in results.values()]
        total = totals[0] if len(totals) == 1 else torch.stack(totals).sum() if totals else None
        if total is not None:
            if self._plain:  # the detour by the strategy costs a tiny toy a tenth of its step
                total.backward()
            else:
                self.manual_backward(total)
        results |= done
        if done:
            total = torch.stack([result.total.detach() for result in results.values()]).sum()
        self._good = results.keys()
        self.optimizers().step()  # type: ignore[union-attr]  # without gradients it only counts
        if (schedule := self.lr_schedulers()) is not None:
            schedule.step()  # type: ignore[union-attr]
        for trainee in self.trainees:
            if trainee.name in results:
                trainee.finish_step(results[trainee.name])
            else:
                trainee.skip_step(step)
        return total

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip and adjust gradients, which a gradient scaler has unscaled by now."""
        for trainee in self.trainees:
            if trainee.name in self._good:
                trainee.prepare_gradients()

    def on_train_epoch_end(self) -> None:
        """End a limited run with its epoch, since a stream has one, unless ``max_epochs`` says how many there are."""
        trainer: Any = self.trainer
        if isinstance(trainer.limit_train_batches, int) and not trainer.overfit_batches and trainer.max_epochs == -1:
            trainer.should_stop = True

    def check_finite(self, step: int) -> None:
        """Stop the run if anything that a checkpoint would hold is not finite."""
        for trainee in self.trainees:
            trainee.check_window(step, self._data(trainee.name))
            guard.check_parameters(trainee.sae, step, trainee.whose)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what has not been reported yet, and what the SAEs are, unless a class of one's own does not say it."""
        states = {trainee.name: trainee.window_state() for trainee in self.trainees}
        checkpoint[UNREPORTED] = states.get("", states)
        with suppress(TypeError, ValueError, AttributeError):
            checkpoint[ARCHITECTURES] = json.loads(json.dumps({name: sae.config() for name, sae in self.saes().items()}))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what had not been reported yet, if it is a checkpoint of such SAEs."""
        guard.check_fits(self, checkpoint["state_dict"])
        steps.count_batches_as_steps(checkpoint)
        states = checkpoint.get(UNREPORTED, {})
        states = {"": states} if "length" in states else states
        for trainee in self.trainees:
            trainee.sae.initialized = True
            if trainee.name in states:
                trainee.load_window_state(states[trainee.name])

    def on_validation_epoch_start(self) -> None:
        """Start from empty metrics; in a fit, see first that there is something to measure."""
        self._measured = [0, 0]
        for trainee in self.trainees:
            if self.trainer.state.fn == "fit":
                guard.check_parameters(trainee.sae, self.trainer.global_step, trainee.whose)
            trainee.start_measuring(self._data(trainee.name), self.device, self._is_last_pass())

    def _is_last_pass(self) -> bool:
        """Whether no other validation pass follows: outside of a fit, where its steps end before one, or where no one knows."""
        trainer: Any = self.trainer
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return not trainer.sanity_checking
        every = trainer.val_check_batch  # None where passes go by time
        return bool(every is None or trainer.global_step + every > trainer.max_steps)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure every SAE on a batch, unless it holds NaN or infinity and a guard leaves it out."""
        seen = {trainee.name: steps.batch_of(batch, trainee.name) for trainee in self.trainees}
        finite = (bool(x.isfinite().all()) for x in {one.x for one in seen.values()})
        left_out = self.on_nonfinite is not None and not all(finite)
        self._measured = [self._measured[0] + 1, self._measured[1] + left_out]
        if not left_out:
            for trainee in self.trainees:
                trainee.measure(seen[trainee.name])

    def on_validation_epoch_end(self) -> None:
        """Report the metrics of the pass."""
        stage = "test" if self.trainer.testing else "val"
        if self.on_nonfinite is not None:
            guard.check_measured(torch.tensor(self._measured, device=self.device), stage, self.on_nonfinite, self.ranks)
        self.report({trainee.name: trainee.measurements(stage) for trainee in self.trainees}, self.trainer.global_step)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def report(self, values: Mapping[str, dict[str, float]], step: int) -> None:
        """Send each SAE's numbers to its logger; callbacks, the progress bar and ``trainer.validate``'s result get all."""
        named = {f"{sae}/{key}" if sae else key: value for sae, own in values.items() for key, value in own.items()}
        in_fit = self.trainer.state.fn == "fit"
        if not self.trainer.sanity_checking:
            for name, logger in self.member_loggers.items():
                logger.log_metrics(values[name], step=step)
            for shared in self.loggers if in_fit and not self.member_loggers else []:
                shared.log_metrics(named, step=step)
        losses = [own["train/loss"] for own in values.values() if "train/loss" in own]
        loss = {"train/loss": sum(losses) / len(losses)} if losses else {}
        # Processes that were forked or spawned (ddp_fork, ddp_spawn, ddp_notebook) return callback_metrics through a pipe that
        # holds 64 KiB and is read only after they have ended: both would wait for ever if there were more.
        through_a_pipe = "multiprocessing" in type(self.trainer.strategy.launcher).__module__
        shown = loss if through_a_pipe and len(values) > _MOST_RETURNED else {**named, **loss}
        # Lightning logs at its own count of batches, so in a fit it is not asked to.
        self.log_dict(shown, logger=not in_fit and not self.member_loggers, batch_size=1)


class SAEGroup(TrainingShell):
    """Trains several SAEs, of any kinds, widths and seeds, on one stream; the result of each is what it were alone.

    Every member keeps its own optimiser, schedule, warm-ups, dead-latent clock and metrics. Members that are not
    initialised start from the first training batch.

    Args:
        members: The SAEs, by name, which must not hold a dot.
        loggers: Each member's own logger, by name; None reports to the trainer's, the names in front of the numbers.
    """

    members: nn.ModuleDict

    def __init__(self, members: Mapping[str, Any], loggers: Mapping[str, Logger] | None = None) -> None:
        super().__init__()
        widths = {name: sae.d_in for name, sae in members.items()}
        if len(set(widths.values())) != 1:
            raise UserError(f"members: a group needs SAEs of one d_in, got {widths}")
        if dotted := [name for name in members if "." in name]:
            raise UserError(f"members: a name must not contain a dot, got '{dotted[0]}'")
        self.members = nn.ModuleDict(members)
        self.member_loggers = dict(loggers or {})

    def saes(self) -> dict[str, Any]:
        """The members, by name."""
        return dict(self.members.items())
