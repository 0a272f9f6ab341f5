"""``hedgelab hedge``: its options, and a whole measurement with everything it leaves in the store."""

import json

import pytest
import yaml

from hedgelab.cli import main

HEDGE = ["--config=tiny.yaml", "--hedge.n_new=2", "--hedge.new_norm=1", "--trainer.enable_progress_bar=false"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--hedge.n_nw=3", "hedge.n_nw: unknown key; did you mean 'n_new'?"),
        ("--hedge.n_new=0", "hedge.n_new: expected a whole number of at least 1, got 0"),
        ("--hedge.n_new=6", "hedge.n_new: must be below d_in = 6"),
        ("--hedge.lr=fast", "hedge.lr: expected float | null, got 'fast'"),
        ("--model.k=9", "model.k: must lie between 1 and d_sae = 3"),
    ],
)
def test_mistakes_take_one_line(config, capsys, option, message):
    assert main(["hedge", *HEDGE, "--trainer.logger=false", option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_config_prints_with_its_hedge_section(config, capsys):
    assert main(["hedge", *HEDGE, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["hedge"]["n_new"] == 2
    assert printed["hedge"]["draws"] == 50
    assert printed["trainer"]["max_steps"] == 6


def test_untracked_measurement_prints_the_degree(config, capsys):
    assert main(["hedge", *HEDGE, "--trainer.logger=false"]) == 0
    printed = capsys.readouterr().out
    assert "training initial/seed1\n" in printed
    assert "hedging/degree" in printed


@pytest.mark.slow
def test_tracked_measurement_is_one_tree_whose_phases_are_trained_once(config, capsys, monkeypatch):
    def last():
        capsys.readouterr()
        assert main(["runs", "--last", "--json"]) == 0
        (run,) = json.loads(capsys.readouterr().out)
        return run

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hedgelab.protocols.hedge.widen", stop)
        assert main(["hedge", *HEDGE, "--hedge.seeds=2"]) == 130
    assert last()["status"] == "KILLED"

    assert main(["hedge", *HEDGE, "--hedge.seeds=2"]) == 0
    printed = capsys.readouterr().out
    assert "already trained: initial/seed1, initial/seed2\n" in printed
    run = last()
    assert (run["status"], run["name"]) == ("FINISHED", "tiny")
    for name in ("degree", "baseline", "baseline_std", "projection", "live_degree", "live_new_latents", "delta_norm"):
        assert f"hedging/{name}" in run["metrics"]
    for name in ("covariance_baseline", "foreign_baseline", "noise_floor", "mean_cosine", "degree_seed_std"):
        assert f"hedging/{name}" in run["metrics"]

    assert main(["hedge", *HEDGE, "--hedge.seeds=2", "--hedge.new_norm=2"]) == 0
    printed = capsys.readouterr().out
    assert "already trained: control/seed1, reordered/seed1, control/seed2, reordered/seed2\n" in printed
    assert "training extended/seed1, extended/seed2\n" in printed
    again = last()
    kept = {f"phase.{role}/seed1" for role in ("initial", "control", "reordered")}
    assert {key: run["tags"][key] for key in kept} == {key: again["tags"][key] for key in kept}
    assert run["tags"]["phase.extended/seed1"] != again["tags"]["phase.extended/seed1"]
    assert main(["runs", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert len(runs) == 3 + 2 + 6 + 2  # parents; initial; continuations; extended again
