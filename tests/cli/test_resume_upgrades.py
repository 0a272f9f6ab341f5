"""``--resume`` finds a run that another release has begun: keys come and go, defaults change."""

import json
from pathlib import Path

import pytest

from hedgelab.cli import main
from hedgelab.cli.lightning import run_cli
from hedgelab.cli.resume import ResumableCLI
from hedgelab.training.checkpoints import RunFolder

WORDS = ["--config=tiny.yaml", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
ARGUMENTS = ("model", "init_args")


@pytest.fixture
def begun(config):
    """A run of ``tiny.yaml`` as if it had been cut short."""
    assert main(["fit", *WORDS]) == 0
    (path,) = Path("runs/checkpoints").iterdir()
    RunFolder(path).note(finished=False)
    return path


def edit(folder, change):
    """Another release's record of the same run."""
    about = json.loads((folder / "run.json").read_text())
    change(about)
    about["identity"] = "another"
    (folder / "run.json").write_text(json.dumps(about))


def arguments(about):
    return about["config"]["model"]["init_args"]


def resumed(capsys, *more):
    """What is said, and the SAE that is trained on."""
    capsys.readouterr()
    cli = run_cli(ResumableCLI, "fit", [*WORDS, "--resume", *more])
    return capsys.readouterr().out, cli


def test_record_holds_the_config(begun):
    about = RunFolder(begun).about
    assert arguments(about)["k"] == 2
    assert about["config"]["trainer"]["max_steps"] == 6
    assert {"model.k", "model.class_path", "trainer.max_steps", "name", "seed_everything"} <= set(about["written"])
    assert not [key for key in about["written"] if key.startswith(("config", "resume"))]


def know_more(about):
    arguments(about)["sharpness"] = 0.5
    about["config"]["novelties"] = {"class_path": "hedgelab.Novelty", "init_args": {"many": 3}}


def move(about):
    about["config"]["model"]["class_path"] = "hedgelab.saes.elsewhere.TopKSAE"


@pytest.mark.parametrize("change", [know_more, move, lambda about: about["config"]["trainer"].pop("min_epochs")])
def test_keys_of_one_release_only(change, begun, capsys):
    edit(begun, change)
    said, cli = resumed(capsys)
    assert f"resume: run {begun.name} goes on from" in said
    assert "default" not in said
    assert cli.trainer.global_step == 6
    assert [path.name for path in Path("runs/checkpoints").iterdir()] == [begun.name]
    assert RunFolder(begun).finished
    assert "sharpness" not in arguments(RunFolder(begun).about)


def test_a_new_key_that_is_written_with_another_value(begun, capsys):
    edit(begun, lambda about: arguments(about).pop("dead_after_steps"))
    said, _ = resumed(capsys, "--model.dead_after_steps=17")
    assert f"(run {begun.name} differs in model.dead_after_steps (absent there, 17 here)); starting afresh" in said
    assert len(list(Path("runs/checkpoints").iterdir())) == 2


def test_a_key_that_was_written_and_is_gone(begun, capsys):
    edit(begun, lambda about: (arguments(about).update(sharpness=2), about["written"].append("model.sharpness")))
    assert f"(run {begun.name} differs in model.sharpness (2 there, absent here)); starting afresh" in resumed(capsys)[0]


def test_a_changed_default_stays_what_it_was(begun, capsys):
    def older(about):
        arguments(about)["dead_after_steps"] = 5
        arguments(about)["init"]["b_dec"] = "mean"
        about["config"]["guard"]["on_nonfinite"] = "skip"

    edit(begun, older)
    said, cli = resumed(capsys)
    assert cli.model.dead_after_steps == 5
    assert cli.model.init.b_dec == "mean"
    (line,) = [line for line in said.splitlines() if "other defaults" in line]
    assert line.startswith(f"resume: run {begun.name} was begun with other defaults: model.dead_after_steps=5 (now ")
    assert "model.init.b_dec='mean' (now 'zeros'), guard.on_nonfinite='skip' (now 'stop')" in line
    assert f"resume: run {begun.name} goes on from" in said
    assert arguments(RunFolder(begun).about)["dead_after_steps"] == 5
    RunFolder(begun).note(finished=False)
    assert resumed(capsys)[1].model.dead_after_steps == 5  # requeued once more


def test_a_changed_default_that_is_written_now_is_another_experiment(begun, capsys):
    edit(begun, lambda about: arguments(about).update(dead_after_steps=5))
    said, cli = resumed(capsys, "--model.dead_after_steps=9")
    assert "differs in model.dead_after_steps (5 there, 9 here)); starting afresh" in said
    assert cli.model.dead_after_steps == 9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda about: arguments(about)["optimizer"].update(class_path="torch.optim.AdamW"), "model.optimizer.class_path"),
        (lambda about: arguments(about).update(lr_scheduler="os.system"), "model.lr_scheduler='os.system' (now null)"),
        (lambda about: arguments(about).update(dead_after_steps=-5), "dead_after_steps: expected a whole number"),
        (
            lambda about: arguments(about).update(dead_after_steps=[5]),
            "does not go on (model.dead_after_steps: expected int, got [5])",
        ),
    ],
)
def test_defaults_that_cannot_be_taken_over_are_one_line(change, words, begun, capsys):
    edit(begun, change)
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(["fit", *WORDS, "--resume"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert words in said[0]
    assert [path for path in sorted(Path().rglob("*")) if path not in before and path.name != ".lock"] == []
    assert not RunFolder(begun).finished


def test_a_finished_run_with_an_older_default_says_so(begun, capsys):
    edit(begun, lambda about: arguments(about).update(dead_after_steps=5))
    RunFolder(begun).note(finished=True)
    capsys.readouterr()
    assert main(["fit", *WORDS, "--resume"]) == 0
    assert "has finished (with model.dead_after_steps=5, then the default); nothing is left" in capsys.readouterr().out


def test_the_very_config_comes_before_one_that_is_nearly_the_same(begun, capsys):
    assert main(["fit", *WORDS]) == 0
    (newer,) = [path for path in Path("runs/checkpoints").iterdir() if path != begun]
    edit(newer, lambda about: arguments(about).update(dead_after_steps=5))
    RunFolder(newer).note(finished=False)
    said, cli = resumed(capsys)
    assert f"resume: run {begun.name} goes on from" in said
    assert cli.model.dead_after_steps != 5


def test_another_name_or_command_is_another_run(begun, capsys):
    assert "differs in name ('tiny' there, 'other' here)" in resumed(capsys, "--name=other")[0]
    edit(begun, lambda about: about.update(command="hedge"))
    assert main(["fit", *WORDS, f"--resume={begun.name[:14]}"]) == 2
    assert "is one of `hedgelab hedge`, not of fit" in capsys.readouterr().err


def test_a_run_that_is_named_goes_on_whatever_its_config_was(begun, capsys):
    edit(begun, lambda about: (about["config"]["trainer"].update(max_steps=4), arguments(about).update(k=1)))
    said, _ = resumed(capsys, f"--resume={begun.name[:14]}")
    assert f"resume: run {begun.name} was begun with trainer.max_steps=4; now it is 6" in said
    assert f"resume: run {begun.name} differs in model.k (1 there, 2 here)" in said
    assert f"resume: run {begun.name} goes on from" in said
