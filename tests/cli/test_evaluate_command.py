"""``hedgelab evaluate`` on toys: what it finds, writes, skips and refuses."""

import json

import pytest

from hedgelab.cli import main
from hedgelab.errors import UserError
from hedgelab.protocols.evaluation.evaluate import Evaluate

FIT = ["fit", "--config=tiny.yaml", "--trainer.enable_progress_bar=false"]


def listed(capsys, *words):
    capsys.readouterr()
    assert main(["runs", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_help_names_every_suite(capsys):
    assert main(["evaluate", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("density", "geometry", "probing", "absorption", "loss_recovered", "saebench"):
        assert name in shown


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"loss_contexts": 0}, "loss_contexts: expected a whole number of at least 1, got 0"),
        ({"ks": [1, 0]}, "ks: expected whole numbers of at least 1, got [1, 0]"),
        ({"rows": "many"}, "rows: expected"),
        ({"ks": []}, "ks: expected whole numbers"),
        ({"sweets": 1}, "sweets: unknown key"),
        ({"words": {"text": "a", "tags": "b", "classes": {}}}, "words.classes: names no class"),
    ],
)
def test_mistakes_in_options_are_named(tree, message):
    with pytest.raises(UserError) as caught:
        Evaluate([], ["all"], tree)
    assert message in str(caught.value)


def test_options_come_from_a_config_and_the_command_line():
    words = {"text": "t.jsonl", "tags": "u.jsonl", "classes": {"a": ["x"]}}
    evaluation = Evaluate([], ["probing"], {"words": words, "ks": [3]})
    (probing,) = (suite for suite in evaluation.suites if suite.name == "probing")
    assert probing.words.classes == {"a": ["x"]}
    assert probing.ks == [3]


@pytest.mark.parametrize("name", ["tpp", "scr"])
def test_withdrawn_measures_say_why(name, capsys):
    assert main(["evaluate", "anything", "--suite", name]) == 2
    error = capsys.readouterr().err
    assert f"--suite {name}: withdrawn by the field" in error
    assert "arXiv 2605.18229" in error


def test_data_are_those_of_the_run_whatever_its_seed(config, capsys, monkeypatch):
    assert main([*FIT, "--seed_everything=5", "--name=fifth"]) == 0
    monkeypatch.delenv("PL_GLOBAL_SEED")  # another process evaluates
    assert main(["evaluate", "fifth", "--suite=truth"]) == 0
    (run,) = [one for one in listed(capsys) if one["name"] == "fifth"]
    assert run["metrics"]["truth/mcc"] == pytest.approx(run["metrics"]["val/mcc"], rel=1e-5)


@pytest.mark.slow
def test_scores_go_to_the_run_once(config, capsys, tmp_path):
    assert main([*FIT, "--name=first"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "first", "--rows=64"]) == 0
    printed = capsys.readouterr().out
    assert "density/l0" in printed
    assert "absorption: left out; needs activations of a language model" in printed
    oracle, run = listed(capsys)
    assert oracle["tags"]["hedgelab.control"] == "oracle"
    assert run["metrics"]["density/l0"] > 0
    assert "geometry/mean_max_cosine" in run["metrics"]
    assert (tmp_path / "runs/artifacts/hedgelab" / run["run_id"] / "artifacts/figures/density.png").is_file()
    assert (tmp_path / "runs/artifacts/hedgelab" / run["run_id"] / "artifacts/evaluation/density/latents.csv").is_file()

    assert main(["evaluate", run["run_id"], "--rows=64"]) == 0
    assert "density: was done before" in capsys.readouterr().out
    assert main(["evaluate", "last", "--rows=128", "--suite=density"]) == 0
    assert "density: 2 SAEs in" in capsys.readouterr().out  # the oracle is never the last
    assert {one["name"] for one in listed(capsys)} == {"first", "oracle"}
    assert main(["evaluate", "first", "--suite=probing"]) == 2
    assert "--suite probing: needs activations of a language model" in capsys.readouterr().err
    assert main(["evaluate", "second"]) == 2
    assert "no run 'second' in the store" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_gets_a_run_of_its_own_and_needs_data(config, capsys, tmp_path):
    assert main([*FIT, "--name=first"]) == 0
    (run,) = listed(capsys)
    folder = tmp_path / "runs/artifacts/hedgelab" / run["run_id"] / "artifacts/sae"
    assert main(["evaluate", str(folder), "--suite=geometry"]) == 2
    assert "nothing says what activations it reads" in capsys.readouterr().err
    toy = ["--data.class_path=ToyDataModule", "--data.d_in=6", "--data.firing.class_path=IndependentFiring"]
    toy += ["--data.firing.probabilities=[0.1,0.2,0.3]"]
    assert main(["evaluate", str(folder), "--suite=geometry", *toy]) == 0
    assert {one["experiment"] for one in listed(capsys)} == {"hedgelab", "evaluation"}
    wide = [word.replace("d_in=6", "d_in=7") for word in toy]
    assert main(["evaluate", str(folder), "--suite=geometry", *wide]) == 2
    assert "reads activations of width 6, data gives 7" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweeps_config_is_trained_evaluated_and_drawn(config, capsys, tmp_path):
    (tmp_path / "grid.yaml").write_text(config + "sweep: {axes: {model.k: [1, 2], seed: [0, 1]}}\n")
    command = ["evaluate", "grid.yaml", "--suite=density,geometry", "--rows=64", "--trainer.enable_progress_bar=false"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "density: 5 SAEs in" in printed  # with the toy's oracle
    assert "density/explained_variance" in printed
    parent = next(one for one in listed(capsys) if one["name"] == "grid")
    folder = tmp_path / "runs/artifacts/hedgelab" / parent["run_id"] / "artifacts"
    assert (folder / "figures/evaluation.png").is_file()
    lines = (folder / "evaluation.csv").read_text().splitlines()
    assert lines[0].startswith("sae,line,k,density/")
    assert len(lines) == 5
    assert main([*command, "--data.chunk_steps", "2"]) == 0  # how it is computed changes no cell and no score
    assert "4 of 4 cells are finished already" in (again := capsys.readouterr().out)
    assert "density: was done before" in again
    assert "density/explained_variance" in again
