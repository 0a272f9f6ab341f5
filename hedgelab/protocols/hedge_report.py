"""What a run of the hedging degree leaves behind: numbers with their spread, the distribution over latents, figures."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping

from hedgelab.metrics.functional.degree import DegreeScores
from hedgelab.plots.hedging import degree_and_baselines, projection_of_latents
from hedgelab.tracking import MLflowTracker


def summary_numbers(scores: Mapping[int, DegreeScores]) -> dict[str, float]:
    """``hedging/...``: means over seeds; with several seeds also ``..._seed_std`` and every seed's own numbers."""
    by_seed = {seed: result.scalars() for seed, result in scores.items()}
    numbers: dict[str, float] = {}
    for name in dict.fromkeys(name for values in by_seed.values() for name in values):
        values = [own[name] for own in by_seed.values() if name in own]
        numbers[f"hedging/{name}"] = statistics.fmean(values)
        if len(by_seed) > 1:
            numbers[f"hedging/{name}_seed_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
            numbers |= {f"hedging/seed{seed}/{name}": own[name] for seed, own in by_seed.items() if name in own}
    return numbers


def latents_table(scores: Mapping[int, DegreeScores]) -> str:
    """One CSV line a latent: how far it moved, how much of it into the new latents' span, its cosine, whether it lives."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["seed", "latent", "projection", "delta_norm", "cosine", "live"])
    for seed, result in scores.items():
        columns = (result.projections, result.delta_norms, result.cosines, result.live.int())
        for latent, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            writer.writerow([seed, latent, *(f"{value:.6g}" for value in row)])
    return text.getvalue()


def record(tracker: MLflowTracker, scores: Mapping[int, DegreeScores], step: int) -> None:
    """Put everything into the parent run."""
    numbers = summary_numbers(scores)
    tracker.log_metrics(numbers, step)
    tracker.log_text(latents_table(scores), "hedging/latents.csv")
    by_seed = [result.scalars() for result in scores.values()]
    tracker.log_figure(degree_and_baselines(by_seed), "figures/hedging_degree.png")
    projections = [result.projections.tolist() for result in scores.values()]
    noise = numbers.get("hedging/noise_floor")
    tracker.log_figure(
        projection_of_latents(projections, numbers["hedging/baseline"], noise), "figures/hedging_by_latent.png"
    )
