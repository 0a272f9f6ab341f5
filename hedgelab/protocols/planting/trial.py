"""``hedgelab plant``: a randomised trial of hedging inside activations, those of a language model or any others.

Children are planted beside *parents*: latents of an SAE of the untouched activations (natural features), or parents that are
planted too. A lot decides how often a parent's child fires along with it (its arm, the *dose*), so what arms differ in, the
dose has caused. SAEs are trained on what results, and the question is how much of the child the parent's row holds: hedging. A
second data set has the arms swapped (the largest dose where the smallest was), so that every parent is its own control.

Nothing that happens after the lot decides what is compared (intention to treat): every parent counts, in its arm, with the
latent nearest to it, however near that is and whatever became of it.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.planting import Events, LatentEvents, MatchedDirections, PlantedActivations, PlantedParents
from hedgelab.errors import UserError, positive, whole_number
from hedgelab.identity import deciding
from hedgelab.metrics import FiringDensity
from hedgelab.plots.planting import doses_and_responses, shares_against_theory
from hedgelab.protocols.phase_data import PhaseData
from hedgelab.protocols.planting.findings import findings
from hedgelab.protocols.planting.pairs import measure
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Row, Study
from hedgelab.protocols.training_phases import Phase, PhaseRunner, PhaseTrainer
from hedgelab.saes import SAE
from hedgelab.seeding import generator
from hedgelab.training.checkpoints import RunCheckpoint

_SETS = ("A", "B")


@dataclass(frozen=True)
class PlantOptions:
    """Size of a trial.

    Attributes:
        widths: Widths of the SAEs.
        steps: Optimiser steps of each.
        parent_steps: Optimiser steps of the SAE whose latents are parents.
        parents: Parents whose children fire along with them, dealt out to the doses.
        silent: Further parents, whose children fire only where they are silent, as often as those of the second largest dose.
        doses: Shares of a parent's firings at which its child fires too, rising; the second data set has them in reverse.
        rates: Lowest and highest rate at which a parent may fire.
        magnitude: Magnitude of children in units of the activations' median norm.
        parent_magnitude: That of parents where these are planted, too.
        seeds: SAEs of every kind and width, of different weights.
        batches: Validation batches that are measured on.
        checkpoint_steps: Steps from checkpoint to checkpoint; a stopped trial goes on from the last.
    """

    widths: list[int]
    steps: int
    parent_steps: int = 1
    parents: int = 240
    silent: int = 40
    doses: list[float] = field(default_factory=lambda: [0.0, 0.15, 0.3, 0.6])
    rates: list[float] = field(default_factory=lambda: [0.01, 0.1])
    magnitude: float = 0.3
    parent_magnitude: float = 0.5
    seeds: int = 3
    batches: int = 64
    checkpoint_steps: int = 250

    def __post_init__(self) -> None:
        for name in ("steps", "parent_steps", "parents", "silent", "seeds", "batches", "checkpoint_steps"):
            whole_number(f"plant.{name}", getattr(self, name), 0 if name == "silent" else 1)
        for name in ("magnitude", "parent_magnitude"):
            positive(f"plant.{name}", getattr(self, name))
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"plant.widths: must be widths of at least 1, got {self.widths}")
        if (
            len(self.doses) < 2
            or self.doses != sorted(set(self.doses))
            or not 0 <= self.doses[0] <= self.doses[-1] <= 1
        ):
            raise UserError(f"plant.doses: must be two or more rising shares from 0 to 1, got {self.doses}")
        if len(self.rates) != 2 or not 0 < self.rates[0] < self.rates[1] < 1:
            raise UserError(f"plant.rates: must be a lowest and a highest rate between 0 and 1, got {self.rates}")


class Lot(NamedTuple):
    """What the lot has decided: of each parent its dose in either data set, and how often its child fires without it."""

    doses: Mapping[str, Tensor]
    elsewhere: Tensor


@dataclass(eq=False)
class Plant(Study):
    """Plant features in activations by lot, and see how SAEs hedge on them.

    Args:
        data: The activations: any DataModule whose features are not known.
        kinds: SAEs by kind; their width is filled in, and the widest of a matryoshka SAE's levels.
        plant: Size of the trial.
        parents: SAE of the untouched activations whose latents are the parents; none plants the parents, too.
    """

    experiment = "plant"
    example = "configs/llm/smollm2_plant_small.yaml"

    data: Recipe[ActivationDataModule]
    kinds: dict[str, Recipe[SAE]]
    plant: PlantOptions
    parents: Recipe[SAE] | None = None

    def __post_init__(self) -> None:
        if not self.kinds:
            raise UserError(f"kinds: missing; see {self.example}")

    def run(self, bench: Bench) -> Outcome:
        """Choose parents, draw the lot, train on both data sets, measure."""
        options = self.plant
        base = self.data(seed=bench.seed)
        for width, kind in ((width, kind) for width in options.widths for kind in self.kinds):
            self.make_sae(kind, width, 0, base.d_in)  # mistakes show before anything is trained
        try:
            events, rates, basis = self.choose_parents(base, bench)
            lot = draw_lot(rates, options, bench.seed)
            rows: list[Row] = []
            saes: list[Row] = []
            for name in _SETS:
                planted = PlantedActivations(
                    base, events, lot.doses[name].tolist(), lot.elsewhere.tolist(), magnitude_mean=options.magnitude,
                    directions=MatchedDirections(), seed=bench.seed,
                )  # fmt: skip
                trained = self.train(planted, name, basis, bench)
                for (kind, width, seed), sae in tqdm(
                    trained.items(), f"measuring {name}", disable=not sys.stderr.isatty()
                ):
                    widest = max(options.widths)
                    wide = None if width == widest else trained[kind, widest, seed]
                    found = measure(sae, planted, options.batches, wide)
                    common = {"data": name, "kind": kind, "width": width, "seed": seed}
                    saes.append({**common, **found.numbers})
                    columns = {key: value.tolist() for key, value in (found.pairs._asdict() | found.measures).items()}
                    columns |= {"has_latent": found.pairs.has_latent.tolist()}
                    columns |= {"dose": lot.doses[name].tolist(), "silent": (lot.elsewhere > 0).tolist()}
                    rows += [
                        {**common, "parent": i, **{key: values[i] for key, values in columns.items()}}
                        for i in range(events.n)
                    ]
        finally:
            base.teardown("fit")
        said = findings(rows, options.doses)
        figures = {
            "doses.png": doses_and_responses(said.arms, options.doses),
            "theory.png": shares_against_theory(rows),
        }
        made = {"pairs": rows, "saes": saes, "arms": said.arms, "contrasts": said.contrasts, "grades": said.grades}
        tables = {f"{name}.csv": table for name, table in made.items()}
        return Outcome(said.metrics, tables, figures, said.headline, step=options.steps)

    def make_sae(self, kind: str, width: int, seed: int, d_in: int) -> SAE:
        """An untrained SAE of a kind and width; of a matryoshka SAE's levels those that are narrower stay."""
        recipe = self.kinds[kind].with_weights_seed(seed)
        flat, arguments = recipe.flat_arguments, recipe.section["init_args"]
        flat["d_sae"] = width
        if flat is not arguments:
            arguments["levels"] = [*(level for level in arguments.get("levels") or () if level < width), width]
        return recipe(d_in=d_in)

    def choose_parents(self, base: ActivationDataModule, bench: Bench) -> tuple[Events, Tensor, dict[str, Any]]:
        """The events that children are tied to, their rates, and what has decided them."""
        options, rng = self.plant, generator(bench.seed, "parents")
        count, (low, high) = options.parents + options.silent, options.rates
        config = {"seed": bench.seed, "data": deciding({"data": plain(self.data)}), "plant": [count, low, high]}
        if self.parents is None:
            draws = torch.rand(count, generator=rng, dtype=torch.float64)
            rates = low * (high / low) ** draws  # as many of each order of magnitude
            events: Events = PlantedParents(rates.tolist(), options.parent_magnitude)
            return events, rates, {**config, "parents": options.parent_magnitude}
        facts = {**config, "steps": options.parent_steps, "model": deciding({"model": plain(self.parents)})}
        start = partial(self.parents.with_weights_seed(bench.seed), d_in=base.d_in)
        phase = Phase("parents", facts, start, bench.tracker)
        sae = self.runner(options.parent_steps).train([phase], PhaseData(base, 0, options.parent_steps))["parents"]
        firing = FiringDensity(sae.d_sae)
        for index in range(options.batches):
            firing.update(sae.encode(base.batch("val", index).x))
        rates = firing.compute()
        fit = ((rates >= low) & (rates <= high)).nonzero().squeeze(1)
        if len(fit) < count:
            raise UserError(
                f"plant.parents: {count} are needed, and {len(fit)} latents of {sae.d_sae} fire on {low:g} to {high:g} of the "
                "activations; widen plant.rates, or parents.d_sae"
            )
        chosen = fit[torch.randperm(len(fit), generator=rng)[:count]]
        decided_by = {**config, "parents": phase.id, "latents": chosen.tolist()}  # their rates depend on plant.batches
        return LatentEvents(sae, chosen.tolist()), rates[chosen], decided_by

    def train(
        self, planted: PlantedActivations, name: str, basis: Mapping[str, Any], bench: Bench
    ) -> dict[tuple[str, int, int], SAE]:
        """Every SAE on one of the data sets, by kind, width and seed, as one group; those that the store has come from it."""
        options = self.plant
        places = {
            f"{name}/{kind}/{width}/seed{seed}": (kind, width, seed)
            for kind in self.kinds for width in options.widths for seed in range(options.seeds)
        }  # fmt: skip
        common = {**basis, "set": name, "steps": options.steps}
        common |= {key: getattr(options, key) for key in ("parents", "silent", "doses", "magnitude")}
        phases = []
        for label, (kind, width, seed) in places.items():
            facts = {**common, "model": deciding({"model": plain(self.kinds[kind])}), "width": width, "weights": seed}
            start = partial(self.make_sae, kind, width, bench.seed + seed, planted.d_in)
            phases.append(Phase(label, facts, start, bench.tracker))
        trained = self.runner(options.steps).train(phases, PhaseData(planted, 0, options.steps))
        return {place: trained[label] for label, place in places.items()}

    def runner(self, steps: int) -> PhaseRunner:
        """Trains groups of SAEs for so many steps, and goes on with those that were stopped."""
        saving = RunCheckpoint(save_last=True, save_top_k=0, every_n_train_steps=self.plant.checkpoint_steps)
        trainer = PhaseTrainer(
            max_steps=steps, logger=False, callbacks=[saving], devices=1, num_sanity_val_steps=0, use_distributed_sampler=False,
            enable_model_summary=False, log_every_n_steps=max(1, min(100, steps // 4)), accelerator="auto",
        )  # fmt: skip
        return PhaseRunner(trainer)


def plain(recipe: Recipe[Any]) -> Any:
    """The section of a recipe as plain values."""
    return recipe.section.as_dict() if hasattr(recipe.section, "as_dict") else recipe.section


def draw_lot(rates: Tensor, options: PlantOptions, seed: int) -> Lot:
    """Deal parents out to arms of equal size, doses in the first data set and in reverse in the second; the last are silent."""
    doses = torch.tensor(options.doses, dtype=torch.float64)
    order = torch.randperm(options.parents, generator=generator(seed, "arms"))
    arm = torch.empty(options.parents, dtype=torch.int64)
    arm[order] = torch.arange(options.parents) % len(doses)
    none = torch.zeros(options.silent, dtype=torch.float64)
    elsewhere = torch.zeros_like(rates, dtype=torch.float64)
    quiet = rates[options.parents :].double()
    elsewhere[options.parents :] = (doses[-2] * quiet / (1 - quiet)).clamp_max(1)
    arms = {"A": arm, "B": len(doses) - 1 - arm}
    return Lot({name: torch.cat([doses[one], none]) for name, one in arms.items()}, elsewhere)
