"""One job of a sweep: the members that share a stream are trained as one group, each recorded in a run of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.protocols import hedge
from hedgelab.protocols.hedge import HedgeOptions, HedgeProtocol
from hedgelab.protocols.ranks import ranks_at_work
from hedgelab.protocols.study import Bench
from hedgelab.protocols.training_phases import PhaseRunner, PhaseTrainer, fit_group
from hedgelab.saes import SAE
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.params import searchable
from hedgelab.tracking.provenance import provenance_tags

CELL_TAG = "sweep_cell"
"""The tag that says which cell a run is of: its stable id."""
SCHEME_TAG = "identity_scheme"
"""The tag that says by which rules that id was made (:data:`hedgelab.identity.SCHEME`)."""
MEASURED_ROLES = ("control", "extended")


@dataclass(frozen=True)
class Member:
    """One SAE of a sweep, ready to be trained; for the hedging degree, the pattern of several.

    Attributes:
        name: Its cell's.
        id: Its cell's stable id.
        model: The SAE.
        tracker: Its run.
        text: Its whole config.
        config: The same as plain values.
        outcome: What of it determines the outcome, the number of steps left out.
        options: How the hedging degree is measured; None for a plain fit.
        seeds: Seeds of the hedging degree; None leaves them to the options.
    """

    name: str
    id: str
    model: SAE
    tracker: MLflowTracker
    text: str
    config: Mapping[str, Any]
    outcome: Mapping[str, Any] = field(default_factory=dict)
    options: HedgeOptions | None = None
    seeds: Sequence[int] | None = None

    def begin(self) -> None:
        """Fill the head of its run."""
        self.tracker.log_config(self.text)
        self.tracker.log_hyperparams(searchable(self.config))


def train_fits(members: Sequence[Member], data: ActivationDataModule, trainer: PhaseTrainer) -> None:
    """Plain fits, as one group."""

    def begin() -> None:
        for member in members:
            member.begin()

    saes = {member.name: member.model for member in members}
    trackers = {member.name: member.tracker for member in members}
    fit_group(trainer, saes, trackers, data, begin, {member.name: member.id for member in members})


def measure_hedging(
    members: Sequence[Member], data: ActivationDataModule, trainer: PhaseTrainer, retrain: bool = False
) -> dict[str, str]:
    """The hedging degree of every member, each phase of all as one group.

    Returns:
        Why a member's degree says nothing, by its name; whatever else goes wrong is raised and fails all their runs.
    """
    runner, steps = PhaseRunner(trainer, members[0].tracker, retrain=retrain), trainer.max_steps
    try:
        protocols = [
            HedgeProtocol(
                member.model, data, steps, member.options or HedgeOptions(), member.outcome, member.seeds,
                member.tracker, f"{member.name}/",
            )
            for member in members
        ]  # fmt: skip
        for member in members:
            member.begin()
            member.tracker.log_tags({"protocol": "hedge", **provenance_tags(ranks_at_work())})
        outcomes = hedge.measure_hedging(protocols, runner)
    except BaseException:
        for member in members:
            member.tracker.finalize("failed")
        raise
    failures: dict[str, str] = {}
    for member, protocol, outcome in zip(members, protocols, outcomes, strict=True):
        Bench(tracker=member.tracker).keep(outcome)
        member.tracker.log_metrics(_quality(protocol, runner, member.tracker), 2 * steps)
        if outcome.failure is not None:
            failures[member.name] = outcome.failure
        member.tracker.finalize("success" if outcome.failure is None else "failed")
    return failures


def _quality(protocol: HedgeProtocol, runner: PhaseRunner, tracker: MLflowTracker) -> dict[str, float]:
    """How well trained the compared SAEs are, from their own runs: ``control/explained_variance``, and so on.

    Means over seeds; with several seeds every seed's own as well (``control/seed0/explained_variance``).
    """
    numbers: dict[str, float] = {}
    for role in MEASURED_ROLES:
        by_seed = {
            seed: tracker.experiment.get_run(runner.run_ids[f"{protocol.label}{role}/seed{seed}"]).data.metrics
            for seed in protocol.seeds
        }
        shared = set.intersection(*(set(metrics) for metrics in by_seed.values()))
        for name in sorted(name.removeprefix("val/") for name in shared if name.startswith("val/")):
            values = {seed: metrics[f"val/{name}"] for seed, metrics in by_seed.items()}
            numbers[f"{role}/{name}"] = sum(values.values()) / len(values)
            if len(values) > 1:
                numbers |= {f"{role}/seed{seed}/{name}": value for seed, value in values.items()}
    return numbers
