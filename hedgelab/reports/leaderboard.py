"""A leaderboard as one HTML page: SAEs down, scores across, with intervals, and what the best control reaches.

Everything is inside the page, which can be read without its script: that sorts by the column whose head is clicked, and
filters.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from hedgelab.glossary import bare, term
from hedgelab.reports.report import STYLE, table_of
from hedgelab.tracking.listing import number

WIDTH = 1.96  # standard errors on each side of a 95 % interval
_STYLE = """
body { max-width: none } .scroll { max-height: none } .like { opacity: .5 } td:last-child { white-space: nowrap }
th { cursor: pointer; vertical-align: bottom; max-width: 8rem; white-space: normal } .fixed td { border-bottom-width: 3px }
th[aria-sort=descending]::after { content: " ▾" } th[aria-sort=ascending]::after { content: " ▴" }
input { font: inherit; padding: .3rem .6rem; width: 24rem; max-width: 100% }
"""
_SCRIPT = """
const table = document.querySelector("table"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
const key = (row, i) => {
  const text = row.cells[i].textContent.trim(), value = parseFloat(text.replaceAll(",", ""));
  return heads[i].className != "n" ? text.toLowerCase() : isNaN(value) ? null : value;
};
heads.forEach((head, i) => head.addEventListener("click", () => {
  const before = head.getAttribute("aria-sort"), rises = head.className == "n" && !head.textContent.trim().endsWith("↓");
  const down = before ? before == "ascending" : rises;
  heads.forEach(one => one.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const order = (a, b) => a === null || b === null ? (a === null) - (b === null) : (a < b ? -1 : a > b) * (down ? -1 : 1);
  body.append(...[...body.rows].sort((one, other) => order(key(one, i), key(other, i))));
}));
document.querySelector("input").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const row of body.rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
});
"""
_NOTE = """± is half a 95 % interval of the measurement alone (other text, other splits), rough where splits are few. Faint: not
better than the best control by more than the noise of both. ↑ more is better, ↓ less is; a click on a head sorts."""


class Entry(NamedTuple):
    """An SAE on the board: what kind it is, which control (empty for none), and of what activations; scores and their noise."""

    name: str
    kind: str
    control: str
    reads: str
    d_sae: int
    metrics: Mapping[str, float]  # standard errors of scores are called <score>_noise


def ranked(entries: Sequence[Entry], score: str, title: str) -> list[Entry]:
    """The entries, best first by a score whose title says which end is better (↑, ↓); those that lack it come last."""
    sign = 1 if title.endswith("↓") else -1
    return sorted(entries, key=lambda one: sign * one.metrics[score] if score in one.metrics else math.inf)


def best_control(entries: Sequence[Entry], score: str, title: str, reads: str) -> Entry | None:
    """The control of these activations with the best score; an oracle is none that could be beaten."""
    controls = [one for one in entries if one.control not in ("", "oracle") and one.reads == reads and score in one.metrics]
    return next(iter(ranked(controls, score, title)), None)


def above(one: Entry, control: Entry, score: str, title: str) -> bool:
    """Whether a score is better than a control's by more than the noise of both, ``1.96 √(e₁² + e₂²)``.

    >>> trained, frozen = (Entry("", "", "", "", 1, {"s": s, "s_noise": 0.1}) for s in (0.9, 0.6))
    >>> above(trained, frozen, "s", "S ↑"), above(trained, frozen, "s", "S ↓")
    (True, False)
    """
    lead = (one.metrics[score] - control.metrics[score]) * (-1 if title.endswith("↓") else 1)
    return lead > WIDTH * math.hypot(*(entry.metrics.get(f"{score}_noise", 0.0) for entry in (one, control)))


def page(
    title: str, about: str, entries: Sequence[Entry], scores: Mapping[str, str], sort: str, missing: Mapping[str, str]
) -> str:
    """The page of a board, sorted by one of the ``scores`` (titles by metric); ``missing``: why SAEs are not on it."""

    def shown(one: Entry | None, score: str) -> str:
        if one is None or score not in one.metrics:
            return ""
        noise = one.metrics.get(f"{score}_noise")
        half = "" if noise is None else f' <span class="muted">± {WIDTH * noise:.2g}</span>'
        control = None if one.control else best_control(entries, score, scores.get(score, ""), one.reads)
        if score not in scores or control is None or above(one, control, score, scores[score]):
            return f"{number(one.metrics[score])}{half}"
        why = f"not better than {control.name} by more than the noise of both"
        return f'<span class="like" title="{escape(why)}">{number(one.metrics[score])}{half}</span>'

    meanings = {score: known.meaning if (known := term(bare(score))) else score for score in scores}
    head = ["SAE", "kind", "reads", "latents", "L0"]
    head += [f'<span title="{escape(meanings[score])}">{escape(text)}</span>' for score, text in scores.items()]
    rows, fixed = [], []
    for one in ranked(entries, sort, scores[sort]):
        kind = f"{one.kind}, {one.control} (control)" if one.control else one.kind
        row = [*map(escape, (one.name, kind, one.reads)), number(one.d_sae)]
        rows.append([*row, *(shown(one, score) for score in ("density/l0", *scores))])
    for reads in dict.fromkeys(one.reads for one in entries if one.control not in ("", "oracle")):
        best = [shown(best_control(entries, score, text, reads), score) for score, text in scores.items()]
        fixed.append(["<i>best control</i>", "", escape(reads), "", "", *best])
    absent = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in missing.items())
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{STYLE}{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1><p>{escape(about)}</p>",
        '<p><input type="search" aria-label="filter" placeholder="filter: words that a row must hold"></p>',
        table_of(head, rows, head.index("latents"), fixed),
        f'<p class="muted">{_NOTE}</p>',
        f"<h2>Not on the board</h2><ul>{absent}</ul>" if absent else "",
        f"<script>{_SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(parts)
