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
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm import LLMDataModule
from hedgelab.data.planting import Events, LatentEvents, MatchedDirections, PlantedActivations, PlantedParents
from hedgelab.errors import UserError, positive, whole_number
from hedgelab.identity import deciding
from hedgelab.metrics import FiringDensity
from hedgelab.plots.hedging import doses_and_responses, shares_against_theory
from hedgelab.protocols.evaluation.built_in import LossSuite
from hedgelab.protocols.evaluation.reader import Readings
from hedgelab.protocols.hedge import HedgeOptions, continuation
from hedgelab.protocols.phase_data import PhaseData
from hedgelab.protocols.planting.findings import findings
from hedgelab.protocols.planting.measures import Others, measure, reconstruction
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Row, Study
from hedgelab.protocols.training_phases import Phase, PhaseRunner
from hedgelab.saes import SAE
from hedgelab.saes.widen import train_like
from hedgelab.seeding import generator

_SETS = ("A", "B")
Place = tuple[str, int, int]  # kind, width and seed of an SAE


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
        n_new: Latents that the hedging degree appends; 0 leaves the degree out.
        new_norm: Decoder norm at which they start.
        continued_steps: Optimiser steps of the SAEs that it compares, with and without new latents.
        loss_contexts: Contexts on which a language model's loss is measured with reconstructions in place of untouched
            activations; 0 leaves it out.
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
    n_new: int = 0
    new_norm: float = 0.1
    continued_steps: int = 1
    loss_contexts: int = 0
    checkpoint_steps: int = 250

    def __post_init__(self) -> None:
        for name in ("steps", "parent_steps", "parents", "seeds", "batches", "continued_steps", "checkpoint_steps"):
            whole_number(f"plant.{name}", getattr(self, name))
        for name in ("silent", "n_new", "loss_contexts"):
            whole_number(f"plant.{name}", getattr(self, name), 0)
        for name in ("magnitude", "parent_magnitude", "new_norm"):
            positive(f"plant.{name}", getattr(self, name))
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"plant.widths: must be widths of at least 1, got {self.widths}")
        rising = len(self.doses) > 1 and self.doses == sorted(set(self.doses))
        if not rising or not 0 <= self.doses[0] <= self.doses[-1] <= 1:
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
        if (n_new := options.n_new) >= base.d_in:
            raise UserError(f"plant.n_new: must be below d_in = {base.d_in}, or they span everything, got {n_new}")
        for width, kind in product(options.widths, self.kinds):
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
                phases = self.phases(name, basis, bench, base.d_in)
                trained = self.train(phases, planted)
                continued = self.continue_all(trained, phases, planted, bench)
                losses = self.losses(trained, base)
                for place, sae in tqdm(trained.items(), f"measuring {name}", disable=not sys.stderr.isatty()):
                    kind, width, seed = place
                    widest = max(options.widths)
                    wide = None if width == widest else trained[kind, widest, seed]
                    found = measure(sae, planted, options.batches, Others(wide, continued.get(place)))
                    common = {"data": name, "kind": kind, "width": width, "seed": seed}
                    saes.append({**common, **found.numbers, **losses.get(place, {})})
                    columns = {**found.pairs._asdict(), "has_latent": found.pairs.has_latent}
                    columns |= {"dose": lot.doses[name], "silent": lot.elsewhere > 0}
                    for key, halves in found.measures.items():
                        columns |= {key: halves.mean(0), f"{key}/noise": (halves[0] - halves[1]).div(2)}
                    of_parents = zip(*(column.tolist() for column in columns.values()), strict=True)
                    rows += [{**common, "parent": i, **dict(zip(columns, of, strict=True))} for i, of in enumerate(of_parents)]
            untouched = self.train(self.phases("untouched", basis, bench, base.d_in, seeds=1), base)
            losses = self.losses(untouched, base)
            for place, sae in untouched.items():
                common = dict(zip(("data", "kind", "width", "seed"), ("untouched", *place), strict=True))
                there = reconstruction(sae, base, options.batches)
                saes.append({**common, **{f"untouched/{key}": value for key, value in there.items()}, **losses.get(place, {})})
        finally:
            base.teardown("fit")
        said = findings(rows, saes, options.doses)
        figures = {
            "doses.png": doses_and_responses(said.tables["arms"], options.doses),
            "theory.png": shares_against_theory(rows),
        }
        tables = {f"{name}.csv": table for name, table in {"pairs": rows, "saes": saes, **said.tables}.items()}
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
        config = {"seed": bench.seed, "data": deciding({"data": self.data.plain}), "plant": [count, low, high]}
        if self.parents is None:
            draws = torch.rand(count, generator=rng, dtype=torch.float64)
            rates = low * (high / low) ** draws  # as many of each order of magnitude
            events: Events = PlantedParents(rates.tolist(), options.parent_magnitude)
            return events, rates, {**config, "parents": options.parent_magnitude}
        facts = {**config, "steps": options.parent_steps, "model": deciding({"model": self.parents.plain})}
        start = partial(self.parents.with_weights_seed(bench.seed), d_in=base.d_in)
        phase = Phase("parents", facts, start, bench.tracker)
        sae = self.runner(options.parent_steps).train([phase], PhaseData(base, 0, options.parent_steps))["parents"]
        firing = FiringDensity(sae.d_sae)
        for index in range(options.batches):
            firing.update(sae.encode(base.batch("val", index).x.to(sae.W_dec.device)))
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

    def phases(
        self, name: str, basis: Mapping[str, Any], bench: Bench, d_in: int, seeds: int | None = None
    ) -> dict[Place, Phase]:
        """Every SAE on one of the data sets, by kind, width and seed; those on untouched activations do not know of the lot."""
        options, phases = self.plant, dict[Place, Phase]()
        common = {**basis, "set": name, "steps": options.steps}
        if name in _SETS:
            common |= {key: getattr(options, key) for key in ("parents", "silent", "doses", "magnitude")}
        for place in product(self.kinds, options.widths, range(seeds or options.seeds)):
            kind, width, seed = place
            facts = {**common, "model": deciding({"model": self.kinds[kind].plain}), "width": width, "weights": seed}
            start = partial(self.make_sae, kind, width, bench.seed + seed, d_in)
            phases[place] = Phase(f"{name}/{kind}/{width}/seed{seed}", facts, start, bench.tracker)
        return phases

    def train(self, phases: Mapping[Place, Phase], data: ActivationDataModule) -> dict[Place, SAE]:
        """The SAEs of some phases, as one group; those that the store has come from it."""
        steps = self.plant.steps
        trained = self.runner(steps).train([*phases.values()], PhaseData(data, 0, steps))
        return {place: trained[phase.name] for place, phase in phases.items()}

    def continue_all(
        self, trained: Mapping[Place, SAE], phases: Mapping[Place, Phase], data: PlantedActivations, bench: Bench
    ) -> dict[Place, tuple[SAE, SAE]]:
        """Of each SAE a control, trained on, and the same with new latents, for the hedging degree; nothing without it."""
        options, steps, continued = self.plant, self.plant.continued_steps, list[Phase]()
        if not options.n_new:
            return {}
        how = HedgeOptions(options.n_new, options.new_norm, lr_decay=True)
        for (kind, width, seed), sae in trained.items():
            train_like(sae, self.make_sae(kind, width, bench.seed + seed, data.d_in))
            before = phases[kind, width, seed]
            for role in ("control", "extended"):
                facts: dict[str, Any] = {"phase": role, "initial": before.id, "steps": steps}
                facts |= {"n_new": options.n_new, "new_norm": options.new_norm} if role == "extended" else {}
                start = partial(continuation, sae, role, bench.seed + seed, how, steps)
                continued.append(Phase(f"{before.name}/{role}", facts, start, bench.tracker))
        done = self.runner(steps).train(continued, PhaseData(data, options.steps, steps))
        names = {place: phases[place].name for place in trained}
        return {place: (done[f"{name}/control"], done[f"{name}/extended"]) for place, name in names.items()}

    def losses(self, trained: Mapping[Place, SAE], base: ActivationDataModule) -> dict[Place, dict[str, float]]:
        """What a language model loses with reconstructions of its untouched activations, of each SAE."""
        if not self.plant.loss_contexts or not isinstance(base, LLMDataModule):
            return {}
        saes = {str(place): sae for place, sae in trained.items()}
        scored = dict(LossSuite(self.plant.loss_contexts).score(saes, Readings(base)))
        shares = ("recovered", "recovered_mean", "kl_recovered")
        return {
            place: {f"untouched/{key}": scored[str(place)].metrics[f"loss_recovered/{key}"] for key in shares}
            for place in trained
        }

    def runner(self, steps: int) -> PhaseRunner:
        """Trains groups of SAEs for so many steps, and goes on with those that were stopped."""
        return PhaseRunner.of_study(steps, self.plant.checkpoint_steps)


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
