"""The hedging degree of an SAE, from its training to the number (SPEC section 5).

Phase one trains the *initial* SAE on the stream's first T batches. Phase two goes on from it on the next T batches, three
times, each with a fresh optimiser, all as one group: the *control* unchanged; the *extended* SAE with new latents
appended; and a control that sees the batches *reordered*, whose motion is noise. Several seeds (of the weights and of the
new latents) share the stream and train as one group too; each one's new latents are the others' foreign baseline.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import PolynomialLR

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.errors import UserError
from hedgelab.metrics.degree import HedgingDegree
from hedgelab.metrics.error_spread import ROWS, ResidualHedgingMetric
from hedgelab.metrics.functional.degree import DRAWS, DegreeScores
from hedgelab.metrics.functional.error_spread import BLOCKS
from hedgelab.protocols.phase_data import PhaseData
from hedgelab.protocols.ranks import decided_by_rank_zero
from hedgelab.protocols.training_phases import Phase, PhaseRunner
from hedgelab.saes import SAE, JumpReLUSAE, VanillaSAE, duplicate, fresh, widen
from hedgelab.saes.widen import flat_part, train_like
from hedgelab.seeding import resolve_seed
from hedgelab.tracking import MLflowTracker

ROLES = ("control", "extended", "reordered")


@dataclass(frozen=True)
class HedgeOptions:
    """How the hedging degree is measured.

    Attributes:
        n_new: Latents appended.
        new_norm: Decoder norm at which they start.
        seeds: How often all is repeated, with other weights and other new latents, on the same stream.
        lr: Learning rate of the continuations; null keeps the optimiser's own.
        lr_decay: Let the learning rate of the continuations fall linearly to zero, which takes most of the wobble of a
            constant rate out of the comparison.
        l1_restart: λ at which the warm-up of an L1 penalty begins again in the continuations (at most its full value).
        draws: Random subspaces that each baseline is averaged over.
    """

    n_new: int = 64
    new_norm: float = 0.1
    seeds: int = 1
    lr: float | None = None
    lr_decay: bool = False
    l1_restart: float = 10.0
    draws: int = DRAWS

    def __post_init__(self) -> None:
        for name, value, least in (("n_new", self.n_new, 1), ("seeds", self.seeds, 1), ("draws", self.draws, 2)):
            if value < least:
                raise UserError(f"hedge.{name}: must be at least {least}, got {value}")
        if self.new_norm <= 0:
            raise UserError(f"hedge.new_norm: must be above 0, got {self.new_norm}")
        if self.lr is not None and self.lr <= 0:
            raise UserError(f"hedge.lr: must be above 0, or null for the optimiser's own, got {self.lr}")
        if self.l1_restart < 0:
            raise UserError(f"hedge.l1_restart: must not be negative, got {self.l1_restart}")


class Continuations(NamedTuple):
    """What phase two makes of one initial SAE."""

    control: SAE
    extended: SAE
    reordered: SAE


class HedgeProtocol:
    """Trains everything that the hedging degree needs, and measures it.

    Args:
        model: The SAE to be trained, as configured; serves as the pattern of all others and stays as it is.
        data: Where activations come from; the stream's first ``2 * steps`` batches are trained on.
        steps: Optimiser steps of each of the two phases.
        options: How the degree is measured.
        runner: Trains phases.
        config: Plain values that, with steps and options, determine the outcome: the resolved config of model and data.
        seeds: The seeds, instead of as many as the options say from the model's own on.
        tracker: The run below which the phases' runs stand; None is the runner's.
        label: What the names of its phases begin with, where other protocols share the stream.

    Raises:
        UserError: More new latents than directions.
    """

    def __init__(
        self,
        model: SAE,
        data: ActivationDataModule,
        steps: int,
        options: HedgeOptions,
        runner: PhaseRunner,
        config: Mapping[str, Any],
        seeds: Sequence[int] | None = None,
        tracker: MLflowTracker | None = None,
        label: str = "",
    ) -> None:
        if options.n_new >= data.d_in:
            raise UserError(
                f"hedge.n_new: must be below d_in = {data.d_in}, or they span everything, got {options.n_new}"
            )
        self.model, self.data, self.steps, self.options = model, data, steps, options
        self.runner, self.config = runner, {**config, "steps": steps}
        first = resolve_seed(flat_part(model).init.seed)
        self.seeds = list(seeds or [first + repeat for repeat in range(options.seeds)])
        self.tracker, self.label = tracker, label

    def train(self) -> dict[int, Continuations]:
        """Both phases, for every seed; what the store has already is taken from there."""
        return train_together([self])[0]

    def initial_phases(self) -> dict[int, Phase]:
        """Phase one, by seed."""
        return {seed: self._initial(seed) for seed in self.seeds}

    def continuation_phases(self, trained: Mapping[str, SAE]) -> dict[tuple[int, str], Phase]:
        """Phase two, by seed and role, from what phase one has given by name."""
        starts = self.initial_phases()
        for start in starts.values():
            train_like(trained[start.name], self.model)
        return {
            (seed, role): self._continuation(role, seed, start.id, trained[start.name])
            for seed, start in starts.items()
            for role in ROLES
        }

    def measure(self, trained: Mapping[int, Continuations]) -> dict[int, DegreeScores]:
        """The degree of every seed with all controls; the validation batches tell which latents live."""
        return measure_together([self], [trained])[0]

    def scores(self, trained: Mapping[int, Continuations], seed: int, batches: Sequence[Batch]) -> DegreeScores:
        """The degree of one seed on batches of activations, on their device."""
        saes, device = trained[seed], batches[0].x.device
        width = self.model.d_sae
        foreign = [own.extended.W_dec[width:].to(device) for other, own in trained.items() if other != seed]
        with moved(saes, device):
            control, extended, reordered = (sae.W_dec for sae in saes)
            metric = HedgingDegree(
                control, extended, reordered, foreign, self.options.draws, seed, sync_on_compute=False
            ).to(device)
            for x, _, weight in batches:
                metric.update(x, saes.control.encode(x), saes.extended.encode(x), weight)
            return _with_residual_hedging(metric.compute(), saes.control, batches)

    def _initial(self, seed: int) -> Phase:
        config = {**self.config, "phase": "initial", "seed": seed}
        return Phase(f"{self.label}initial/seed{seed}", config, partial(fresh, self.model, seed), self.tracker)

    def _continuation(self, role: str, seed: int, initial_id: str, initial: SAE) -> Phase:
        options = self.options
        config: dict[str, Any] = {"phase": role, "seed": seed, "initial": initial_id, "steps": self.steps}
        config |= {"lr": options.lr, "lr_decay": options.lr_decay, "l1_restart": options.l1_restart}
        config |= {"hedgelab": self.config["hedgelab"]} if "hedgelab" in self.config else {}  # the release that began
        make: Callable[[], SAE] = partial(duplicate, initial)
        if role == "extended":
            config |= {"n_new": options.n_new, "new_norm": options.new_norm}
            make = partial(widen, initial, options.n_new, options.new_norm, seed)
        name = f"{self.label}{role}/seed{seed}"
        return Phase(name, config, lambda: continued(make(), options, self.steps), self.tracker)


def train_together(protocols: Sequence[HedgeProtocol]) -> list[dict[int, Continuations]]:
    """Both phases of several protocols with the same data, steps and runner, each phase of all of them as one group.

    The activations are read once for all, and what several protocols have in common (the same SAE and its controls, where
    only the new latents differ) is trained once; each protocol gets what it would get alone.
    """
    data, steps, runner = protocols[0].data, protocols[0].steps, protocols[0].runner
    starts = [phase for protocol in protocols for phase in protocol.initial_phases().values()]
    initial = _train_each_once(runner, starts, lambda _: PhaseData(data, 0, steps))
    phases = [protocol.continuation_phases(initial) for protocol in protocols]
    reordered = {phase.name for own in phases for (_, role), phase in own.items() if role == "reordered"}
    trained = _train_each_once(
        runner,
        [phase for own in phases for phase in own.values()],
        lambda names: PhaseData(data, steps, steps, [name for name in names if name in reordered]),
    )
    return [
        {
            seed: Continuations(*(trained[own[seed, role].name] for role in Continuations._fields))
            for seed in protocol.seeds
        }
        for protocol, own in zip(protocols, phases, strict=True)
    ]


def _train_each_once(
    runner: PhaseRunner, phases: Sequence[Phase], data: Callable[[list[str]], PhaseData]
) -> dict[str, SAE]:
    """The SAE of every phase, by name; ``data`` is told the names of those that are trained."""
    first: dict[str, Phase] = {}
    for phase in phases:
        first.setdefault(phase.id, phase)
    trained = runner.train(list(first.values()), data([phase.name for phase in first.values()]))
    for phase in phases:
        if phase.name not in trained:
            trained[phase.name] = trained[first[phase.id].name]
            runner.share(phase, first[phase.id])
    return trained


@torch.no_grad()
def measure_together(
    protocols: Sequence[HedgeProtocol], trained: Sequence[Mapping[int, Continuations]]
) -> list[dict[int, DegreeScores]]:
    """The degrees of several protocols with the same data, whose validation batches are read once for all.

    SAEs are measured on the device where the activations are (a language model's may be on a GPU), one seed at a time, and
    then moved back. On several ranks each measures for itself, on whole batches (which a language model's ranks make together).
    """
    data = protocols[0].data
    decided_by_rank_zero(data.prepare_data)
    data.prepare_data()  # where ranks share no disk
    data.setup("fit")
    batches = [data.batch("val", index) for index in range(data.val_batches)]
    return [
        {seed: protocol.scores(own, seed, batches) for seed in own}
        for protocol, own in zip(protocols, trained, strict=True)
    ]


@contextmanager
def moved(saes: Sequence[SAE], device: torch.device) -> Iterator[None]:
    """Have SAEs on a device for a while, and then back where they were."""
    before = [sae.W_dec.device for sae in saes]
    for sae in saes:
        sae.to(device)
    try:
        yield
    finally:
        for sae, old in zip(saes, before, strict=True):
            sae.to(old)


def _with_residual_hedging(scores: DegreeScores, control: SAE, batches: Sequence[Batch]) -> DegreeScores:
    """The scores with the control's residual hedging, given unweighted examples enough; codes are held dense."""
    kept: list[Tensor] = []
    for x, _, weight in batches:
        if weight is None and sum(map(len, kept)) < ROWS:
            kept.append(x)
    if sum(map(len, kept)) < 2 * BLOCKS:
        return scores
    metric = ResidualHedgingMetric(control.W_dec, sync_on_compute=False).to(control.W_dec.device)
    for x in kept:
        codes = control.encode(x)
        metric.update(x, control.decode(codes), codes)
    result = metric.compute()
    return scores._replace(residual_hedging=result.hedging, residual_hedging_std=result.std)


def continued(sae: SAE, options: HedgeOptions, steps: int) -> SAE:
    """Make an SAE that has been trained ready to be trained on: penalties as SPEC section 6 has them, learning rates."""
    flat = flat_part(sae)
    if isinstance(flat, VanillaSAE):
        flat.l1_warmup_start = min(flat.l1_coefficient, options.l1_restart)
    if isinstance(flat, JumpReLUSAE):
        flat.l0_warmup_steps = 0
    if options.lr is not None:
        sae.optimizer = partial(_with_lr, sae.optimizer, options.lr)
    if options.lr_decay:
        sae.lr_scheduler = partial(PolynomialLR, total_iters=steps)
    return sae


def check_live(scores: Mapping[int, DegreeScores], n_new: int) -> None:
    """Warn where fewer than half of the new latents fire.

    Raises:
        UserError: None fires at all, so that the degree says nothing.
    """
    for seed, result in scores.items():
        live = int(result.live_new_latents)
        if live == 0:
            raise UserError(
                f"hedge.new_norm: none of the {n_new} new latents ever fires (seed {seed}), so the degree says nothing; "
                "raise it, or train longer, or with an auxiliary loss that revives them (model.dead_after_steps)"
            )
        if 2 * live < n_new:
            warnings.warn(f"only {live} of {n_new} new latents fire (seed {seed}): the degree is too low", stacklevel=2)


def _with_lr(optimizer: Callable[[Iterable[Any]], Optimizer], lr: float, parameters: Iterable[Any]) -> Optimizer:
    made = optimizer(parameters)
    for group in made.param_groups:
        group["lr"] = lr
    return made
