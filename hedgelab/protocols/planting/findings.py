"""What the pairs of a trial say: responses by dose, theory, contrasts between doses and widths, and grades of measures."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

from hedgelab.metrics.functional.true_hedging import TRACKING_COSINE
from hedgelab.protocols.planting.measures import MEASURES
from hedgelab.protocols.planting.statistics import (
    Interval,
    auc,
    equivalence_test,
    line_through,
    mean_interval,
    rank_correlation,
    share_above_median,
    sign_flip_test,
)
from hedgelab.protocols.study import Row

MARGIN = 0.03  # shares that differ by less between widths count as the same
GRADED = ("share", "predicted", *MEASURES)  # the truth, what theory makes of it, and what knows neither
_SILENT = "silent"  # the arm of children that fire only without their parent


class Findings(NamedTuple):
    """Numbers for the run, tables, and lines for the terminal."""

    metrics: Mapping[str, float]
    arms: Sequence[Row]
    contrasts: Sequence[Row]
    grades: Sequence[Row]
    headline: Sequence[str]


def findings(rows: Sequence[Row], doses: Sequence[float]) -> Findings:
    """Everything that is made of the pairs (``pairs.csv``), by kind and width of SAE."""
    kinds, widths = (sorted({row[key] for row in rows}) for key in ("kind", "width"))
    cells = {
        (kind, width): [row for row in rows if (row["kind"], row["width"]) == (kind, width)]
        for kind, width in product(kinds, widths)
    }
    metrics: dict[str, float] = {}
    headline: list[str] = []
    for kind in kinds:
        lit = [row for row in rows if row["kind"] == kind and not row["silent"]]
        predicted, share, parent = ([row[key] for row in lit] for key in ("predicted", "share", "parent"))
        line = line_through(predicted, share, parent)
        for name, found in (("slope", line.slope), ("intercept", line.intercept)):
            metrics |= {f"{kind}/{key}": value for key, value in _columns(name, found).items()}
        metrics[f"{kind}/r"] = line.r
        theory = f"{_shown(line.intercept)} + {_shown(line.slope)} x predicted, r = {line.r:.2f}"
        headline.append(f"{kind}: share = {theory}")
    arms = [row for (kind, width), own in cells.items() for row in _arms(kind, width, own, doses)]
    swapped = [(low, high) for low, high in zip(doses, reversed(doses), strict=True) if low < high]
    contrasts = [
        _contrast(kind, width, f"dose {high:g} against {low:g}", _changes(own, high, low))
        for (kind, width), own in cells.items() for low, high in swapped
    ]  # fmt: skip
    for one, ((kind, width), _) in zip(contrasts[:: len(swapped)], cells.items(), strict=True):
        own = [row for row in arms if (row["kind"], row["width"]) == (kind, width)]
        responses = "  ".join(f"{row['dose']}: {row['share']:+.3f}" for row in own)
        found = Interval(one["difference"], one["difference_low"], one["difference_high"], one["parents"])
        headline.append(f"{kind}, {width} latents: share by dose  {responses}")
        headline.append(f"    {one['what']}: {_shown(found)}, p = {one['p']:.2g}")
    contrasts += [
        _contrast(kind, wide, f"width {wide} against {narrow}, dose {dose:g}", _over_width(rows, kind, narrow, wide, dose))
        for kind, (narrow, wide), dose in product(kinds, pairwise(widths), doses[1:])
    ]  # fmt: skip
    grades = [grade(kind, width, own, key, doses) for (kind, width), own in cells.items() for key in GRADED]
    metrics |= {f"{row['kind']}/{row['width']}/auc/{row['measure']}": row["auc"] for row in grades}
    return Findings(metrics, arms, contrasts, grades, headline)


def _arms(kind: str, width: int, rows: Sequence[Row], doses: Sequence[float]) -> Iterator[Row]:
    """A row an arm, silent ones last: means over parents, and those of children without a latent of their own."""
    for dose in [*doses, _SILENT]:
        arm = [row for row in rows if (_SILENT if row["silent"] else row["dose"]) == dose]
        if not arm:
            continue
        share, predicted = (mean_interval([*of_parents(arm, key).values()]) for key in ("share", "predicted"))
        alone = mean_interval([*of_parents([row for row in arm if not row["has_latent"]], "share").values()])
        yield {
            "kind": kind, "width": width, "dose": dose, "parents": share.n, **_columns("share", share),
            "predicted": predicted.mean, "child_has_latent": float(np.mean([row["has_latent"] for row in arm])),
            "parent_tracked": float(np.mean([row["parent_cosine"] >= TRACKING_COSINE for row in arm])),
            "parents_without": alone.n, **_columns("share_without_latent", alone),
        }  # fmt: skip


def _contrast(kind: str, width: int, what: str, changes: Sequence[float]) -> Row:
    found = mean_interval(changes)
    tests = {"p": sign_flip_test(changes), "p_equivalent": equivalence_test(changes, MARGIN)}
    return {"kind": kind, "width": width, "what": what, "parents": found.n, **_columns("difference", found), **tests}


def of_parents(rows: Sequence[Row], key: str) -> dict[int, float]:
    """The mean of each parent's values of a column, over the SAEs that show them; not of those that are not known (NaN)."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if np.isfinite(number := float(row[key])):
            found.setdefault(row["parent"], []).append(number)
    return {parent: float(np.mean(values)) for parent, values in found.items()}


def grade(kind: str, width: int, rows: Sequence[Row], measure: str, doses: Sequence[float]) -> Row:
    """How well a measure of latents knows what the lot did, and how well it agrees with itself; means over SAEs.

    Can it tell parents of the upper half of doses from those of the lowest (AUC; ``false_positives``: of the lowest, the share
    above the median of the upper)? Does it rise with the dose (Spearman), and with the share itself (``validity``)? How noisy
    is it: ``noise`` is the standard error of an SAE's mean, by how the halves of the measuring batches differ, in units of that
    mean, ``discriminability`` the spread of these means between SAEs in units of that error. Both are NaN where a measure is
    made of decoders alone. Not a number of the parents decides who is compared: those that share a latent, too, are in.
    """
    scores: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if not row["silent"]:
            scores.setdefault((row["data"], row["seed"]), []).append(row)
    found: list[tuple[float, ...]] = []
    means, noises = [], []
    for own in scores.values():
        upper = [row[measure] for row in own if row["dose"] in doses[len(doses) // 2 :]]
        lowest = [row[measure] for row in own if row["dose"] == doses[0]]
        values = [row[measure] for row in own]
        above = (
            rank_correlation([row["dose"] for row in own], values),
            rank_correlation([row["share"] for row in own], values),
        )
        found.append((auc(upper, lowest), share_above_median(lowest, upper), *above))
        means.append(mean_interval(values).mean)
        noises.append(mean_interval([row.get(f"{measure}/noise", np.nan) for row in own]).mean)
    areas, false, ranks, validity = (mean_interval(values) for values in zip(*found, strict=True))
    noise = float(np.sqrt(np.mean(np.square(noises)))) if any(noises) else np.nan
    return {
        "kind": kind,
        "width": width,
        "measure": measure,
        "saes": areas.n,
        **_columns("auc", areas),
        "false_positives": false.mean,
        **_columns("spearman", ranks),
        "validity": validity.mean,
        "noise": noise / abs(np.mean(means)),
        "discriminability": float(np.std(means, ddof=1)) / noise if len(means) > 1 else np.nan,
    }


def _changes(rows: Sequence[Row], high: float, low: float) -> list[float]:
    """Of each parent that had both doses: its share under the high less that under the low, means over SAEs."""
    lit = [row for row in rows if not row["silent"]]
    more, less = (of_parents([row for row in lit if row["dose"] == dose], "share") for dose in (high, low))
    return [more[parent] - less[parent] for parent in sorted(more.keys() & less.keys())]


def _over_width(rows: Sequence[Row], kind: str, narrow: int, wide: int, dose: float) -> list[float]:
    """Of each parent whose child has no latent at either width: share at the wide less that at the narrow."""
    places: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        if row["kind"] == kind and row["dose"] == dose and not row["silent"] and not row["has_latent"]:
            places.setdefault((row["parent"], row["data"], row["seed"]), {})[row["width"]] = row["share"]
    both = [
        {"parent": key[0], "change": of[wide] - of[narrow]} for key, of in places.items() if {narrow, wide} <= of.keys()
    ]
    return list(of_parents(both, "change").values())


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"
