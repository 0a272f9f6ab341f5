"""What the pairs of a trial say: responses by dose, theory, contrasts between doses and widths, and grades of measures."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

from hedgelab.metrics.functional.true_hedging import TRACKING_COSINE
from hedgelab.protocols.planting import statistics
from hedgelab.protocols.planting.measures import MEASURES
from hedgelab.protocols.planting.statistics import Interval, mean_interval
from hedgelab.protocols.study import Row

MARGIN = 0.03  # shares that differ by less between widths count as the same
GRADED = ("share", "predicted", *MEASURES)  # the truth, what theory makes of it, and what knows neither
_PLACE = ("data", "kind", "width", "seed")
_SILENT = "silent"  # the arm of children that fire only without their parent


class Findings(NamedTuple):
    """Numbers for the run, tables, and lines for the terminal."""

    metrics: Mapping[str, float]
    tables: Mapping[str, Sequence[Row]]
    headline: Sequence[str]


def findings(rows: Sequence[Row], saes: Sequence[Row], doses: Sequence[float]) -> Findings:
    """Everything that is made of the pairs and of the SAEs as a whole, by kind and width of SAE.

    Kinds are compared with the first of them, on the same parents (data set, seed): in shares, and in what the SAE costs.
    """
    kinds, widths = list(dict.fromkeys(row["kind"] for row in rows)), sorted({row["width"] for row in rows})
    cells = {
        (kind, width): [row for row in rows if (row["kind"], row["width"]) == (kind, width)]
        for kind, width in product(kinds, widths)
    }
    metrics: dict[str, float] = {}
    headline: list[str] = []
    for kind in kinds:
        lit = [row for row in rows if row["kind"] == kind and not row["silent"]]
        predicted, share, parent = ([row[key] for row in lit] for key in ("predicted", "share", "parent"))
        line = statistics.line_through(predicted, share, parent)
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
    for kind, (narrow, wide), dose in product(kinds, pairwise(widths), doses[1:]):
        alone = [row for row in rows if (row["kind"], row["dose"]) == (kind, dose) and not row["has_latent"]]
        what = f"width {wide} against {narrow}, dose {dose:g}"
        contrasts.append(_contrast(kind, wide, what, _paired(alone, "width", narrow, wide)))
    for kind, width, dose in product(kinds[1:], widths, doses[1:]):
        same = [row for row in rows if (row["width"], row["dose"]) == (width, dose)]
        what = f"{kind} against {kinds[0]}, dose {dose:g}"
        contrasts.append(_contrast(kind, width, what, _paired(same, "kind", kinds[0], kind)))
        if dose == doses[-1]:
            headline.append(f"{what}, {width} latents: {_shown(mean_interval(_paired(same, 'kind', kinds[0], kind)))}")
    grades = [grade(kind, width, own, key, doses) for (kind, width), own in cells.items() for key in GRADED]
    metrics |= {f"{row['kind']}/{row['width']}/auc/{row['measure']}": row["auc"] for row in grades}
    levels = [row for (kind, width), own in cells.items() for row in _levels(kind, width, own, doses)]
    tables: dict[str, Sequence[Row]] = {"arms": arms, "contrasts": contrasts, "levels": levels}
    return Findings(metrics, tables | {"costs": _costs(saes, kinds), "grades": grades}, headline)


def _costs(saes: Sequence[Row], kinds: Sequence[str]) -> list[Row]:
    """Numbers of SAEs as a whole, means by kind and width; and how far from the first kind's, of the same data and seed.

    Those of SAEs that untouched activations trained are for themselves: planting must not change what an SAE does elsewhere.
    """
    costs: list[Row] = []
    by_place: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in saes:
        by_place.setdefault((row["data"], row["width"], row["seed"]), {})[row["kind"]] = row
    places = {(place[0] == "untouched", place[1]) for place in by_place}
    for (untouched, width), kind in product(sorted(places), kinds):
        own = [of for place, of in by_place.items() if (place[0] == "untouched", place[1]) == (untouched, width)]
        for number in dict.fromkeys(name for of in own for name in of[kind] if name not in _PLACE):
            values = [of[kind][number] for of in own]
            found = mean_interval(values)
            change = mean_interval([of[kind][number] - of[kinds[0]][number] for of in own])
            data = "untouched" if untouched else "planted"
            costs.append(
                {"data": data, "kind": kind, "width": width, "number": number, "saes": found.n, "mean": found.mean,
                 **_columns("difference", change)}
            )  # fmt: skip
    return costs


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


def _levels(kind: str, width: int, rows: Sequence[Row], doses: Sequence[float]) -> Iterator[Row]:
    """A row for a dose in a level of a matryoshka SAE, by the level of the parent's latent."""
    lit = [row for row in rows if not row["silent"]]
    for level, dose in product(sorted({row["level"] for row in rows}), doses):
        found = mean_interval(
            [*of_parents([row for row in lit if (row["dose"], row["level"]) == (dose, level)], "share").values()]
        )
        if found.n:
            yield {"kind": kind, "width": width, "level": level, "dose": dose, "parents": found.n, **_columns("share", found)}


def _contrast(kind: str, width: int, what: str, changes: Sequence[float]) -> Row:
    found = mean_interval(changes)
    tests = {"p": statistics.sign_flip_test(changes), "p_equivalent": statistics.equivalence_test(changes, MARGIN)}
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
    above the median of the upper)? Is it higher for a parent at the largest dose than for the *same* parent at the smallest, in
    the other data set, so that what parents hedge by nature cancels (``paired``: the share of parents; half is chance)? Does it
    rise with the dose (Spearman), and with the share itself (``validity``)? How noisy is it: ``noise`` is the standard error
    of an SAE's mean, by how the halves of the measuring batches differ, in units of that mean, ``discriminability`` the
    spread of these means between SAEs in units of that error. Both are NaN where a measure is made of decoders alone. Not a
    number of the parents decides who is compared: those that share a latent, too, are in.
    """
    scores: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if not row["silent"]:
            scores.setdefault((row["data"], row["seed"]), []).append(row)
    found: list[tuple[float, ...]] = []
    means, noises = [], []
    rises = [(1 + np.sign(change)) / 2 for change in _changes(rows, doses[-1], doses[0], measure)]
    for own in scores.values():
        upper = [row[measure] for row in own if row["dose"] in doses[len(doses) // 2 :]]
        lowest = [row[measure] for row in own if row["dose"] == doses[0]]
        values = [row[measure] for row in own]
        ranks = (statistics.rank_correlation([row[key] for row in own], values) for key in ("dose", "share"))
        found.append((statistics.auc(upper, lowest), statistics.share_above_median(lowest, upper), *ranks))
        means.append(mean_interval(values).mean)
        noises.append(mean_interval([row.get(f"{measure}/noise", np.nan) for row in own]).mean)
    areas, false, spearman, validity = (mean_interval(values) for values in zip(*found, strict=True))
    noise = float(np.sqrt(np.mean(np.square(noises)))) if any(noises) else np.nan
    return {
        "kind": kind, "width": width, "measure": measure, "saes": areas.n, **_columns("auc", areas),
        **_columns("paired", mean_interval(rises)), "false_positives": false.mean,
        **_columns("spearman", spearman), "validity": validity.mean, "noise": noise / abs(np.mean(means)),
        "discriminability": float(np.std(means, ddof=1)) / noise if len(means) > 1 else np.nan,
    }  # fmt: skip


def _changes(rows: Sequence[Row], high: float, low: float, key: str = "share") -> list[float]:
    """Of each parent that had both doses: a column under the high less that under the low, means over SAEs."""
    lit = [row for row in rows if not row["silent"]]
    more, less = (of_parents([row for row in lit if row["dose"] == dose], key) for dose in (high, low))
    return [more[parent] - less[parent] for parent in sorted(more.keys() & less.keys())]


def _paired(rows: Sequence[Row], key: str, one: Any, other: Any) -> list[float]:
    """Of each treated parent: its share where ``key`` is ``other`` less where it is ``one``, of one data set and seed."""
    places: dict[tuple[Any, ...], dict[Any, float]] = {}
    for row in rows:
        if not row["silent"]:
            place = row["parent"], row["data"], row["seed"], *(row[name] for name in ("kind", "width") if name != key)
            places.setdefault(place, {})[row[key]] = row["share"]
    both = [{"parent": at[0], "change": of[other] - of[one]} for at, of in places.items() if {one, other} <= of.keys()]
    return list(of_parents(both, "change").values())


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"
