import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml

from hedgelab.cli import main


@pytest.fixture
def printed_config(capsys):
    """The resolved config that a command line leads to."""

    def resolve(*words):
        assert main(["fit", *words, "--print_config"]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    return resolve


def test_configs_compose_with_interpolation_across_files(config, printed_config, monkeypatch):
    monkeypatch.setenv("HEDGELAB_TEST_BATCH", "16")
    Path("over.yaml").write_text(
        "model: {init_args: {d_sae: '${data.init_args.d_in}'}}\n"
        "data: {init_args: {batch_size: '${oc.env:HEDGELAB_TEST_BATCH}'}}\n"
    )
    resolved = printed_config("--config=tiny.yaml", "--config=over.yaml", "--data.d_in=7", "--model.k=1")
    assert resolved["model"]["init_args"]["d_sae"] == 7
    assert resolved["model"]["init_args"]["k"] == 1
    assert resolved["data"]["init_args"]["batch_size"] == 16
    assert resolved["trainer"]["max_steps"] == 6


def test_printed_config_reads_back_as_itself(config, printed_config):
    first = printed_config("--config=tiny.yaml")
    Path("printed.yaml").write_text(yaml.safe_dump(first))
    assert printed_config("--config=printed.yaml") == first
    assert "d_in" not in first["model"]["init_args"]


def test_defaults_can_be_overridden(config, printed_config):
    defaults = printed_config("--config=tiny.yaml")
    assert defaults["trainer"]["logger"]["class_path"].endswith("MLflowTracker")
    assert defaults["trainer"]["use_distributed_sampler"] is False
    assert defaults["checkpoint"]["save_last"] is True
    changed = printed_config("--config=tiny.yaml", "--trainer.logger=false", "--checkpoint.every_n_train_steps=5")
    assert changed["trainer"]["logger"] is False
    assert changed["checkpoint"]["every_n_train_steps"] == 5


def test_short_class_names_resolve(config, printed_config):
    resolved = printed_config("--config=tiny.yaml")
    assert resolved["model"]["class_path"] == "hedgelab.TopKSAE"
    assert resolved["data"]["init_args"]["firing"]["class_path"].startswith("hedgelab.data.toy.")


def test_untracked_run_without_bar_and_checkpoints(config, capsys):
    without = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]
    assert main(["fit", "--config=tiny.yaml", *without]) == 0
    assert "untracked run: 6 steps" in capsys.readouterr().out
    assert not Path("runs").exists()
    assert not list(Path.cwd().rglob("*.ckpt"))


TRACKER, CSV = ("{class_path: MLflowTracker}", "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}")
QUICK = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false"]


def test_a_list_of_loggers_gets_name_and_experiment(config, capsys, empty_database):
    Path("runs").mkdir()
    shutil.copy(empty_database, "runs/mlflow.db")
    Path("two.yaml").write_text(config.replace("trainer:", f"trainer:\n  logger: [{CSV}, {TRACKER}]", 1))
    assert main(["fit", "--config=two.yaml", *QUICK, "--experiment=both", "--name=named"]) == 0
    capsys.readouterr()
    assert main(["runs", "--last", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["name"], run["experiment"], run["status"]) == ("named", "both", "FINISHED")
    assert list(Path("logs").rglob("metrics.csv"))


def test_an_experiment_needs_a_store(config, capsys):
    words = ["fit", "--config=tiny.yaml", *QUICK, "--experiment=mine"]
    for logger in (f"[{CSV}]", "false"):
        assert main([*words, f"--trainer.logger={logger}"]) == 2
        assert "experiment: is MLflow's, and trainer.logger has no MLflowTracker" in capsys.readouterr().err


def test_the_config_lies_beside_the_checkpoints_whatever_the_logger(config, capsys):
    Path("csv.yaml").write_text(config.replace("trainer:", f"trainer:\n  logger: {CSV}", 1))
    for words in (["--config=csv.yaml"], ["--config=tiny.yaml", "--trainer.logger=false"]):
        folder = Path("kept") / words[-1].strip("-=")
        assert main(["fit", *words, *QUICK, f"--checkpoint.dirpath={folder}"]) == 0
        assert (folder / "last.ckpt").is_file()
        kept = yaml.safe_load((folder / "config.yaml").read_text())
        assert (kept["trainer"]["max_steps"], kept["model"]["init_args"]["k"]) == (2, 2)
        assert main(["fit", f"--config={folder}/config.yaml", "--print_config"]) == 0
    capsys.readouterr()


@pytest.mark.slow
def test_tracked_run_end_to_end(config, capsys):
    assert main(["fit", "--config=tiny.yaml", "--experiment=cli", "--model.k=1"]) == 0
    assert "hedgelab ui" in capsys.readouterr().out
    assert main(["runs", "--last", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["name"], run["experiment"], run["status"]) == ("tiny", "cli", "FINISHED")
    assert run["params"]["model.init_args.k"] == "1"
    assert len(run["tags"]["config_hash"]) >= 8
    saved = next(Path("runs/artifacts").rglob("config.yaml"))
    assert yaml.safe_load(saved.read_text())["name"] == "tiny"
    checkpoint = Path("runs/checkpoints") / run["run_id"] / "last.ckpt"
    assert checkpoint.is_file()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    assert main(["test", f"--config={saved}", f"--ckpt_path={checkpoint}", "--trainer.logger=false"]) == 0
    assert "test/explained_variance" in capsys.readouterr().out
