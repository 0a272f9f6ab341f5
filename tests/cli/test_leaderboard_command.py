"""``hedgelab leaderboard``, and controls beside scores, on toys."""

import json
from pathlib import Path

import pytest
import yaml

from hedgelab.cli import main
from hedgelab.config.tree import opening_comment

BOARDS = [
    file
    for file in sorted((Path(__file__).parents[2] / "configs/leaderboard").glob("*.yaml"))
    if "saes" in yaml.safe_load(file.read_text())
]
SWEEP = """\
sweep:
  lines:
    TopK: {}
    frozen: {set: {model.mitigations: [{class_path: FrozenDecoder}]}}
"""


@pytest.mark.parametrize("file", BOARDS, ids=lambda file: file.stem)
def test_shipped_boards_list_their_saes(file, capsys):
    assert main(["leaderboard", "--config", str(file), "--list"]) == 0
    named = capsys.readouterr().out.splitlines()
    assert len(named) >= 4
    assert all(line.startswith("saelens:") or "smollm2_saes.yaml" in line for line in named)
    assert len(opening_comment([file])) > 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: x\n", "saes: expected a list of SAEs"),
        ("saes: [1]\n", "saes: expected a list of SAEs"),
        ("saes: [x]\nsweets: 1\n", "sweets: unknown key"),
    ],
)
def test_mistakes_in_a_board_are_one_line(text, message, tmp_path, capsys):
    (tmp_path / "b.yaml").write_text(text)
    assert main(["leaderboard", "--config", str(tmp_path / "b.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_a_board_needs_a_config(capsys):
    assert main(["leaderboard", "--list"]) == 2
    assert "--config: name the file of a board" in capsys.readouterr().err


def listed(capsys, *words):
    capsys.readouterr()
    assert main(["runs", "--json", "--limit=50", *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_board_of_a_toy_with_controls_and_its_oracle(config, capsys, tmp_path):
    (tmp_path / "grid.yaml").write_text(config + SWEEP + "experiment: board\n")
    board = "saes: [grid.yaml, 'saelens:no/such']\nsuites: [density, truth]\nexperiment: board\nrows: 64\ntruth_batches: 2\n"
    (tmp_path / "b.yaml").write_text("# A board.\n" + board + "sort: truth/mcc\n")
    command = ["leaderboard", "--config", "b.yaml", "--trainer.enable_progress_bar=false"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "density: 3 SAEs in" in printed
    assert "saelens:no/such: left out; " in printed
    text = (tmp_path / "runs/reports/leaderboard_b.html").read_text()
    assert "frozen decoder (control)" in text
    assert text.index("<td>oracle</td>") < text.index("TopK</td>")  # the best by MCC
    runs = {run["name"]: run for run in listed(capsys, "--experiment=board")}
    assert runs["oracle"]["metrics"]["truth/mcc"] == pytest.approx(1)
    assert runs["oracle"]["tags"]["hedgelab.control"] == "oracle"
    frozen = next(run for name, run in runs.items() if "frozen" in name)
    assert frozen["tags"]["hedgelab.control"] == "frozen decoder"
    folder = tmp_path / "runs/artifacts/board" / runs["b"]["run_id"] / "artifacts"
    assert (folder / "leaderboard.html").read_text() == text
    assert (folder / "leaderboard.csv").read_text().startswith("name,kind,control,reads,d_sae,density/")

    assert main(command) == 0  # nothing is done twice
    again = capsys.readouterr().out
    assert "2 of 2 cells are finished already" in again
    assert "density: was done before" in again
    assert "truth: was done before" in again

    trained = next(run for name, run in runs.items() if "TopK" in name)  # one SAE of a sweep: its controls stand beside it
    assert main(["evaluate", trained["run_id"], "--suite=truth", "--truth_batches=2"]) == 0
    (head,) = [line for line in capsys.readouterr().out.splitlines() if "(frozen decoder)" in line]
    assert head.split()[-1] == "oracle"
    assert main(["report", "--experiment=board", "--to", "report.html"]) == 0
    assert "(control: frozen decoder)" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_an_sae_in_a_folder_is_scored_once(config, capsys, tmp_path):
    assert main(["fit", "--config=tiny.yaml", "--name=first", "--trainer.enable_progress_bar=false"]) == 0
    (run,) = listed(capsys)
    folder = tmp_path / "runs/artifacts/hedgelab" / run["run_id"] / "artifacts/sae"
    toy = ["--data.class_path=ToyDataModule", "--data.d_in=6", "--data.firing.class_path=IndependentFiring"]
    toy += ["--data.firing.probabilities=[0.1,0.2,0.3]", "--rows=64"]
    command = ["evaluate", str(folder), "--suite=density", *toy]
    assert main(command) == 0
    assert main([*command, "--controls=first"]) == 0
    assert "density: was done before" in capsys.readouterr().out
    assert len([one for one in listed(capsys) if one["experiment"] == "evaluation"]) == 2  # the SAE's, and the oracle's
