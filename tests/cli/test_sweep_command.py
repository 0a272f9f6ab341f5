"""``hedgelab sweep``: cells checked before anything runs, packed, found again; one that fails does not stop the rest."""

import csv
import io
import json
import shutil

import pytest
import torch

from hedgelab.cli import main
from hedgelab.cli.cells import parse_cell
from hedgelab.protocols.evaluation.evaluate import find
from hedgelab.protocols.sweep.config import read_sweep
from hedgelab.protocols.sweep.job import check_sweep, packed
from hedgelab.saes import load_sae

SWEEP = """\
# A tiny sweep.
sweep:
  base: tiny.yaml
  lines:
    TopK: {set: {model.k: 2}}
    vanilla: {set: {model: {class_path: VanillaSAE, init_args: {d_sae: 3, l1_coefficient: 0.1}}}}
  axes: {model.d_sae: [3, 4], seed: [0, 1]}
trainer: {enable_progress_bar: false}
"""
HEDGE = ["--sweep.command=hedge", "--hedge.n_new=2", "--hedge.new_norm=1", "--sweep.axes.model.d_sae=[3]"]


@pytest.fixture
def sweep(config, tmp_path):
    """A sweep over the tiny config, in an empty working directory; its words."""
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    executor = "{class_path: LocalProcesses, init_args: {log_dir: /elsewhere}}"
    (tmp_path / "logs.yaml").write_text(f"sweep: {{executor: {executor}}}")
    (tmp_path / "root.yaml").write_text("trainer: {default_root_dir: /elsewhere}")
    return ["sweep", "--config=sweep.yaml"]


def store():
    from mlflow.tracking import MlflowClient

    from hedgelab.tracking.store import tracking_uri

    client = MlflowClient(tracking_uri=tracking_uri())
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return client, runs


def sae_of(client, run, tmp_path):
    return load_sae(client.download_artifacts(run.info.run_id, "sae", str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.d_sea=3"], "cell 'TopK/d_sae=3': model.d_sea: unknown key; did you mean 'd_sae'?"),
        (["--sweep.lines.TopK.set.model.k=4"], "cell 'TopK/d_sae=3': model.k: must lie between 1 and d_sae = 3, got 4"),
        (["--sweep.axes.model.d_sae=[3, x]"], "cell 'TopK/d_sae=x': model.d_sae: expected int, got 'x'"),
        (["--model.d_sae=5"], "model.d_sae: is an axis; set its values instead (--sweep.axes.model.d_sae '[...]')"),
        (["--sweep.axs=3"], "sweep.axs: unknown key; did you mean 'axes'?"),
        (["--sweep.command=hegde"], "sweep.command: expected one of 'fit', 'hedge', got 'hegde'"),
        (["--sweep.pack=0"], "sweep.pack: must be at least 1, or null for no limit, got 0"),
        (["--sweep.executor.class_path=Slrum"], "sweep.executor: unknown class 'Slrum'; did you mean 'Slurm'?"),
        (["--trainer.max_steps=-1"], "cell 'TopK/d_sae=3': trainer.max_steps: must be set"),
        (["--trainer.logger=false"], "cell 'TopK/d_sae=3': trainer.logger: a sweep finds its cells in the tracking store"),
        ([*HEDGE, "--hedge.n_new=6"], "cell 'TopK/d_sae=3': hedge.n_new: must be below d_in = 6"),
        ([*HEDGE, "--hedge.seeds=2"], "cell 'TopK/d_sae=3': hedge.seeds: seeds are an axis of the sweep already"),
        (["--config=logs.yaml"], "sweep.executor.log_dir: '/elsewhere' lies outside the working folder"),
        (["--config=root.yaml"], "cell 'TopK/d_sae=3': trainer.default_root_dir: '/elsewhere' lies outside the working folder"),
        (["--trainer.devices=auto"], "trainer.devices: a sweep starts its jobs' processes itself and must know how many"),
        (["--sweep.lines.vanilla.set.trainer.devices=2"], "trainer.devices: and trainer.num_nodes must be the same in all"),
        (["--sweep.base=tinny.yaml"], "no such file 'tinny.yaml'; did you mean 'tiny.yaml'?"),
    ],
)
def test_mistakes_take_one_line_with_cell_and_key(sweep, capsys, tmp_path, options, message):
    assert main([*sweep, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "runs" / "artifacts").exists()


def test_a_config_without_the_section_is_refused(sweep, capsys):
    assert main(["sweep", "--config=tiny.yaml"]) == 2
    assert "sweep: 'tiny.yaml' has no such section" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_sweep_that_a_launcher_started_several_times_is_refused(sweep, capsys, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    assert main(sweep) == 2
    assert "sweep: was started in several processes" in capsys.readouterr().err


@pytest.mark.slow
def test_folders_elsewhere_are_the_users_choice(sweep):
    read = read_sweep([*sweep[1:], "--config=root.yaml", "--trainer.default_root_dir=/elsewhere"])
    assert read.said == ("--trainer.default_root_dir=/elsewhere",)
    for unit in check_sweep(read, parse_cell):
        assert unit.parse().resolved()["trainer"]["default_root_dir"] == "/elsewhere"


@pytest.mark.slow
def test_cells_with_the_same_stream_are_packed(sweep):
    read = read_sweep([*sweep[1:], "--sweep.axes.data.batch_size=[8, 16]"])
    units = check_sweep(read, parse_cell)
    assert len(units) == 16
    groups = packed(units, None)
    assert [len(group) for group in groups] == [8, 8]
    assert {unit.name.split("batch_size=")[1][:2] for unit in groups[0]} == {"8/"} or len(groups[0]) == 8
    assert len({unit.stream for unit in groups[0]}) == 1
    assert [len(group) for group in packed(units, 3)] == [3, 3, 2, 3, 3, 2]
    assert [unit.id for unit in check_sweep(read, parse_cell)] == [unit.id for unit in units]
    assert len({unit.id for unit in units}) == 16


def test_seeds_of_a_hedging_degree_are_one_unit(sweep):
    (top_k, vanilla) = check_sweep(read_sweep([*sweep[1:], *HEDGE]), parse_cell)
    assert (top_k.name, top_k.seeds) == ("TopK/d_sae=3", (0, 1))
    assert top_k.stream == vanilla.stream


def test_the_command_line_lies_between_lines_and_axes(sweep):
    read = read_sweep([*sweep[1:], "--model.optimizer.class_path=torch.optim.SGD", "--model.optimizer.lr=0.5"])
    for cell, tree in read.cells:
        assert tree["model"]["init_args"]["optimizer"] == {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
        assert tree["model"]["init_args"]["d_sae"] == cell.values["model.d_sae"]


def test_a_sweep_has_the_saes_of_all_its_cells_whichever_sweep_has_trained_them(sweep):
    for chosen, count in (("TopK/d_sae=3/seed=0", 1), ("TopK/.*/seed=0", 2)):
        assert main([*sweep, f"--sweep.only={chosen}"]) == 0
        _, runs = store()
        newest = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
        found, above = find(newest.info.run_id)
        assert [one.name for one in found] == ["TopK/d_sae=3/seed=0", "TopK/d_sae=4/seed=0"][:count]
        assert above is not None
        assert above.run_id == newest.info.run_id


@pytest.mark.slow
def test_packed_fits_equal_fits_alone_and_are_found_again(sweep, capsys, tmp_path):
    assert main(sweep) == 0
    printed = capsys.readouterr().out
    assert "8 of 8 cells\n" in printed
    client, runs = store()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    cells = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert len(cells) == 8
    assert all("val/explained_variance" in run.data.metrics for run in cells.values())
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert artifacts >= {"sweep.csv", "sweep.json", "config.yaml", "figures"}
    table = list(csv.DictReader(io.StringIO(client_text(client, parent, "sweep.csv", tmp_path))))
    assert {(row["line"], row["model.d_sae"], row["seed"]) for row in table} == {
        (line, width, seed) for line in ("TopK", "vanilla") for width in "34" for seed in "01"
    }
    assert all(float(row["val/explained_variance"]) <= 1 for row in table)

    assert main(["fit", "--config=tiny.yaml", "--model.init.seed=1", "--model.d_sae=4", "--name=alone"]) == 0
    client, runs = store()
    (alone,) = [run for run in runs if run.info.run_name == "alone"]
    assert alone.data.tags["weights_sha256"] == cells["TopK/d_sae=4/seed=1"].data.tags["weights_sha256"]

    capsys.readouterr()
    assert main([*sweep, "--sweep.axes.model.d_sae=[3, 4, 5]"]) == 0
    assert "8 of 12 cells are finished already" in capsys.readouterr().out
    assert main(sweep) == 0
    assert "8 of 8 cells are finished already" in capsys.readouterr().out
    client, again = store()
    assert len(again) == len(runs) + 1 + 4  # the wider sweep with its new cells; the first one's run goes on


@pytest.mark.slow
def test_a_cell_that_fails_is_listed_and_does_not_stop_the_rest(sweep, capsys, monkeypatch, tmp_path):
    from hedgelab.saes import VanillaSAE

    loss = VanillaSAE.loss

    def broken(self, batch):
        if self.d_sae == 4 and self.init.seed == 1:
            raise RuntimeError("boom")
        return loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(VanillaSAE, "loss", broken)
        assert main(sweep) == 1
    captured = capsys.readouterr()
    assert "hedgelab: cell 'vanilla/d_sae=4/seed=1' failed: RuntimeError: boom" in captured.err.splitlines()
    assert "7 of 8 cells\n" in captured.out
    client, runs = store()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "FAILED"
    document = json.loads(client_text(client, parent, "sweep.json", tmp_path))
    assert list(document["failures"]) == ["vanilla/d_sae=4/seed=1"]
    assert len(document["rows"]) == 7

    assert main(sweep) == 0
    assert "7 of 8 cells are finished already" in capsys.readouterr().out
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_packed_hedging_degrees_equal_one_alone(sweep, capsys, tmp_path):
    assert main([*sweep, *HEDGE]) == 0
    _, runs = store()
    by_name = {run.info.run_name: run for run in runs}
    cell = by_name["TopK/d_sae=3"]
    assert {"hedging/degree", "hedging/seed1/degree", "control/explained_variance", "control/seed0/l0"} <= set(
        cell.data.metrics
    )
    words = ["--config=tiny.yaml", "--hedge.n_new=2", "--hedge.new_norm=1", "--hedge.seeds=2", "--model.init.seed=0"]
    assert main(["hedge", *words, "--name=alone", "--trainer.enable_progress_bar=false"]) == 0
    _, runs = store()
    (alone,) = [run for run in runs if run.info.run_name == "alone"]
    numbers = {key: value for key, value in alone.data.metrics.items() if key.startswith("hedging/")}
    assert numbers == {key: value for key, value in cell.data.metrics.items() if key.startswith("hedging/")}
    for role in ("initial", "control", "extended", "reordered"):
        names = f"{role}/seed1", f"TopK/d_sae=3/{role}/seed1"
        assert len({by_or_of(runs, name).data.tags["weights_sha256"] for name in names}) == 1


@pytest.mark.slow
def test_local_processes_do_the_same(sweep, capsys):
    pytest.importorskip("submitit", reason="needs submitit")
    executor = ["--sweep.executor.class_path=LocalProcesses", "--sweep.executor.at_once=2", "--sweep.pack=4"]
    assert main([*sweep, *executor]) == 0
    assert "8 of 8 cells\n" in capsys.readouterr().out
    _, runs = store()
    cells = {run.info.run_name: run.data.tags["weights_sha256"] for run in runs if "sweep_cell" in run.data.tags}
    assert len(cells) == 8
    assert main(["fit", "--config=tiny.yaml", "--model.init.seed=1", "--model.d_sae=4", "--name=alone"]) == 0
    _, runs = store()
    assert by_or_of(runs, "alone").data.tags["weights_sha256"] == cells["TopK/d_sae=4/seed=1"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "hedge"])
def test_cells_that_train_on_two_ranks_give_the_same(command, sweep, capsys, monkeypatch, tmp_path):
    pytest.importorskip("submitit", reason="needs submitit")
    words = [*sweep, *(HEDGE if command == "hedge" else []), "--sweep.axes.model.d_sae=[3]", "--trainer.max_steps=30"]
    measured = {}
    for devices in (1, 2):
        (folder := tmp_path / f"ranks{devices}").mkdir()
        for name in ("tiny.yaml", "sweep.yaml"):
            shutil.copy(tmp_path / name, folder)
        monkeypatch.chdir(folder)
        assert main([*words, f"--trainer.devices={devices}"]) == 0
        _, runs = store()
        cells = [run for run in runs if "sweep_cell" in run.data.tags]
        assert len(cells) == (2 if command == "hedge" else 4)
        assert {run.data.tags["world_size"] for run in cells} == {str(devices)}
        measured[devices] = {
            run.info.run_name: {
                name: value for name, value in run.data.metrics.items() if name.startswith(("val/", "hedging/"))
            }
            for run in cells
        }
        capsys.readouterr()
    assert measured[2].keys() == measured[1].keys()
    for name, numbers in measured[1].items():
        assert len(numbers) > 5
        assert measured[2][name] == pytest.approx(numbers, rel=1e-4, abs=1e-5, nan_ok=True)
    assert main([*words, "--trainer.devices=1"]) == 0
    assert "cells are finished already" in capsys.readouterr().out


def by_or_of(runs, name):
    (found,) = [run for run in runs if run.info.run_name == name]
    return found


def client_text(client, run, path, folder):
    with open(client.download_artifacts(run.info.run_id, path, str(folder))) as file:  # noqa: PTH123
        return file.read()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
