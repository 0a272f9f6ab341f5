"""The hedging degree of an SAE, from its training to the number (SPEC section 5).

Phase one trains the *initial* SAE on the stream's first T batches. Phase two goes on from it on the next T batches, three
times, each with a fresh optimiser, all as one group: the *control* unchanged; the *extended* SAE with new latents
appended; and a control that sees the batches *reordered*, whose motion is noise. Several seeds (of the weights and of the
new latents) share the stream and train as one group too; each one's new latents are the others' foreign baseline.
"""

import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import PolynomialLR

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm import LLMDataModule
from hedgelab.errors import UserError, positive, whole_number
from hedgelab.metrics.classes import ROWS, HedgingDegree, ResidualHedgingMetric
from hedgelab.metrics.functional.degree import DRAWS, DegreeScores
from hedgelab.metrics.functional.error_spread import BLOCKS
from hedgelab.plots.hedging import degree_and_baselines, projection_of_latents
from hedgelab.protocols.case_study import LLMProbe, page
from hedgelab.protocols.phase_data import PhaseData
from hedgelab.protocols.ranks import decided_by_rank_zero, on_every_rank, say
from hedgelab.protocols.study import Bench, Outcome, Row, Study
from hedgelab.protocols.training_phases import Phase, PhaseRunner, PhaseTrainer
from hedgelab.saes import SAE, JumpReLUSAE, VanillaSAE, duplicate, fresh, widen
from hedgelab.saes.topk import KSparseSAE
from hedgelab.saes.widen import flat_part, train_like
from hedgelab.seeding import resolve_seed
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.provenance import provenance_tags

_SHOWN = (
    "residual_hedging", "degree", "live_degree", "covariance_degree", "foreign_degree", "projection", "baseline",
    "baseline_std", "noise_floor", "delta_norm", "live_new_latents",
)  # fmt: skip


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
        for name, least in (("n_new", 1), ("seeds", 1), ("draws", 2)):
            whole_number(f"hedge.{name}", getattr(self, name), least)
        positive("hedge.new_norm", self.new_norm)
        if self.lr is not None and self.lr <= 0:
            raise UserError(f"hedge.lr: must be above 0, or null for the optimiser's own, got {self.lr}")
        positive("hedge.l1_restart", self.l1_restart, or_zero=True)


class Continuations(NamedTuple):
    """What phase two makes of one initial SAE, by role."""

    control: SAE
    extended: SAE
    reordered: SAE


@dataclass(eq=False)
class Hedge(Study):
    """Measure how much an SAE hedges: train, widen, train on, compare.

    Its config has the sections of ``hedgelab fit`` and one more, ``hedge``. Phases that the store has with the same
    ``outcome``, plain values that decide what training gives, are not trained again; without it all are.
    """

    model: SAE  # the pattern of all that are trained; it stays as it is
    data: ActivationDataModule  # the stream's first ``2 * max_steps`` batches are trained on
    trainer: PhaseTrainer  # its ``max_steps`` are the steps of each of the two phases
    options: HedgeOptions = HedgeOptions()
    outcome: Mapping[str, Any] | None = None
    retrain: bool = False  # train also the phases that the store has
    seeds: Sequence[int] = ()  # instead of as many as the options say from the model's own on
    tracker: MLflowTracker | None = None  # the run below which those of the phases stand
    label: str = ""  # what the names of its phases begin with, where several studies share the stream

    def __post_init__(self) -> None:
        if self.trainer.max_steps < 1:
            raise UserError("trainer.max_steps: must be set: it is the number of steps of each phase")
        if (n_new := self.options.n_new) >= self.data.d_in:
            raise UserError(f"hedge.n_new: must be below d_in = {self.data.d_in}, or they span everything, got {n_new}")
        first = resolve_seed(flat_part(self.model).init.seed)
        self.seeds = self.seeds or [first + repeat for repeat in range(self.options.seeds)]

    def run(self, bench: Bench) -> Outcome:
        """Train what the store has not, and measure."""
        if bench.tracker is not None:
            bench.tracker.log_tags({"protocol": "hedge", **provenance_tags(self.trainer.world_size)})
            self.tracker = bench.tracker
        runner = PhaseRunner(self.trainer, self.outcome is not None, self.retrain)
        return on_every_rank(self.trainer, lambda: measure_hedging([self], runner)[0])

    def phase_name(self, role: str, seed: int) -> str:
        """What the phase of a role and a seed is called."""
        return f"{self.label}{role}/seed{seed}"

    def initial_phases(self) -> list[Phase]:
        """Phase one, of each seed."""
        config = {**(self.outcome or {}), "steps": self.trainer.max_steps, "phase": "initial"}
        return [
            Phase(self.phase_name("initial", seed), {**config, "seed": seed}, partial(fresh, self.model, seed), self.tracker)
            for seed in self.seeds
        ]  # fmt: skip

    def continuation_phases(self, trained: Mapping[str, SAE]) -> list[Phase]:
        """Phase two, of each seed and role, from what phase one has given by name."""
        options, steps = self.options, self.trainer.max_steps
        common = {"steps": steps, "lr": options.lr, "lr_decay": options.lr_decay, "l1_restart": options.l1_restart}
        common |= {name: value for name, value in (self.outcome or {}).items() if name == "hedgelab"}  # the release
        phases = []
        for (seed, start), role in product(zip(self.seeds, self.initial_phases(), strict=True), Continuations._fields):
            train_like(initial := trained[start.name], self.model)
            config = {"phase": role, "seed": seed, "initial": start.id, **common}
            if role == "extended":
                config |= {"n_new": options.n_new, "new_norm": options.new_norm}
            start_again = partial(continuation, initial, role, seed, options, steps)
            phases.append(Phase(self.phase_name(role, seed), config, start_again, self.tracker))
        return phases


def measure_hedging(studies: Sequence[Hedge], runner: PhaseRunner) -> list[Outcome]:
    """The hedging degrees of several SAEs on the same data, each phase of all of them as one group."""
    data = studies[0].data
    try:
        trained = train_together(studies, runner)
        say("measuring")
        scores = measure_together(studies, trained)
        pages = any(study.options.n_new == 1 for study in studies)
        probe = LLMProbe(data) if pages and isinstance(data, LLMDataModule) else None
        return [outcome_of(*one, probe) for one in zip(studies, trained, scores, strict=True)]
    finally:
        data.teardown("fit")


def train_together(studies: Sequence[Hedge], runner: PhaseRunner) -> list[dict[int, Continuations]]:
    """Both phases, for every seed of every study; what the store has already is taken from there.

    The activations are read once for all, and what several studies have in common (the same SAE and its controls, where
    only the new latents differ) is trained once; each study gets what it would get alone.
    """
    data, steps = studies[0].data, studies[0].trainer.max_steps
    starts = [phase for study in studies for phase in study.initial_phases()]
    initial = runner.train(starts, PhaseData(data, 0, steps))
    phases = [phase for study in studies for phase in study.continuation_phases(initial)]
    reordered = [study.phase_name("reordered", seed) for study in studies for seed in study.seeds]
    trained = runner.train(phases, PhaseData(data, steps, steps, reordered))

    def continuations(study: Hedge, seed: int) -> Continuations:
        return Continuations(*(trained[study.phase_name(role, seed)] for role in Continuations._fields))

    return [{seed: continuations(study, seed) for seed in study.seeds} for study in studies]


@torch.no_grad()
def measure_together(studies: Sequence[Hedge], trained: Sequence[Mapping[int, Continuations]]) -> list[dict[int, DegreeScores]]:
    """The degrees of several SAEs on the same data, whose validation batches are read once for all.

    SAEs are measured on the device where the activations are (a language model's may be on a GPU), one seed at a time, and
    then moved back. On several ranks each measures for itself, on whole batches (which a language model's ranks make together).
    """
    data = studies[0].data
    decided_by_rank_zero(data.prepare_data)
    data.prepare_data()  # where ranks share no disk
    data.setup("fit")
    batches = [data.batch("val", index) for index in range(data.val_batches)]
    return [
        {seed: _degree(own, seed, study.options.draws, batches) for seed in own}
        for study, own in zip(studies, trained, strict=True)
    ]


def _degree(trained: Mapping[int, Continuations], seed: int, draws: int, batches: Sequence[Batch]) -> DegreeScores:
    """The degree of one seed, the other seeds' new latents as its foreign baseline, and the control's residual hedging.

    The latter needs enough examples without weights.
    """
    saes, device = trained[seed], batches[0].x.device
    foreign = [own.extended.W_dec[saes.control.d_sae :].to(device) for other, own in trained.items() if other != seed]
    homes = [sae.W_dec.device for sae in saes]
    for sae in saes:
        sae.to(device)
    control, extended, reordered = (sae.W_dec for sae in saes)
    metric = HedgingDegree(control, extended, reordered, foreign, draws, seed, sync_on_compute=False).to(device)
    residual, rows = ResidualHedgingMetric(control, sync_on_compute=False).to(device), 0
    for x, _, weight in batches:
        codes = saes.control.encode(x)
        metric.update(x, codes, saes.extended.encode(x), weight)
        if weight is None and rows < ROWS:
            residual.update(x, saes.control.decode(codes), codes)
            rows += len(x)
    scores: DegreeScores = metric.compute()
    if rows >= 2 * BLOCKS:
        hedging, std = residual.compute()[:2]
        scores = scores._replace(residual_hedging=hedging, residual_hedging_std=std)
    for sae, home in zip(saes, homes, strict=True):
        sae.to(home)
    return scores


def continuation(initial: SAE, role: str, seed: int, options: HedgeOptions, steps: int) -> SAE:
    """What is trained on from a trained SAE: wider or not, penalties as SPEC section 6 has them, its own learning rate."""
    wider = role == "extended"
    sae = widen(initial, options.n_new, options.new_norm, seed) if wider else duplicate(initial)
    flat = flat_part(sae)
    if isinstance(flat, VanillaSAE):
        flat.l1_warmup_start = min(flat.l1_coefficient, options.l1_restart)
    if isinstance(flat, JumpReLUSAE):
        flat.l0_warmup_steps = 0
    if isinstance(flat, KSparseSAE):
        flat.k_start = flat.k_steps = None
    if options.lr is not None:
        sae.optimizer = partial(_with_lr, sae.optimizer, options.lr)
    if options.lr_decay:
        sae.lr_scheduler = partial(PolynomialLR, total_iters=steps)
    return sae


def _with_lr(optimizer: Callable[[Iterable[Any]], Optimizer], lr: float, parameters: Iterable[Any]) -> Optimizer:
    made = optimizer(parameters)
    for group in made.param_groups:
        group["lr"] = lr
    return made


def outcome_of(
    study: Hedge, trained: Mapping[int, Continuations], scores: Mapping[int, DegreeScores], probe: LLMProbe | None = None
) -> Outcome:
    """Numbers, the distribution over latents, and for one new latent its case study.

    Numbers are means over seeds; with several seeds also their spread, ``..._seed_std``, and every seed's own. Where no new
    latent fires, the degree says nothing; where fewer than half of them do, it is too low.
    """
    n_new, steps = study.options.n_new, study.trainer.max_steps
    by_seed = {seed: result.scalars() for seed, result in scores.items()}
    numbers: dict[str, float] = {}
    for name in dict.fromkeys(name for values in by_seed.values() for name in values):
        values = {seed: own[name] for seed, own in by_seed.items() if name in own}
        numbers[f"hedging/{name}"] = statistics.fmean(values.values())
        if len(by_seed) > 1:
            numbers[f"hedging/{name}_seed_std"] = statistics.stdev(values.values()) if len(values) > 1 else 0.0
            numbers |= {f"hedging/seed{seed}/{name}": value for seed, value in values.items()}
    failure = None
    for seed, result in scores.items():
        if (live := int(result.live_new_latents)) == 0:
            failure = (
                f"hedge.new_norm: none of the {n_new} new latents ever fires (seed {seed}), so the degree says nothing; "
                "raise it, or train longer, or with an auxiliary loss that revives them (model.dead_after_steps)"
            )
        elif 2 * live < n_new:
            warnings.warn(f"only {live} of {n_new} new latents fire (seed {seed}): the degree is too low", stacklevel=2)
    columns = ("projections", "delta_norms", "cosines", "live")
    rows: list[Row] = [
        {"seed": seed, "latent": latent, "projection": p, "delta_norm": d, "cosine": c, "live": int(live)}
        for seed, own in scores.items()
        for latent, (p, d, c, live) in enumerate(zip(*(getattr(own, name).tolist() for name in columns), strict=True))
    ]
    projections = [own.projections.tolist() for own in scores.values()]
    baselines = numbers["hedging/baseline"], numbers.get("hedging/noise_floor")
    figures = {
        "hedging_degree.png": degree_and_baselines(list(by_seed.values())),
        "hedging_by_latent.png": projection_of_latents(projections, *baselines),
    }
    headline = [f"seeds {', '.join(map(str, scores))}, {steps} steps a phase"]
    shown = [name for short in _SHOWN if (name := f"hedging/{short}") in numbers]
    for name in shown:
        spread = numbers.get(f"{name}_seed_std")
        line = f"{name:<{max(map(len, shown))}}  {numbers[name]:.4g}"
        headline.append(line if spread is None else f"{line} ± {spread:.2g}")
    studied = trained.items() if n_new == 1 else ()
    texts = {f"case_study/seed{seed}.html": page(own.control, own.extended, probe) for seed, own in studied}
    tables = {"hedging/latents.csv": rows}
    return Outcome(numbers, tables, figures, headline, step=2 * steps, texts=texts, failure=failure)
