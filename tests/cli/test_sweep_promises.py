"""What a sweep promises: cells are known by what decides their numbers, trained once, with the user's callbacks and loggers."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Timer

from hedgelab.cli import main
from hedgelab.cli.cells import parse_cell
from hedgelab.protocols.sweep import job
from hedgelab.protocols.sweep.config import read_sweep
from hedgelab.protocols.sweep.job import check_sweep

SWEEP = """\
sweep: {base: tiny.yaml, axes: {model.d_sae: [3, 4]}}
trainer: {enable_progress_bar: false}
"""
OWN = """\
import lightning as L
from hedgelab.saes import TopKSAE

class Mine(TopKSAE):
    pass

class Notes(L.Callback):
    def on_train_batch_end(self, trainer, module, *rest):
        with open("notes.txt", "a") as file:
            file.write(f"{type(module).__name__} {module.d_sae} {trainer.global_step} {module.on_nonfinite}\\n")
"""


TRAINER = """\
enable_progress_bar: false, callbacks: [own_of_sweeps.Notes], logger: [
  {class_path: hedgelab.tracking.MLflowTracker},
  {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: csv}}]"""


@pytest.fixture
def sweep(config, empty_database, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_database, tmp_path / "runs" / "mlflow.db")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    (tmp_path / "own_of_sweeps.py").write_text(OWN)
    return ["sweep", "--config=sweep.yaml"]


def ids(sweep, *words):
    return [unit.id for unit in check_sweep(read_sweep([*sweep[1:], *words]), parse_cell, construct=False)]


def cells(client=None):
    from hedgelab.tracking.runs import search_runs
    from hedgelab.tracking.store import ensure_store

    return list(search_runs(ensure_store(), "tags.sweep_cell LIKE '%'"))


@pytest.mark.parametrize(
    "words",
    [
        ["--data.chunk_steps=4"], ["--checkpoint.every_n_train_steps=2"], ["--trainer.log_every_n_steps=1"],
        ["--trainer.max_time=00:01:00:00"], ["--retrain"], ["--list"], ["--trainer.default_root_dir=runs/elsewhere"],
    ],
)  # fmt: skip
def test_where_and_how_cells_run_changes_no_id(sweep, words):
    assert ids(sweep, *words) == ids(sweep)


@pytest.mark.parametrize(
    "words", [["--trainer.limit_train_batches=5"], ["--guard.on_nonfinite=skip"], ["--trainer.max_steps=7"]]
)
def test_what_decides_numbers_changes_the_id(sweep, words):
    assert not set(ids(sweep, *words)) & set(ids(sweep))


def test_an_edited_class_changes_the_id(sweep, tmp_path):
    words = ["--model=own_of_sweeps.Mine", "--model.k=2"]
    before = ids(sweep, *words)
    assert ids(sweep, *words) == before
    (tmp_path / "own_of_sweeps.py").write_text(OWN.replace("pass", "twist = 1"))
    assert not set(ids(sweep, *words)) & set(before)


def test_numbers_without_a_point_are_numbers(sweep):
    words = ["--sweep.axes.model.optimizer.lr=[1e-3, 5e-4, 1E+0]", "--model.optimizer=torch.optim.Adam"]
    read = read_sweep([*sweep[1:], *words])
    assert {cell.values["model.optimizer.lr"] for cell, _ in read.cells} == {0.001, 0.0005, 1.0}
    (cell, tree), *_ = read.cells
    lr = cell.values["model.optimizer.lr"]
    parsed = parse_cell("fit", {**tree, "experiment": "1e-3"}).resolved()
    assert (parsed["model"]["init_args"]["optimizer"]["init_args"]["lr"], parsed["experiment"]) == (lr, "1e-3")


def test_cells_with_callbacks_of_the_users_train_one_at_a_time(sweep):
    units = check_sweep(read_sweep([*sweep[1:], "--trainer.callbacks=own_of_sweeps.Notes"]), parse_cell, construct=False)
    assert len({unit.stream for unit in units}) == 2
    assert len({unit.stream for unit in check_sweep(read_sweep(sweep[1:]), parse_cell, construct=False)}) == 1


@pytest.mark.slow
def test_callbacks_loggers_and_guard_are_kept(sweep, tmp_path):
    text = (tmp_path / "sweep.yaml").read_text()
    (tmp_path / "sweep.yaml").write_text(text.replace("enable_progress_bar: false", TRAINER) + "guard: {on_nonfinite: skip}\n")
    assert main(sweep) == 0
    noted = Path("notes.txt").read_text().splitlines()
    assert noted == [f"TopKSAE {width} {step} skip" for width in (3, 4) for step in range(1, 7)]
    assert len(list(Path("csv").rglob("metrics.csv"))) == 2
    found = cells()
    assert {run.info.status for run in found} == {"FINISHED"}
    assert all({"val/mse", "train/loss"} <= run.data.metrics.keys() for run in found)
    assert main(["fit", "--config=tiny.yaml", "--trainer.enable_progress_bar=false", "--name=alone"]) == 0
    from hedgelab.tracking.runs import resolve_run

    of_a_fit, of_a_cell = resolve_run("alone").params, found[0].data.params
    assert {key for key in of_a_cell if not key.startswith(("trainer.callbacks", "guard"))} == {
        key for key in of_a_fit if not key.startswith("guard")
    }


@pytest.mark.slow
def test_a_cell_that_max_time_cut_is_not_finished_and_goes_on(sweep, capsys, monkeypatch):
    looks = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(Timer, "time_elapsed", lambda self, stage="train": next(looks))
        assert main([*sweep, "--trainer.max_time=00:00:00:03"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("trainer.max_time: ended training at step") == 2
    assert "0 of 2 cells\n" in captured.out
    assert main(sweep) == 0
    assert "2 of 2 cells\n" in capsys.readouterr().out
    found = cells()
    assert len(found) == 2  # the same runs
    assert {run.info.status for run in found} == {"FINISHED"}
    assert main(["fit", "--config=tiny.yaml", "--trainer.enable_progress_bar=false", "--name=alone"]) == 0
    from hedgelab.tracking.runs import resolve_run

    sha = {run.data.tags["weights_sha256"] for run in found if run.info.run_name == "d_sae=3"}
    assert sha == {resolve_run("alone").tags["weights_sha256"]}


@pytest.mark.slow
def test_a_failing_cell_does_not_have_the_good_ones_trained_again(sweep, capsys, monkeypatch):
    from hedgelab.saes import TopKSAE

    loss = TopKSAE.loss

    def broken(self, batch):
        if self.d_sae == 4:
            raise RuntimeError("boom")
        return loss(self, batch)

    monkeypatch.setattr(TopKSAE, "loss", broken)
    assert main(sweep) == 1
    (before,) = [run for run in cells() if run.info.run_name == "d_sae=3"]
    capsys.readouterr()
    assert main(sweep) == 1
    said = capsys.readouterr().out
    assert "1 of 2 cells are finished already" in said
    assert "training d_sae=4\n" in said
    (after,) = [run for run in cells() if run.info.run_name == "d_sae=3"]
    assert (after.info.run_id, after.info.end_time) == (before.info.run_id, before.info.end_time)


def test_cells_that_another_process_trains_are_waited_for(sweep, capsys, monkeypatch):
    real = job.take_locks
    held = real(Path("runs/locks"), ids(sweep)[:1], 0)

    def take_locks(folder, cells, patience):
        if patience:  # now it waits
            held.close()
        return real(folder, cells, patience)

    monkeypatch.setattr(job, "take_locks", take_locks)
    assert main([*sweep, "--sweep.pack=1"]) == 0
    said = capsys.readouterr().out
    assert said.index("training d_sae=4") < said.index("another process is training 1 cells; waiting for it")
    assert said.index("waiting for it") < said.index("training d_sae=3")
    assert [run.info.status for run in cells()] == ["FINISHED"] * 2


@pytest.mark.slow
def test_retrain_trains_finished_cells_in_new_runs(sweep, capsys):
    assert main(sweep) == 0
    assert main(sweep) == 0
    assert "2 of 2 cells are finished already" in capsys.readouterr().out
    assert len(cells()) == 2
    assert main([*sweep, "--retrain"]) == 0
    assert len(cells()) == 4


def test_locks_are_taken_all_or_none(tmp_path):
    with job.take_locks(tmp_path, ["a", "b"], 0):
        assert job.take_locks(tmp_path, ["b", "c"], 0) is None
    with job.take_locks(tmp_path, ["b", "c"], 0):
        assert job.take_locks(tmp_path, ["a", "b"], 0) is None
