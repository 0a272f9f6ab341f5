"""The work of ``hedgelab trial``: read the config, make toys and SAEs, train, measure, log."""

from __future__ import annotations

import copy
import csv
import io
import statistics
import sys
from collections.abc import Sequence
from typing import Any, cast

import yaml
from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

import hedgelab.data.toy
import hedgelab.saes  # noqa: F401
from hedgelab.cli.compose import compose, config_files
from hedgelab.cli.errors import one_line
from hedgelab.cli.explain import resolve
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import ToyDataModule
from hedgelab.data.toy.copula import CopulaFiring
from hedgelab.errors import UserError
from hedgelab.plots.trial import hedging_of_levels, hedging_over_width, measures_against_truth
from hedgelab.protocols.trial import TrialOptions, TrialScore, agreement, run_trial
from hedgelab.saes import SAE
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.provenance import provenance_tags

_MEASURES = {"residual hedging": "residual_hedging", "hedging degree": "degree"}


def run_trial_command(words: list[str]) -> int:
    """Parse, train, measure, log, and print the rank agreements."""
    parser = make_parser()
    try:
        config = parser.parse_args(words)
    except Exception as error:
        raise UserError(one_line(str(error))) from error
    for key in ("data", "kinds", "toys", "trial"):
        if not config[key]:
            raise UserError(f"{key}: missing; see configs/toy/degree_trial.yaml")
    options = TrialOptions(**vars(config.trial))
    maker = TrialMaker(config, resolve(compose(words))["kinds"])
    toys = {name: maker.toy(name) for name in config.toys}
    for width in options.widths:
        for kind in config.kinds:
            maker.sae(kind, width, 0)  # mistakes show before anything is trained
    name = config.name or "+".join(file.stem for file in config_files(words)) or "trial"
    tracker = MLflowTracker(experiment=config.experiment, run_name=name)
    try:
        tracker.log_config(text := parser.dump(config, skip_none=False))
        tracker.log_hyperparams({key: value for key, value in yaml.safe_load(text).items() if key != "config"})
        tracker.log_tags(provenance_tags(1))
        total = len(options.widths) * len(config.kinds) * (options.steps + 2 * options.continued_steps)
        with tqdm(total=total, desc="Training", unit="step", disable=not sys.stderr.isatty()) as bar:
            scores = run_trial(toys, list(config.kinds), maker.sae, options, lambda steps: bar.update(steps) and None)
        print(record(tracker, scores, total))
    except BaseException:
        tracker.finalize("failed")
        raise
    tracker.finalize("success")
    return 0


def make_parser() -> ArgumentParser:
    """Options of the command."""
    parser = ArgumentParser(prog="hedgelab trial", exit_on_error=False, parser_mode="omegaconf+")
    parser.add_argument("--config", action="config", help="Config file (YAML).")
    parser.add_subclass_arguments(ActivationDataModule, "data", help="What all toys share; its firing a CopulaFiring.")
    parser.add_argument("--toys", type=dict[str, dict[str, Any]], help="Arguments of the firing by toy.")
    parser.add_argument(
        "--kinds", type=dict[str, dict[str, Any]],
        help="SAEs by kind. Width, levels (a quarter, a half, all of it) and a k of null are filled in.",
    )  # fmt: skip
    parser.add_argument("--trial", type=TrialOptions, help="Size of the trial.")
    parser.add_argument("--seed_everything", type=int, default=0, help="Seed of the data and of the first SAE.")
    parser.add_argument("--name", type=str | None, help="Name of the run; the config file's by default.")
    parser.add_argument("--experiment", type=str, default="trial", help="MLflow experiment.")
    return parser


class TrialMaker:
    """Makes the toys and the SAEs of a trial from its config.

    Args:
        config: The parsed config.
        kinds: Its ``kinds`` as they were written: the parser has put defaults into them that it would not take again.
    """

    def __init__(self, config: Namespace, kinds: dict[str, Any]) -> None:
        self.config, self.kinds = config, kinds
        self._parser = ArgumentParser(exit_on_error=False)
        self._parser.add_subclass_arguments(ActivationDataModule, "data", required=False)
        self._parser.add_subclass_arguments(SAE, "model", required=False)

    def toy(self, name: str) -> ToyDataModule:
        """A toy: the shared section with this one's arguments of the firing.

        Raises:
            UserError: Not a toy with copula firing, or arguments that this refuses.
        """
        section = self.config.data.as_dict()
        section["init_args"]["firing"]["init_args"].update(self.config.toys[name])
        section["init_args"]["seed"] = self.config.seed_everything
        data = self._instantiate("data", section, f"toys.{name}")
        if not isinstance(data, ToyDataModule) or not isinstance(data.firing, CopulaFiring):
            raise UserError("data: a trial needs a ToyDataModule with CopulaFiring")
        return data

    def sae(self, kind: str, width: int, seed: int) -> SAE:
        """An SAE of a kind and a width; k of null becomes the mean number of the ``width`` most frequent features that fire.

        Raises:
            UserError: Arguments that it refuses.
        """
        base: dict[str, Any] = copy.deepcopy(self.kinds[kind])
        init_args = base.setdefault("init_args", {})
        inner = init_args.get("inner", base).setdefault("init_args", {})
        init_args["d_in"] = self.config.data.init_args.d_in
        inner["d_sae"] = width
        inner["init"] = {**inner.get("init", {}), "seed": self.config.seed_everything + seed}
        if inner is not init_args:
            init_args["levels"] = sorted({max(1, width // 4), max(1, width // 2), width})
        if inner.get("k", 0) is None:
            firing = self.toy(next(iter(self.config.toys))).firing
            assert isinstance(firing, CopulaFiring)
            inner["k"] = max(1, round(float(firing.rates().sort(descending=True).values[:width].sum())))
        return cast(SAE, self._instantiate("model", base, f"kinds.{kind}"))

    def _instantiate(self, name: str, section: dict[str, Any], key: str) -> Any:
        try:
            parsed = self._parser.parse_object({name: section})
            return self._parser.instantiate(parsed)[name]
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{key}: {one_line(str(error))}") from error


def record(tracker: MLflowTracker, scores: Sequence[TrialScore], step: int) -> str:
    """Numbers, table and figures into the run; what to tell the user."""
    kinds, toys = (list(dict.fromkeys(getattr(score, name) for score in scores)) for name in ("kind", "toy"))
    widths = sorted({score.width for score in scores})
    of = {kind: [score for score in scores if score.kind == kind] for kind in kinds}
    ranks = {label: {kind: agreement(of[kind], name) for kind in kinds} for label, name in _MEASURES.items()}
    tracker.log_metrics(
        {f"spearman/{_MEASURES[label]}/{kind}": rank for label, own in ranks.items() for kind, rank in own.items()},
        step,
    )
    tracker.log_text(table(scores), "table.csv")
    points = {
        label: {
            kind: {toy: [(s.true_hedging, getattr(s, name)) for s in of[kind] if s.toy == toy] for toy in toys}
            for kind in kinds
        }
        for label, name in _MEASURES.items()
    }
    tracker.log_figure(measures_against_truth(points, ranks), "figures/against_truth.png")
    curves = {
        kind: {
            toy: {w: [s.true_hedging for s in of[kind] if s.toy == toy and s.width == w] for w in widths}
            for toy in toys
        }
        for kind in kinds
    }
    tracker.log_figure(hedging_over_width(curves), "figures/widths.png")
    nested = [score for score in scores if score.levels]
    if nested:
        levels = {
            toy: {w: _means([s.levels for s in nested if s.toy == toy and s.width == w]) for w in widths}
            for toy in toys
        }
        tracker.log_figure(hedging_of_levels(levels), "figures/levels.png")
    lines = [f"run {tracker.run_id}: {len(scores)} SAEs; Spearman's rank correlation with true hedging"]
    lines += [f"  {label:<18}" + "".join(f"  {kind} {ranks[label][kind]:.3f}" for kind in kinds) for label in ranks]
    return "\n".join([*lines, "look at it: hedgelab ui"])


def table(scores: Sequence[TrialScore]) -> str:
    """Every SAE as a line of CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(TrialScore._fields)
    for score in scores:
        shown = [f"{value:.6g}" if isinstance(value, float) else value for value in score[:-1]]
        writer.writerow([*shown, " ".join(f"{value:.6g}" for value in score.levels)])
    return text.getvalue()


def _means(levels: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*levels, strict=True)]
