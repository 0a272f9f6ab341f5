"""The interface of every SAE, and the Lightning shell that trains and measures it."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.ranks import ALONE, Ranks
from hedgelab.saes import guard
from hedgelab.saes.fold import FoldedWeights, fold
from hedgelab.saes.losses import LossTerms
from hedgelab.saes.parallel import (
    as_before_split,
    average_gradients,
    batch_ranks,
    is_split,
    keep_states_whole,
    split_latents,
    whole,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from hedgelab.metrics.evaluation import SAEMetrics

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
UNREPORTED = "hedgelab_unreported"
"""Where a checkpoint keeps loss terms that have not been reported yet."""


class Activation(NamedTuple):
    """Latents of a batch in training, and what their activity costs.

    Attributes:
        codes: The selected latents.
        penalty: Sparsity cost of each latent, mean over the batch, coefficient included, ``[d_sae]``; None without one.
    """

    codes: Codes
    penalty: Tensor | None = None


class SAE(L.LightningModule, ABC):
    """A sparse autoencoder: ``encode``, ``decode``, ``loss``, and the shell that trains it.

    A training batch is a *chunk*, a list of batches; each is one optimiser step. Optimisation is manual (in Lightning's
    sense), so ``global_step`` counts optimiser steps while callbacks and logging cost once a chunk.

    Attributes:
        d_in: Width of the activations.
        d_sae: Number of latents.
        W_enc: ``[d_in, d_sae]``, laid out in memory like its transpose so that sparse gradients need no copy.
        b_enc: ``[d_sae]``.
        W_dec: ``[d_sae, d_in]``; row i is the direction of latent i.
        b_dec: ``[d_in]``.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes the schedule, stepped once an optimiser step; None for a constant learning rate.
        gradient_clip_norm: Largest norm of the gradient; None for no clipping.
        steps_done: Optimiser steps taken so far; warm-ups read it.
        ranks: Those over which each batch is split; every rank sees its own part, and the loss is the mean over ranks.
        on_nonfinite: What happens to a batch whose loss is NaN or infinite (see :class:`~hedgelab.saes.guard.FiniteGuard`).
        skipped_batches: Batches that were passed over so far.
        initialized: Whether the weights come from data or from training already, so that a fit goes on from them.
    """

    d_in: int
    d_sae: int
    optimizer: OptimizerFactory
    lr_scheduler: SchedulerFactory | None
    gradient_clip_norm: float | None
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    not_architecture: ClassVar[frozenset[str]] = frozenset(
        {"self", "init", "optimizer", "lr_scheduler", "gradient_clip_norm", "kwargs"}
    )

    per_member: ClassVar[tuple[str, ...]] = ()
    """Attributes, numbers or lists of them, that enter the loss as factors only: members of an ensemble may differ in them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.steps_done = 0
        self.skipped_batches = self._skipped_in_a_row = 0
        self.on_nonfinite: guard.OnNonfinite = "stop"
        self.ranks: Ranks = ALONE
        self.initialized = False
        self._metrics: SAEMetrics | None = None
        self._aliases: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._before_split: list[tuple[SAE, dict[str, Tensor]]] = []
        self._window: list[dict[str, Tensor]] = []

    # -- the interface -----------------------------------------------------------------------------

    @abstractmethod
    def encode(self, x: Tensor) -> Codes:
        """Latents of activations ``x [batch, d_in]``, as used for inference and measuring."""

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction ``[batch, d_in]`` of latents."""
        return ops.decode(codes, self.W_dec, self.b_dec)

    @abstractmethod
    def loss(self, batch: Batch) -> LossTerms:
        """The training loss of a batch; changes nothing, so measuring it never disturbs training."""

    @abstractmethod
    def initialize(self, first: Batch, feature_directions: Tensor | None) -> None:
        """Set what depends on data, once, before the first step: ``b_dec`` and, if asked for, weights at the features."""

    def before_optimizer_step(self) -> None:
        """Adjust gradients before the optimiser uses them."""

    @torch.no_grad()
    def after_step(self, result: LossTerms) -> None:
        """Advance what counts steps (dead-latent clock, thresholds), after the optimiser's step."""

    @property
    def dead_latents(self) -> Tensor:
        """Which latents have been silent for longer than the dead-latent window, ``[d_sae]`` bool."""
        return torch.zeros(self.d_sae, dtype=torch.bool, device=self.W_dec.device)

    def set_steps_done(self, steps: int) -> None:
        """Tell the SAE how many optimiser steps it has taken."""
        self.steps_done = steps

    def join(self, ranks: Ranks) -> None:
        """Tell the SAE over which ranks its batches are split from now on."""
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct ``x [batch, d_in]``."""
        return self.decode(self.encode(x))

    def folded(self) -> FoldedWeights:
        """Detached copies of the weights with decoder norms folded in."""
        return fold(whole(self.W_enc), whole(self.b_enc), whole(self.W_dec), whole(self.b_dec))

    def config(self) -> dict[str, Any]:
        """Class name and architecture arguments as plain JSON values; :func:`hedgelab.saes.load_sae` reads it back.

        By convention every architecture argument of ``__init__`` is kept in an attribute of the same name.
        """
        arguments = {name: _plain(getattr(self, name)) for name in init_parameters(type(self)) - self.not_architecture}
        return {"class": type(self).__name__, **dict(sorted(arguments.items()))}

    # -- training ----------------------------------------------------------------------------------

    def trainable(self) -> list[nn.Parameter]:
        """The parameters as the optimiser gets them: each contiguous.

        ``W_enc`` is the transpose of a contiguous tensor, which fused Adam would copy every step; the optimiser gets that
        tensor, on the same memory, instead. :meth:`adjust_gradients` hands it the gradient.
        """
        self._aliases = [
            (parameter, nn.Parameter(parameter.detach().t()))
            for parameter in self.parameters()
            if parameter.dim() == 2 and not parameter.is_contiguous() and parameter.t().is_contiguous()
        ]
        contiguous = {id(parameter): alias for parameter, alias in self._aliases}
        return [contiguous.get(id(parameter), parameter) for parameter in self.parameters()]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, the optimiser's among them."""
        super().zero_grad(set_to_none)
        for _, alias in self._aliases:
            alias.grad = None

    def configure_optimizers(self) -> Any:
        """The optimiser, fused unless told otherwise, and the schedule."""
        optimizer = make_optimizer(self.optimizer, self.trainable())
        if is_split(self.W_dec):
            keep_states_whole(optimizer)
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def setup(self, stage: str) -> None:
        """Find out over which ranks batches are split."""
        self.join(batch_ranks(self.trainer))

    def teardown(self, stage: str) -> None:
        """Work alone again."""
        self.join(ALONE)

    def configure_model(self) -> None:
        """Under the sharded strategy, leave each process its part of the latents."""
        if self.device_mesh is not None:
            self.split_latents(self.device_mesh, self.trainer)

    def split_latents(self, mesh: DeviceMesh, trainer: L.Trainer) -> None:
        """Keep this process's part of the latents only, and until it is clear how they start, what all were."""
        if is_split(self.W_dec):
            return
        trainer.precision_plugin.convert_module(self)  # before data can set anything, as elsewhere
        saes = [module for module in self.modules() if isinstance(module, SAE)]
        parts = [(sae, split_latents(sae, mesh["tensor_parallel"])) for sae in saes]
        self._before_split = parts if trainer.state.fn == "fit" and not self.initialized else []

    def on_fit_start(self) -> None:
        """Initialise from data at the first step of a run; a resumed run has its weights already."""
        if self.trainer.global_step == 0 and self.trainer.ckpt_path is None:
            self.initialize_from(getattr(self.trainer, "datamodule", None), self.device)

    def initialize_from(self, data: Any, device: torch.device) -> None:
        """Initialise from the first training batch, unless that was done or the SAE was loaded.

        Args:
            data: A hedgelab DataModule.
            device: Where the SAE is; where latents are split over processes, they start on the CPU.

        Raises:
            UserError: There is no such DataModule.
        """
        if data is None:
            raise UserError("data: fit needs a hedgelab DataModule")
        if not self.initialized:
            with as_before_split(self._before_split):
                self.initialize(
                    data.batch("train", 0).to(self.W_dec.device if self._before_split else device),
                    data.feature_directions,
                )
        self.mark_initialized()

    def mark_initialized(self) -> None:
        """Note that the weights are those to train from."""
        self.initialized = True
        self._before_split = []

    def on_train_start(self) -> None:
        """Let validation intervals count optimiser steps, whatever the chunk."""
        count_steps_for_validation(self.trainer)

    def training_step(self, chunk: list[Batch], batch_idx: int) -> None:
        """Take one optimiser step for each batch of the chunk."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        step = self.trainer.global_step
        for batch in chunk:
            self.set_steps_done(step)
            self.zero_grad()  # first: the last step's gradients and this one's pre-activations are never held at once
            result = self.loss(batch)
            good = self.on_nonfinite == "stop" or guard.is_finite(result.total, self.ranks)
            if good:
                backward(self, result.total)
                self.adjust_gradients()
            optimizer.step()  # type: ignore[union-attr]  # without gradients it only counts
            if schedule is not None:
                schedule.step()  # type: ignore[union-attr]
            if good:
                self.finish_step(result)
            else:
                self.skip_step()
            step += 1
        self.set_steps_done(step)
        if is_logged(self.trainer, step):
            self.check_window(step)
            self.report(self.training_means(), step)

    def check_window(self, step: int, member: str | None = None) -> None:
        """See that no loss term since the last report is NaN or infinite.

        Raises:
            UserError: One is; says step, term and batch.
        """
        guard.check_window(self._window, step, self.ranks, self._trainer, member)

    def check_finite(self, step: int) -> None:
        """See that everything a checkpoint would hold is finite.

        Raises:
            UserError: It is not.
        """
        self.check_window(step)
        guard.check_parameters(self, step)

    def skip_step(self) -> None:
        """Count a batch that was passed over; where the weights are to blame, no batch ever will do.

        Raises:
            UserError: They are NaN or infinite, or no batch has done for long.
        """
        self.skipped_batches += 1
        self._skipped_in_a_row += 1
        guard.check_skips(self, self._skipped_in_a_row)
        self._window.append({})

    def adjust_gradients(self) -> None:
        """Clip gradients where asked for, whatever else this kind of SAE does to them, and hand them to the optimiser."""
        average_gradients(list(self.parameters()), self.ranks)
        if self.gradient_clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.gradient_clip_norm)
        self.before_optimizer_step()
        for parameter, alias in self._aliases:
            alias.grad = None if parameter.grad is None else parameter.grad.t()

    def finish_step(self, result: LossTerms) -> None:
        """Advance what counts steps, and remember the loss terms until they are reported."""
        self._skipped_in_a_row = 0
        self.after_step(result)
        self._window.append({name: term.detach() for name, term in result.terms.items()})

    def training_means(self) -> dict[str, float]:
        """Each loss term's mean over the steps since the last call and over the ranks, and their sum, named ``train/...``.

        Batches that were passed over count in no mean; where that may happen, ``train/skipped_batches`` says how often.
        """
        skipped = {"train/skipped_batches": float(self.skipped_batches)} if self.on_nonfinite == "skip" else {}
        taken = sum(1 for terms in self._window if terms)
        if not taken:
            self._window.clear()
            return skipped
        names = list(dict.fromkeys(name for terms in self._window for name in terms))
        sums = [torch.stack([terms[name].float() for terms in self._window if name in terms]).sum() for name in names]
        means = (self.ranks.mean(torch.stack(sums)) / taken).tolist()
        self._window.clear()
        values = {f"train/{name}": mean for name, mean in zip(names, means, strict=True)}
        values["train/loss"] = sum(values.values())
        return values | skipped

    def window_state(self) -> dict[str, Any]:
        """The loss terms of the steps since the last report, for a checkpoint: means over the ranks."""
        names = dict.fromkeys(name for terms in self._window for name in terms)
        steps = {name: [i for i, terms in enumerate(self._window) if name in terms] for name in names}
        values = {name: torch.stack([self._window[i][name] for i in at]) for name, at in steps.items()}
        means = {name: self.ranks.mean(value) for name, value in values.items()}
        return {"length": len(self._window), "steps": steps, "values": means, "skipped": self.skipped_batches}

    def load_window_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, so that the next report is the mean over its whole interval."""
        self.skipped_batches = state["skipped"]
        self._window = [{} for _ in range(state["length"])]
        for name, at in state["steps"].items():
            for i, value in zip(at, state["values"][name].to(self.W_dec.device), strict=True):
                self._window[i][name] = value

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what has not been reported yet."""
        checkpoint[UNREPORTED] = self.window_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what had not been reported yet, if it is a checkpoint of such an SAE.

        Raises:
            UserError: It is of another.
        """
        guard.check_fits(self, checkpoint["state_dict"])
        self.mark_initialized()
        if UNREPORTED in checkpoint:
            self.load_window_state(checkpoint[UNREPORTED])

    def report(self, values: dict[str, float], step: int) -> None:
        """Send numbers to the loggers at an optimiser step, and to callbacks and the progress bar."""
        for logger in self.loggers:
            logger.log_metrics(values, step=step)
        self.log_dict(values, logger=False, batch_size=1)

    # -- measuring ---------------------------------------------------------------------------------

    def start_measuring(self, feature_directions: Tensor | None, device: torch.device) -> None:
        """Start from empty metrics."""
        from hedgelab.metrics.evaluation import SAEMetrics  # late: torchmetrics is slow to import

        self._metrics = SAEMetrics(self.d_in, self.d_sae, feature_directions, ranks=self.ranks).to(device)

    @property
    def firing_rates(self) -> Tensor | None:
        """How often each latent fired on the examples measured so far, ``[d_sae]``; None where nothing is being measured.

        Summed over the ranks, so ask on every rank.
        """
        return None if self._metrics is None else self._metrics.firing.compute().rates.reshape(-1)

    def measure(self, chunk: list[Batch]) -> None:
        """Add a chunk of batches to the metrics."""
        assert self._metrics is not None
        for batch in chunk:
            codes = self.encode(batch.x)
            self._metrics.update(batch, self.decode(codes), codes.gathered())

    def measurements(self, stage: str) -> dict[str, float]:
        """The metrics of everything measured, named ``<stage>/...``; they start again from nothing."""
        assert self._metrics is not None
        folded = self.folded()
        values = self._metrics.compute(folded.W_enc, folded.W_dec)
        self._metrics.reset()
        return {f"{stage}/{name}": float(value) for name, value in values.items()}

    def on_validation_start(self) -> None:
        """Start from empty metrics; in a fit, see first that there is something to measure."""
        if self.trainer.state.fn == "fit":
            guard.check_parameters(self, self.trainer.global_step)
        self.start_measuring(known_directions(self.trainer), self.device)

    def validation_step(self, chunk: list[Batch], batch_idx: int) -> None:
        """Measure a chunk of validation batches."""
        self.measure(chunk)

    def on_validation_epoch_end(self) -> None:
        """Report the metrics of the validation pass."""
        self.report(self.measurements("val"), self.trainer.global_step)

    def on_test_start(self) -> None:
        """Start from empty metrics."""
        self.on_validation_start()

    def test_step(self, chunk: list[Batch], batch_idx: int) -> None:
        """Measure a chunk of test batches."""
        self.measure(chunk)

    def on_test_epoch_end(self) -> None:
        """Report the metrics of the test pass."""
        self.report(self.measurements("test"), self.trainer.global_step)


def is_logged(trainer: L.Trainer, step: int) -> bool:
    """Whether training reports at this step: at every logging interval and at the end."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return step == trainer.max_steps or bool(every and step % every == 0)


def count_steps_for_validation(trainer: L.Trainer) -> None:
    """Let a validation interval count optimiser steps, whatever the chunk."""
    interval = trainer.val_check_interval
    if isinstance(interval, int):
        trainer.val_check_batch = max(1, interval // getattr(trainer.train_dataloader, "chunk_steps", 1))


def known_directions(trainer: L.Trainer) -> Tensor | None:
    """True directions of the trainer's data, ``[n, d_in]``; None where they are unknown."""
    directions: Tensor | None = getattr(getattr(trainer, "datamodule", None), "feature_directions", None)
    return directions


def backward(module: L.LightningModule, loss: Tensor) -> None:
    """Backpropagate by way of the strategy, or directly where the strategy would only add hooks that nothing listens to.

    On one device without a gradient scaler the detour costs a tiny toy a tenth of its step and changes no number.
    """
    trainer = module.trainer
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if isinstance(trainer.strategy, SingleDeviceStrategy) and not scaled:
        loss.backward()  # type: ignore[no-untyped-call]
    else:
        module.manual_backward(loss)


def make_optimizer(factory: OptimizerFactory, parameters: Iterable[Any]) -> Optimizer:
    """The optimiser of some parameters, fused unless told otherwise.

    Raises:
        UserError: It refuses its arguments.
    """
    try:
        optimizer = factory(parameters)
    except ValueError as error:
        raise UserError(f"model.optimizer: {error}") from error
    for group in optimizer.param_groups:
        if "fused" in group and group["fused"] is None and not group.get("foreach"):
            group["fused"] = True
    return optimizer


def init_parameters(cls: type) -> set[str]:
    """Names of all ``__init__`` arguments of a class, those it passes on to its parents through ``**kwargs`` included."""
    names: set[str] = set()
    for parent in cls.__mro__:
        if "__init__" not in vars(parent):
            continue
        parameters = inspect.signature(vars(parent)["__init__"]).parameters.values()
        names |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return names


def _plain(value: Any) -> Any:
    """A JSON value for an architecture argument."""
    if isinstance(value, SAE):
        return value.config()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value
