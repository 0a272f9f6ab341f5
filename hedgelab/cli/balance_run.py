"""The work of ``hedgelab balance``: read the config, make SAEs from it, train and compare them, log."""

from __future__ import annotations

import csv
import io
import sys
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from tqdm import tqdm

import hedgelab.data.toy
import hedgelab.saes  # noqa: F401
from hedgelab.cli.compose import Tree, compose, config_files
from hedgelab.cli.diagnose import Walk
from hedgelab.cli.errors import one_line
from hedgelab.cli.explain import resolve, top_level
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import ToyDataModule
from hedgelab.errors import UserError
from hedgelab.plots.balance import balance_figure
from hedgelab.protocols.balance import Balance, BetaGrid, WeightSearch, find_balance, fits
from hedgelab.saes import SAE, MatryoshkaSAE
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.provenance import provenance_tags

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # ${…} across config files
_SHOWN = ("β = 1, plain matryoshka", "best β", "adaptive weights, one a level", "one weight a level", "credit, β = 1")


def run_balance_command(words: list[str]) -> int:
    """Parse, train, log, and say what came out."""
    tree = compose(words)
    config = parse(words, tree)
    name = config.name or "+".join(file.stem for file in config_files(words)) or "balance"
    tracker = MLflowTracker(experiment=config.experiment, run_name=name)
    try:
        tracker.log_config(text := make_parser().dump(config, skip_none=False))
        tracker.log_hyperparams({key: value for key, value in yaml.safe_load(text).items() if key != "config"})
        tracker.log_tags(provenance_tags(1))
        print(work(config, tracker))
    except BaseException:
        tracker.finalize("failed")
        raise
    tracker.finalize("success")
    return 0


def make_parser() -> ArgumentParser:
    """Options of the command."""
    parser = ArgumentParser(prog="hedgelab balance", exit_on_error=False, parser_mode="omegaconf+")
    parser.add_argument("--config", action="config", help="Config file (YAML).")
    parser.add_subclass_arguments(ActivationDataModule, "data", help="The hierarchy; trained on its exact population.")
    parser.add_subclass_arguments(SAE, "model", skip={"d_in"}, help="The MatryoshkaSAE whose levels are weighted.")
    parser.add_argument("--betas", type=BetaGrid, default=BetaGrid(), help="Fixed β to try.")
    parser.add_argument("--search", type=WeightSearch | None, default=None, help="How to look for one weight a level.")
    parser.add_argument("--starts", type=list[float], default=[1.0], help="β from which adaptive weights start.")
    parser.add_argument("--parent", type=int, default=0, help="The parent's feature, and its latent.")
    parser.add_argument("--steps", type=int, default=2000, help="Optimiser steps of each SAE.")
    parser.add_argument("--seed_everything", type=int, default=0, help="Seed of all SAEs.")
    parser.add_argument("--name", type=str | None, help="Name of the run; the config file's by default.")
    parser.add_argument("--experiment", type=str, default="theory", help="MLflow experiment.")
    return parser


def parse(words: list[str], tree: Tree) -> Namespace:
    """The options, checked.

    Raises:
        UserError: What is refused, in one line.
    """
    parser = make_parser()
    try:
        config = parser.parse_args(words)
    except Exception as error:
        types: dict[str, Any] = {
            "model": SAE, "data": ActivationDataModule, "betas": BetaGrid, "search": WeightSearch | None,
        }  # fmt: skip
        walk = Walk(resolve(tree), top_level(vars(parser.get_defaults()), types), frozenset({"model.d_in"}))
        raise UserError(walk.first or one_line(str(error))) from error
    for key in ("data", "model"):
        if config[key] is None:
            raise UserError(f"{key}: missing; see configs/theory/balance.yaml for an example")
    if not config.model.class_path.endswith("MatryoshkaSAE"):
        raise UserError(f"model: must be a MatryoshkaSAE, got {config.model.class_path.rpartition('.')[2]}")
    if config.steps < 1:
        raise UserError(f"steps: must be at least 1, got {config.steps}")
    if not config.starts or min(config.starts) <= 0:
        raise UserError(f"starts: needs values of β above 0, got {config.starts}")
    return config


class Maker:
    """Makes the toy and the SAEs of a config."""

    def __init__(self, config: Namespace) -> None:
        self.config = config
        self._parser = ArgumentParser(exit_on_error=False)
        self._parser.add_subclass_arguments(ActivationDataModule, "data", required=False)
        self._parser.add_subclass_arguments(SAE, "model", required=False)
        data = self._parser.instantiate(Namespace(data=config.data)).data  # type: ignore[no-untyped-call]
        if not isinstance(data, ToyDataModule) or data.batch("train", 0).weight is None:
            raise UserError("data: needs a ToyDataModule with sampling: population")
        if not 0 <= config.parent < len(data.feature_directions):
            raise UserError(f"parent: must be a feature, 0 to {len(data.feature_directions) - 1}, got {config.parent}")
        self.data = data

    def sae(self, **arguments: Any) -> MatryoshkaSAE:
        """The config's SAE with some arguments of its own, initialised."""
        section: Namespace = self.config.model.clone()
        for name, value in {"d_in": self.data.d_in, **arguments}.items():
            section.init_args[name] = value
        section.init_args.inner.init_args.init.seed = self.config.seed_everything
        sae: MatryoshkaSAE = self._parser.instantiate(Namespace(model=section)).model  # type: ignore[no-untyped-call]
        first = self.data.batch("train", 0)
        sae = sae.to(first.x.dtype)
        sae.initialize(first, self.data.feature_directions)
        return sae


def work(config: Namespace, tracker: MLflowTracker) -> str:
    """Train, measure and log; what to tell the user."""
    maker = Maker(config)
    betas = BetaGrid(**vars(config.betas))
    search = WeightSearch(**vars(config.search)) if config.search is not None else None
    total = fits(search) * config.steps
    with tqdm(total=total, desc="Training", unit="step", disable=not sys.stderr.isatty()) as bar:
        balance = find_balance(
            maker.sae, maker.data, betas, config.steps, search, config.starts, config.parent,
            lambda steps: bar.update(steps) and None,
        )  # fmt: skip
    numbers = {
        f"{method}/{name}": float(getattr(scores, name)[0])
        for method, scores in balance.methods.items()
        for name in ("encoder_error", "decoder_error", "mse", "mcc")
    }
    tracker.log_metrics(numbers, config.steps)
    tracker.log_text(methods_table(balance), "methods.csv")
    tracker.log_text(curves_table(balance), "curves.csv")
    tracker.log_figure(figure(balance, config.parent), "figures/balance.png")
    widest = max(map(len, balance.methods))
    lines = [
        f"  {method:<{widest}}  encoder error {scores.encoder_error[0]:.4f}  decoder error {scores.decoder_error[0]:.4f}  "
        f"mse {scores.mse[0]:.2e}  weights {' '.join(f'{weight:.4g}' for weight in scores.weights[0])}"
        for method, scores in balance.methods.items()
    ]
    return "\n".join([f"run {tracker.run_id}: {len(lines)} methods", *lines, "look at it: hedgelab ui"])


def figure(balance: Balance, parent: int) -> Any:
    """Error over β, and the parent's components."""
    features = next(iter(balance.methods.values())).encoder.shape[1]
    children = [j for j in range(features) if j != parent]
    adaptive = {
        name: (float(scores.weights[0, 0]), float(scores.encoder_error[0]))
        for name, scores in balance.methods.items()
        if name.startswith("adaptive weights from")
    }
    first = next(iter(adaptive))
    shown = [name for name in _SHOWN if name in balance.methods]
    shown.insert(2, first)
    return balance_figure(
        balance.betas,
        {name: curve.encoder_error for name, curve in balance.curves.items()},
        {"adaptive weight, no ground truth used": adaptive[first]},
        {name: balance.methods[name].encoder[0, children] for name in shown},
        [f"feature {j}" for j in children],
        "How clean is the parent's latent?",
    )


def methods_table(balance: Balance) -> str:
    """A line of CSV a method."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    features = range(next(iter(balance.methods.values())).encoder.shape[1])
    writer.writerow(
        ["method", "encoder_error", "decoder_error", "mse", "mcc", *(f"encoder_feature{j}" for j in features),
         *(f"decoder_feature{j}" for j in features), "level_weights"]
    )  # fmt: skip
    for name, s in balance.methods.items():
        numbers = [s.encoder_error[0], s.decoder_error[0], s.mse[0], s.mcc[0], *s.encoder[0], *s.decoder[0]]
        writer.writerow([name, *(f"{x:.7g}" for x in numbers), " ".join(f"{weight:.6g}" for weight in s.weights[0])])
    return text.getvalue()


def curves_table(balance: Balance) -> str:
    """A line of CSV for each curve and β."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["curve", "beta", "encoder_error", "decoder_error", "mse", "mcc"])
    for name, s in balance.curves.items():
        for i, beta in enumerate(balance.betas):
            numbers = [beta, s.encoder_error[i], s.decoder_error[i], s.mse[i], s.mcc[i]]
            writer.writerow([name, *(f"{x:.7g}" for x in numbers)])
    return text.getvalue()
