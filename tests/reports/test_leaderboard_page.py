"""The page of a leaderboard: what is in it, in which order, and what it makes of names that are meant to do harm."""

import re
from html.parser import HTMLParser

from hedgelab.reports.leaderboard import Entry, best_control, page, ranked

SCORES = {"probing/f1_k1": "probing F1, k = 1 ↑", "absorption/full": "full absorption ↓"}
EVIL = '<script>alert("x")</script> & "q"'


def entry(name, f1, noise=0.01, control="", reads="m 1", **more):
    return Entry(name, "TopK", control, reads, 8, {"probing/f1_k1": f1, "probing/f1_k1_noise": noise, **more})


BOARD = [
    entry("young", 0.52), entry("good", 0.9, **{"absorption/full": 0.3}), entry("ice", 0.5, control="frozen decoder"),
    entry("cone", 0.45, control="soft-frozen decoder"), entry("truth", 1.0, control="oracle"),
    Entry("empty", "TopK", "", "m 1", 8, {}),
]  # fmt: skip


class Table(HTMLParser):
    """The cells of the page's table, by row, and its tags."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def made(entries=BOARD, sort="probing/f1_k1", missing=None):
    return page("Board", "About it.", entries, SCORES, sort, missing or {})


def test_rows_are_sorted_and_have_intervals():
    head, best, *rows = Table(made()).rows
    assert head[5:] == list(SCORES.values())
    assert [row[0] for row in rows[:5]] == ["truth", "good", "young", "ice", "cone"]
    assert rows[5][5].strip() == ""
    assert rows[1][5] == "0.9 ± 0.02"
    assert best[0] == "best control"
    assert best[5] == "0.5 ± 0.02"


def test_less_is_better_where_the_title_says_so():
    board = [entry(name, 0.5, **{"absorption/full": value}) for name, value in (("a", 0.3), ("b", 0.1))]
    board.append(entry("c", 0.5))
    assert [one.name for one in ranked(board, "absorption/full", "full absorption ↓")] == ["b", "a", "c"]


def test_scores_that_do_not_beat_the_controls_are_faint():
    faint = [text for kind, text in re.findall(r'<span class="(like)" title="[^"]*">([\d.]+)', made())]
    assert faint == ["0.52"]  # .02 above is less than 1.96 √2 · .01
    assert "not better than ice by more than" in made()


def test_controls_of_other_activations_and_oracles_are_not_compared_with():
    assert best_control(BOARD, "probing/f1_k1", "↑", "m 1").name == "ice"
    assert best_control(BOARD, "probing/f1_k1", "↑", "m 2") is None


def test_the_page_holds_all_that_it_needs_and_escapes_names():
    text = made([entry(EVIL, 0.5, reads=EVIL)], missing={EVIL: EVIL})
    tags = Table(text).tags
    assert sum(tag == "script" for tag, _ in tags) == 1  # its own
    assert not any({"src", "href"} & attrs.keys() for _, attrs in tags)
    assert "http" not in text
    assert Table(text).rows[1][0] == EVIL
    assert "Not on the board" in text
