"""One job of a sweep: the members that share a stream are trained as one group, each recorded in a run of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.errors import UserError
from hedgelab.protocols.hedge import HedgeOptions, HedgeProtocol, check_live, measure_together, train_together
from hedgelab.protocols.hedge_report import record
from hedgelab.protocols.hedge_trainer import log_case_studies
from hedgelab.protocols.ranks import ranks_at_work
from hedgelab.protocols.training_phases import PhaseRunner, TrainerFactory, fit_group
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


def train_fits(members: Sequence[Member], data: ActivationDataModule, trainer: TrainerFactory) -> None:
    """Plain fits, as one group."""

    def begin() -> None:
        for member in members:
            member.begin()

    saes = {member.name: member.model for member in members}
    trackers = {member.name: member.tracker for member in members}
    fit_group(trainer, saes, trackers, data, begin, {member.name: member.id for member in members})


def measure_hedging(
    members: Sequence[Member],
    data: ActivationDataModule,
    trainer: TrainerFactory,
    steps: int,
    announce: Callable[[str], None],
    retrain: bool = False,
) -> dict[str, str]:
    """The hedging degree of every member, each phase of all as one group.

    Returns:
        Why a member's degree says nothing, by its name; whatever else goes wrong is raised and fails all their runs.
    """
    runner = PhaseRunner(trainer, members[0].tracker, announce=announce, retrain=retrain)
    try:
        protocols = [_protocol(member, data, runner, steps) for member in members]
        for member in members:
            member.begin()
            member.tracker.log_tags({"protocol": "hedge", **provenance_tags(ranks_at_work())})
        try:
            trained = train_together(protocols)
            announce(f"measuring {', '.join(member.name for member in members)}")
            scores = measure_together(protocols, trained)
            for member, protocol, own in zip(members, protocols, trained, strict=True):
                if protocol.options.n_new == 1:
                    log_case_studies(member.tracker, own, data)
        finally:
            data.teardown("fit")
    except BaseException:
        for member in members:
            member.tracker.finalize("failed")
        raise
    failures: dict[str, str] = {}
    for member, protocol, degrees in zip(members, protocols, scores, strict=True):
        record(member.tracker, degrees, 2 * steps)
        member.tracker.log_metrics(_quality(protocol, runner, member.tracker), 2 * steps)
        try:
            check_live(degrees, protocol.options.n_new)
        except UserError as error:
            failures[member.name] = str(error)
        member.tracker.finalize("failed" if member.name in failures else "success")
    return failures


def _protocol(member: Member, data: ActivationDataModule, runner: PhaseRunner, steps: int) -> HedgeProtocol:
    assert member.options is not None
    return HedgeProtocol(
        member.model,
        data,
        steps,
        member.options,
        runner,
        member.outcome,
        member.seeds,
        member.tracker,
        f"{member.name}/",
    )


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
