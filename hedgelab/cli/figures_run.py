"""The work of ``hedgelab figures``: each toy's SAE at its population optimum, and the loss landscapes."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

import hedgelab.saes
from hedgelab.batch import Batch
from hedgelab.cli.compose import Tree, compose, config_files
from hedgelab.cli.errors import one_line
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import ToyDataModule
from hedgelab.errors import UserError
from hedgelab.metrics.functional import decoder_cosines, encoder_cosines
from hedgelab.plots import cosine_heatmaps, decoder_bias
from hedgelab.plots.landscape import loss_landscapes
from hedgelab.saes import SAE
from hedgelab.theory import Minimum, Population, minima, minimise, tied_loss
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.provenance import provenance_tags


class Toy(NamedTuple):
    """A toy's SAE at its population optimum.

    Attributes:
        sae: The SAE, float64.
        batch: The population.
        directions: True features, ``[n, d_in]``.
        minimum: How well it converged.
        seconds: What that took.
    """

    sae: SAE
    batch: Batch
    directions: Tensor
    minimum: Minimum
    seconds: float


def run_figures_command(words: list[str]) -> int:
    """Parse, train, draw, log, and say what came out."""
    parser = ArgumentParser(prog="hedgelab figures", exit_on_error=False)
    parser.add_argument("--config", action="config", help="Config file (YAML).")
    parser.add_argument(
        "--toys", type=list[str], default=[], help="Configs of `hedgelab fit`; trained on their populations."
    )
    parser.add_argument("--landscapes", type=list[tuple[float, float]], default=[], help="Pairs P(f0 alone), P(both).")
    parser.add_argument("--l1_coefficients", type=list[float], default=[0.0, 0.1], help="λ of the landscapes.")
    parser.add_argument("--norm", type=float, default=1.0, help="Exponent of the landscapes' penalty λ a^norm.")
    parser.add_argument("--name", type=str | None, help="Name of the run; the config file's by default.")
    parser.add_argument("--experiment", type=str, default="paper", help="MLflow experiment.")
    try:
        config = parser.parse_args(words)
    except Exception as error:
        raise UserError(one_line(str(error))) from error
    if not config.toys and not config.landscapes:
        raise UserError("toys: nothing to draw; list configs under 'toys' or pairs under 'landscapes'")
    name = config.name or "+".join(file.stem for file in config_files(words)) or "figures"
    tracker = MLflowTracker(experiment=config.experiment, run_name=name)
    try:
        text = parser.dump(config, skip_none=False)
        tracker.log_config(text)
        tracker.log_hyperparams({key: value for key, value in yaml.safe_load(text).items() if key != "config"})
        tracker.log_tags(provenance_tags(1))
        print(draw(config, tracker))
    except BaseException:
        tracker.finalize("failed")
        raise
    tracker.finalize("success")
    return 0


def draw(config: Namespace, tracker: MLflowTracker) -> str:
    """Every figure, and one table of the toys; what to tell the user."""
    rows, lines = [], []
    for file in config.toys:
        toy, name = solve(file), Path(file).stem
        found = numbers_of(toy)
        rows += [[name, *row] for row in table_rows(toy)]
        tracker.log_metrics({f"{name}/{key}": value for key, value in found.items()})
        log_toy(tracker, toy, name)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
        lines.append(f"  {name:<28} {shown}")
    if rows:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [["toy", "latent", "feature", "decoder", "encoder", "b_dec"], *rows]
        )
        tracker.log_text(text.getvalue(), "toys.csv")
    if config.landscapes:
        tracker.log_figure(landscapes(config), "figures/loss_landscapes.png")
    return "\n".join([f"run {tracker.run_id}: {len(config.toys)} toys", *lines, "look at it: hedgelab ui"])


def solve(file: str) -> Toy:
    """The SAE of a toy config at its population optimum: same features, start and loss, without sampling noise.

    Raises:
        UserError: There is no such file, or it is no toy's.
    """
    tree = compose(["--config", file])
    seed = int(tree.get("seed_everything", 0))
    data = _make("data", tree, {"sampling": "population", "dtype": "float64", "seed": seed}, file)
    if not isinstance(data, ToyDataModule):
        raise UserError(f"toys: {file} trains on {type(data).__name__}, expected a ToyDataModule")
    batch = data.batch("train", 0)
    sae = _make("model", tree, {"d_in": data.d_in}, file, seed).double()
    sae.initialize(batch, data.feature_directions)
    start = time.perf_counter()
    minimum = minimise(sae, batch)
    return Toy(sae, batch, data.feature_directions, minimum, time.perf_counter() - start)


def numbers_of(toy: Toy) -> dict[str, float]:
    """Loss, time, convergence; for a single latent the distance of its loss and direction to the nearest closed form."""
    numbers = {"loss": toy.minimum.loss, "gradient": toy.minimum.gradient, "seconds": toy.seconds}
    if toy.sae.d_sae == 1 and isinstance(toy.sae, hedgelab.saes.VanillaSAE) and toy.batch.features is not None:
        population = Population.from_batch(Batch(toy.batch.features, None, toy.batch.weight))
        direction = decoder_cosines(toy.sae.folded().W_dec, toy.directions)[0].numpy()
        known = minima(population, toy.sae.l1_coefficient)
        nearest = min(known, key=lambda one: float(np.abs(one.direction - direction).max()))
        numbers["distance_to_closed_form"] = float(np.abs(nearest.direction - direction).max())
        numbers["loss_above_closed_form"] = toy.minimum.loss - nearest.loss
    return numbers


def table_rows(toy: Toy) -> list[list[Any]]:
    """Latent, feature, decoder cosine, encoder cosine, decoder bias along the feature."""
    folded = toy.sae.folded()
    decoder, encoder = decoder_cosines(folded.W_dec, toy.directions), encoder_cosines(folded.W_enc, toy.directions)
    bias = toy.directions @ folded.b_dec
    return [
        [i, j, f"{decoder[i, j]:.7g}", f"{encoder[i, j]:.7g}", f"{bias[j]:.7g}"]
        for i in range(len(decoder))
        for j in range(len(bias))
    ]


def log_toy(tracker: MLflowTracker, toy: Toy, name: str) -> None:
    """The paper's heatmaps, and the decoder bias."""
    folded = toy.sae.folded()
    cosines = decoder_cosines(folded.W_dec, toy.directions), encoder_cosines(folded.W_enc, toy.directions)
    tracker.log_figure(cosine_heatmaps(*cosines), f"figures/{name}/cosines.png")
    tracker.log_figure(
        decoder_bias(toy.directions @ folded.b_dec, float(folded.b_dec.norm())), f"figures/{name}/b_dec.png"
    )


def landscapes(config: Namespace) -> Any:
    """The paper's theory figure."""
    t = np.linspace(0, 1, 401)
    return loss_landscapes(
        t,
        {
            f"P(f0 alone) = {first:g}, P(both) = {both:g}": {
                f"λ = {l1:g}": tied_loss(t, first, both, l1, config.norm) for l1 in config.l1_coefficients
            }
            for first, both in config.landscapes
        },
    )


def _make(section: str, tree: Tree, arguments: Tree, file: str, seed: int | None = None) -> Any:
    """The object that one section of a fit config describes, with some arguments put in."""
    parser = ArgumentParser(exit_on_error=False)
    base = {"data": ActivationDataModule, "model": SAE}[section]
    parser.add_subclass_arguments(base, section, required=True)
    node = tree.get(section)
    if not isinstance(node, dict) or "class_path" not in node:
        raise UserError(f"toys: {file} has no '{section}' with a class_path")
    arguments = {**node.get("init_args", {}), **arguments}
    if seed is not None:
        owner = arguments["inner"]["init_args"] if "inner" in arguments else arguments
        owner["init"] = {**owner.get("init", {}), "seed": seed}
    try:
        parsed = parser.parse_object({section: {**node, "init_args": arguments}})
    except Exception as error:
        raise UserError(f"toys: {file}: {one_line(str(error))}") from error
    return parser.instantiate(parsed)[section]
