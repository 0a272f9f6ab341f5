"""``hedgelab figures``: each toy's SAE at its population optimum, and the loss landscapes, as the paper draws them."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hedgelab.config.tree import load
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.errors import UserError
from hedgelab.metrics.functional import decoder_cosines, encoder_cosines
from hedgelab.plots import cosine_heatmaps, decoder_bias
from hedgelab.plots.theory import loss_landscapes
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Row, Study, features_as_x, make_toy
from hedgelab.saes import SAE, VanillaSAE
from hedgelab.theory import Population, minima, minimise, tied_loss


@dataclass(eq=False)
class PaperFigures(Study):
    """Redraw the paper's toy and theory figures, without sampling noise.

    Args:
        toys: Configs of `hedgelab fit`, each trained on its exact population.
        landscapes: Pairs P(f0 alone), P(both), each drawn as a loss landscape.
        l1_coefficients: λ of the landscapes.
        norm: Exponent of the landscapes' penalty λ a^norm.
    """

    experiment = "paper"

    toys: list[str] = field(default_factory=list)
    landscapes: list[tuple[float, float]] = field(default_factory=list)
    l1_coefficients: list[float] = field(default_factory=lambda: [0.0, 0.1])
    norm: float = 1.0

    def __post_init__(self) -> None:
        if not self.toys and not self.landscapes:
            raise UserError("toys: nothing to draw; list configs under 'toys' or pairs under 'landscapes'")

    def run(self, bench: Bench) -> Outcome:
        """Every figure, and one table of the toys."""
        rows: list[Row] = []
        headline = [f"{len(self.toys)} toys"]
        for file in self.toys:
            numbers, components, drawn = solve(file)
            name = Path(file).stem
            rows += [{"toy": name, **row} for row in components]
            metrics = {f"{name}/{key}": value for key, value in numbers.items()}
            bench.keep(Outcome(metrics, figures={f"{name}/{key}": figure for key, figure in drawn.items()}))
            headline.append(f"{name:<28} " + "  ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
        figures, t = {}, np.linspace(0, 1, 401)
        if self.landscapes:
            panels = {
                f"P(f0 alone) = {first:g}, P(both) = {both:g}": {
                    f"λ = {l1:g}": tied_loss(t, first, both, l1, self.norm) for l1 in self.l1_coefficients
                }
                for first, both in self.landscapes
            }
            figures["loss_landscapes.png"] = loss_landscapes(t, panels)
        return Outcome(tables={"toys.csv": rows} if rows else {}, figures=figures, headline=headline)


def solve(file: str) -> tuple[dict[str, float], list[Row], dict[str, Figure]]:
    """The SAE of a toy config at its population optimum: same features, start and loss, without sampling noise.

    Returns:
        Loss, time, convergence, and for a single latent the distance of its loss and direction to the nearest closed form;
        cosines of decoder and encoder and the decoder bias along the feature, for each latent and feature; the paper's figures.
    """
    tree = load(Path(file), "toys")
    for section in ("data", "model"):
        if not isinstance(node := tree.get(section), dict) or "class_path" not in node:
            raise UserError(f"toys: {file} has no '{section}' with a class_path")
    seed = int(tree.get("seed_everything", 0))
    toy = Recipe(ActivationDataModule, tree["data"], f"toys: {file}: data")
    model = Recipe(SAE, tree["model"], f"toys: {file}: model")
    data = make_toy(toy, toy.key, True, sampling="population", dtype="float64", seed=seed)
    sae, batch = Bench(seed).make_sae(model, data), data.batch("train", 0)
    start = time.perf_counter()
    reached = minimise(sae, batch)
    numbers = {"loss": reached.loss, "gradient": reached.gradient, "seconds": time.perf_counter() - start}
    folded, directions = sae.folded(), data.feature_directions
    decoder, encoder = decoder_cosines(folded.W_dec, directions), encoder_cosines(folded.W_enc, directions)
    bias = directions @ folded.b_dec
    if sae.d_sae == 1 and isinstance(sae, VanillaSAE):
        distances = [
            (float(np.abs(one.direction - decoder[0].numpy()).max()), one.loss)
            for one in minima(Population.from_batch(features_as_x(batch)), sae.l1_coefficient)
        ]
        numbers["distance_to_closed_form"], loss = min(distances, key=lambda pair: pair[0])
        numbers["loss_above_closed_form"] = reached.loss - loss
    rows: list[Row] = [
        {"latent": i, "feature": j, "decoder": decoder[i, j].item(), "encoder": encoder[i, j].item(), "b_dec": b.item()}
        for i in range(len(decoder))
        for j, b in enumerate(bias)
    ]
    figures = {"cosines.png": cosine_heatmaps(decoder, encoder), "b_dec.png": decoder_bias(bias, float(folded.b_dec.norm()))}
    return numbers, rows, figures
