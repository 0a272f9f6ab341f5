"""``hedgelab compare`` and ``hedgelab report`` on a small store."""

import base64
import re
from html.parser import HTMLParser

import pytest

from hedgelab.cli import main
from hedgelab.plots.training import loss_terms
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.runs import list_runs
from hedgelab.tracking.store import create_database


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two runs of an experiment, one with a part, and one run elsewhere."""
    folder = tmp_path_factory.mktemp("store")
    create_database(folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    for name, k, experiment in (("narrow", 3, "toys"), ("wide <&>", 5, "toys"), ("elsewhere", 7, "other")):
        tracker = MLflowTracker(experiment, run_name=name, uri=uri, description="Shows <b>nothing</b> & all.")
        tracker.log_hyperparams({"model": {"k": k, "class_path": "hedgelab.saes.TopKSAE"}, "name": name, "seed": 0})
        tracker.log_config(f"model:\n  k: {k}\n")
        for step in (10, 20, 30):
            tracker.log_metrics({"train/loss": 1 / step, "val/explained_variance": step / 40 + k / 100}, step)
            tracker.log_metrics({"system/cpu": 1.0, "latent0/decoder_cos/feature0": 0.5}, step)
        tracker.log_figure(loss_terms({"loss": ([1, 2], [2.0, 1.0])}), "figures/loss_terms.png")
        if k == 3:
            part = tracker.child("part", {})
            part.log_metrics({"val/explained_variance": 0.1}, 1)
            part.finalize("success")
        tracker.finalize("success")
    return uri


@pytest.fixture
def here(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_compare_shows_what_differs(here, capsys):
    assert main(["compare", "narrow", "wide <&>", "--to", "curves.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["narrow", "wide", "<&>"]
    rows = {line.split("  ")[0]: line.split() for line in lines}
    assert rows["model.k"] == ["model.k", "3", "5"]
    assert rows["expl. var."][-2:] == ["0.78", "0.8"]
    assert not {"seed", "name", "model.class_path"} & set(rows)
    assert not any("system" in line or "latent0" in line for line in lines)
    assert (here / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_compare_refuses(here, capsys):
    assert main(["compare", "narrow", "nonsuch"]) == 2
    assert "no run 'nonsuch'" in capsys.readouterr().err
    assert main(["compare", "narrow", "--metrics", "val/nothing"]) == 2
    assert "none of the runs has 'val/nothing'" in capsys.readouterr().err
    (here / "taken.png").touch()
    assert main(["compare", "narrow", "--to", "taken.png"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


class Page(HTMLParser):
    """Checks that tags nest, and collects text and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.addresses, self.tables = [], [], [], 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.addresses += [value for key, value in attrs if key in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_is_one_self_contained_file(here, capsys):
    assert main(["report", "--experiment", "toys", "--to", "report.html"]) == 0
    text = (here / "report.html").read_text()
    page = Page(text)
    said = " ".join(page.text)
    assert {"narrow", "wide <&>", "part"} <= {part.strip() for part in page.text}
    assert "Shows <b>nothing</b> & all." in said
    assert "elsewhere" not in said
    assert "model:\n  k: 3" in said
    images = [address for address in page.addresses if address.startswith("data:image/png;base64,")]
    assert len(images) == 3  # two runs' figures, and the curves
    assert all(base64.b64decode(one.split(",")[1]).startswith(b"\x89PNG") for one in images)
    others = [address for address in page.addresses if address not in images]
    assert others
    assert all(address.startswith(("#", "http://127.0.0.1:5000/#/experiments/")) for address in others)
    ids = set(re.findall(r'id="([0-9a-f]{32})"', text))
    assert {address[1:] for address in others if address.startswith("#")} == ids
    assert "<script" not in text


def test_report_is_kept_in_one_run_that_is_no_run_of_anything(here, capsys):
    newest = list_runs("toys", last=True)[0].name
    for _ in range(2):
        assert main(["report", "--experiment", "toys"]) == 0
    kept = [run for run in list_runs("toys") if run.name == "report"]
    assert len(kept) == 1
    assert f"report.html in run {kept[0].run_id}" in capsys.readouterr().out
    assert list_runs("toys", last=True)[0].name == newest


def test_report_refuses(here, capsys):
    assert main(["report", "--experiment", "nonsuch"]) == 2
    assert "no 'nonsuch' in the store" in capsys.readouterr().err
    assert main(["report", "--experiment", "Default"]) == 2
    assert "'Default' has no runs yet" in capsys.readouterr().err


EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)> $\\\\frac{$ \x1b[31m"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Runs whose every word is someone's attempt at the reader's browser, and whose config names a password."""
    folder = tmp_path_factory.mktemp("hostile")
    create_database(folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    for number in range(2):
        tracker = MLflowTracker(
            f"evil {EVIL}", run_name=f"{number} {EVIL}", uri=uri, description=EVIL, tags={"why": EVIL, "git_commit": EVIL}
        )
        tracker.log_hyperparams({"model": {"class_path": f"{number} {EVIL}", EVIL: number}})
        tracker.log_config(f"x: </pre>{EVIL}\nuri: http://user:secret@127.0.0.1:5000/\n")
        for step in range(3):
            tracker.log_metrics({"train/loss": number + step, "val/explained_variance": 0.1 * step, EVIL: 1.0}, step)
        tracker.log_figure(loss_terms({EVIL.replace("/", ""): ([1, 2], [2.0, 1.0])}), "figures/loss.png")
        tracker.finalize("success")
    return uri


def test_no_word_of_a_run_becomes_part_of_the_page(hostile, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", hostile)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--experiment", f"evil {EVIL}", "--to", "report.html"]) == 0, capsys.readouterr().err
    text = (tmp_path / "report.html").read_text()

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("script", "iframe", "object", "base", "form")
            assert not any(key.startswith("on") for key, _ in attrs)
            assert not any("javascript:" in (value or "") for _, value in attrs)

    Tags().feed(text)
    assert "alert(1)" in text
    assert "secret" not in text
    assert main(["compare", "last", list_runs()[-1].run_id[:8], "--to", "curves.png"]) == 0
    assert main(["runs"]) == 0
    assert "\x1b" not in capsys.readouterr().out
