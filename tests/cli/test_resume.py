"""``--resume``: what max_time cut goes on, to more steps too, with any logger; what changes no number does not matter."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Timer

from hedgelab.cli import main
from hedgelab.cli.lightning import run_cli
from hedgelab.cli.resume import ResumableCLI
from hedgelab.training.checkpoints import RunFolder
from tests.saes.comparison import same_weights

QUIET = ["--trainer.enable_progress_bar=false"]
UNTRACKED = [*QUIET, "--trainer.logger=false"]
CSV = [*QUIET, "--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=csv"]


def fit(*words):
    return run_cli(ResumableCLI, "fit", ["--config=tiny.yaml", *words])


def folders():
    return sorted(path.name for path in Path("runs/checkpoints").iterdir())


@pytest.fixture
def three_steps(monkeypatch):
    """Every look at the clock of max_time is a second later than the one before, so that three seconds are a few steps."""
    looks, elapsed = iter(range(1000)), Timer.time_elapsed
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage="train": next(looks))
    return "--trainer.max_time=00:00:00:03", lambda: monkeypatch.setattr(Timer, "time_elapsed", elapsed)


@pytest.mark.parametrize("words", [UNTRACKED, CSV], ids=["untracked", "CSVLogger"])
def test_a_run_that_max_time_cut_goes_on(config, three_steps, capsys, words):
    limit, let_the_clock_go = three_steps
    cut = fit(*words, limit)
    assert 0 < cut.trainer.global_step < 6
    (name,) = folders()
    assert not RunFolder(Path("runs/checkpoints") / name).finished
    let_the_clock_go()
    capsys.readouterr()
    again = fit(*words, limit, "--resume")
    assert f"resume: run {name} goes on from" in capsys.readouterr().out
    assert again.trainer.global_step == 6
    assert folders() == [name]
    assert same_weights(again.model, fit(*UNTRACKED, "--name=undisturbed").model)
    assert RunFolder(Path("runs/checkpoints") / name).finished


def test_more_steps_go_on_to_the_new_end(config, capsys):
    fit(*UNTRACKED)
    (name,) = folders()
    assert main(["fit", "--config=tiny.yaml", *UNTRACKED, "--resume"]) == 0
    assert f"run {name} has finished" in capsys.readouterr().out
    longer = fit(*UNTRACKED, "--trainer.max_steps=12", "--resume")
    assert f"resume: run {name} goes on from" in capsys.readouterr().out
    assert longer.trainer.global_step == 12
    assert same_weights(longer.model, fit(*UNTRACKED, "--trainer.max_steps=12", "--name=undisturbed").model)
    fewer = fit(*UNTRACKED, "--trainer.max_steps=4", "--resume")
    assert "differs in trainer.max_steps (12 there, 4 here)); starting afresh" in capsys.readouterr().out
    assert fewer.trainer.global_step == 4


def test_keys_that_change_no_number_do_not_matter(config, capsys):
    fit(*UNTRACKED, "--data.chunk_steps=2")
    (name,) = folders()
    RunFolder(Path("runs/checkpoints") / name).note(finished=False)
    words = ["--data.chunk_steps=3", "--checkpoint.every_n_train_steps=2", "--trainer.log_every_n_steps=1"]
    fit(*UNTRACKED, *words, "--resume")
    assert f"resume: run {name} goes on from" in capsys.readouterr().out


def test_an_id_is_enough(config, capsys):
    fit(*UNTRACKED, "--model.k=1")
    (name,) = folders()
    RunFolder(Path("runs/checkpoints") / name).note(finished=False)
    cli = run_cli(ResumableCLI, "fit", [f"--resume={name}", "--trainer.max_steps=8"])
    assert (cli.model.k, cli.trainer.global_step) == (1, 8)
    assert f"resume: run {name} goes on from" in capsys.readouterr().out
    assert folders() == [name]


OWN = """\
from hedgelab.saes import TopKSAE

class OfMine(TopKSAE):
    scale = {scale}
"""


def test_other_code_trains_a_finished_run_anew_and_goes_on_with_an_unfinished_one(config, capsys, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "saes_of_resume.py").write_text(OWN.format(scale=1))
    words = [*UNTRACKED, "--model=saes_of_resume.OfMine", "--model.d_sae=3", "--model.k=2"]
    fit(*words)
    (name,) = folders()
    (tmp_path / "saes_of_resume.py").write_text(OWN.format(scale=2))
    RunFolder(Path("runs/checkpoints") / name).note(finished=False)
    fit(*words, "--resume")
    said = capsys.readouterr().out
    assert f"run {name} was begun with other code of saes_of_resume.OfMine; it goes on with today's" in said
    (tmp_path / "saes_of_resume.py").write_text(OWN.format(scale=3))
    fit(*words, "--resume")
    assert f"(run {name} differs in the code of saes_of_resume.OfMine" in capsys.readouterr().out
    assert len(folders()) == 2


@pytest.mark.slow
def test_a_run_that_was_deleted_in_the_ui_is_one_line(config, capsys):
    from hedgelab.tracking.store import ensure_store

    fit(*QUIET)
    (name,) = folders()
    RunFolder(Path("runs/checkpoints") / name).note(finished=False)
    ensure_store().delete_run(name)
    capsys.readouterr()
    assert main(["fit", "--config=tiny.yaml", *QUIET, "--resume"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"hedgelab: trainer.logger.run_id: run '{name}' is deleted in sqlite:///")
    assert "restore it there" in line
