"""What ``hedgelab evaluate`` measures on: the SAE's own model, layer and normalisation, unless the user says otherwise."""

import json

import pytest

from hedgelab.cli import main
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.protocols.evaluation.across import means, rows_of
from hedgelab.protocols.evaluation.evaluate import Subject
from hedgelab.protocols.evaluation.suite import suite_classes
from hedgelab.saes import TopKSAE, save_sae

LLM = "hedgelab.data.llm.datamodule.LLMDataModule"


@pytest.fixture
def subject(tmp_path):
    """Makes a folder with an SAE and what it reads."""

    def make(**reads):
        save_sae(TopKSAE(6, 3, k=2), tmp_path / "sae")
        ActivationSource(**reads).save(tmp_path / "sae")
        return Subject("mine", tmp_path / "sae", None)

    return make


def test_an_sae_is_measured_where_it_was_made_for(subject):
    tree = subject(model="gpt2", layer=3, context_length=64).data({})
    expected = {"model": "gpt2", "layer": 3, "context_length": 64, "skip_first": 0}
    assert tree == {"class_path": LLM, "init_args": expected}
    tree = subject(model="gpt2", hook="blocks.2.attn.hook_z").data({"cache_dir": "x"})
    assert tree["init_args"] == {"model": "gpt2", "hook": "blocks.2.attn.hook_z", "skip_first": 0, "cache_dir": "x"}


def test_the_layer_is_kept_where_the_user_names_the_model(subject):
    said = {"class_path": "LLMDataModule", "init_args": {"model": "gpt2"}}
    assert subject(layer=3).data(said)["init_args"] == {"layer": 3, "skip_first": 0, "model": "gpt2"}


@pytest.mark.parametrize(
    ("said", "kept", "line"),
    [
        ({"layer": 1}, {"layer": 1}, "mine: was made for layer 3; measured with 1, as --data.layer says"),
        ({"hook": "model.norm"}, {"hook": "model.norm"}, "mine: was made for hook model.layers.3; measured with model.norm"),
        ({"model": "other"}, {"layer": 3, "model": "other"}, "mine: was made for model gpt2; measured with other"),
        ({"normalisation": "centred"}, {"layer": 3}, "mine: was made for normalisation none; measured with centred"),
        ({"layer": 3}, {"layer": 3}, None),
    ],
)
def test_what_the_user_says_otherwise_holds_and_is_told(subject, said, kept, line, capsys):
    tree = subject(model="gpt2", layer=3, hook="model.layers.3").data(said)
    told = [one.removeprefix("evaluate: ") for one in capsys.readouterr().out.splitlines()]
    assert {key: tree["init_args"].get(key) for key in kept} == kept
    assert len([key for key in ("layer", "hook") if key in tree["init_args"]]) == 1
    assert [one.partition(", as --data.")[0] for one in told] == ([line.partition(", as --data.")[0]] if line else [])


@pytest.mark.parametrize(
    ("reads", "said", "message"),
    [
        ({"model": "gpt2"}, {}, "mine: data.layer: not known (nothing says what it is); set --data.layer or --data.hook"),
        ({"model": "gpt2", "unknown": {"layer": "one head"}}, {}, "mine: data.layer: not known (one head)"),
        ({"layer": 2}, {}, "mine: data.model: not known (nothing says what it is); set --data.model"),
        ({"layer": 2}, {"model": "gpt2", "layer": 1, "hook": "a.b"}, "--data.layer and --data.hook: both say where"),
    ],
)
def test_what_nobody_says_is_asked_for(subject, reads, said, message):
    with pytest.raises(UserError) as asked:
        subject(**reads).data(said)
    assert message in str(asked.value)


def test_an_sae_of_which_nothing_is_known(tmp_path):
    save_sae(TopKSAE(6, 3, k=2), tmp_path)
    with pytest.raises(UserError, match="nothing says what activations it reads"):
        Subject("mine", tmp_path, None).data({})
    said = {"class_path": "LLMDataModule", "init_args": {"model": "gpt2"}}
    with pytest.raises(UserError, match=r"mine: data\.layer: not known"):  # the default is no layer in particular
        Subject("mine", tmp_path, None).data(said)


def test_a_failing_evaluation_of_a_folder_leaves_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    save_sae(TopKSAE(6, 3, k=2), "sae")
    toy = ["--data.class_path=ToyDataModule", "--data.d_in=7", "--data.firing.class_path=IndependentFiring"]
    toy += ["--data.firing.probabilities=[0.1,0.2]", "--suite=density", "--rows=64"]
    assert main(["evaluate", "sae", *toy]) == 2
    assert "reads activations of width 6, data gives 7" in capsys.readouterr().err
    assert main(["evaluate", "sae"]) == 2
    assert not (tmp_path / "runs/mlflow.db").exists()
    assert main(["evaluate", "sae", *toy, "--data.d_in", "6"]) == 0  # with a space, as the help shows it
    capsys.readouterr()
    assert main(["runs", "--json"]) == 0
    oracle, run = json.loads(capsys.readouterr().out)
    assert oracle["name"] == "oracle"
    assert run["metrics"]["density/l0"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sae", "--rowz", "3"], "evaluate: unknown option --rowz=3; did you mean 'rows'?"),
        (["sae", "--suite", "nothing"], "--suite: expected some of density, geometry"),
        (["sae", "--suite", "json.JSONDecoder"], "--suite: json.JSONDecoder: expected a class path"),
        (["--rows", "3"], "evaluate: name a run, a folder with an SAE"),
    ],
)
def test_mistakes_on_the_command_line(words, message, capsys):
    assert main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err


def test_only_seeds_are_averaged():
    grid = [(k, lr, seed) for k in (8, 32) for lr in (1, 2) for seed in (0, 1)]
    params = {f"{k} {lr} {seed}": {"data.k": str(k), "data.lr": str(lr), "seed_everything": str(seed)} for k, lr, seed in grid}
    results = {f"{k} {lr} {seed}": {"probing/f1_k1": 0.1 * lr + k / 100 + 0.01 * seed} for k, lr, seed in grid}
    rows = rows_of(results, params)
    assert {row.line for row in rows} == {"lr=1", "lr=2"}
    lines = [line.split() for line in means(rows)]
    assert lines[:2] == [["line", "lr=1", "lr=1", "lr=2", "lr=2"], ["k", "8", "32", "8", "32"]]
    assert lines[2][3::3] == ["0.0071"] * 4
    assert lines[2][1::3] == ["0.185", "0.425", "0.285", "0.525"]
    assert [row.values for row in rows_of(results, params, "lr")] == [{"lr": lr} for lr in (1, 1, 2, 2)] * 2
    with pytest.raises(UserError, match=r"--x: the SAEs do not differ in a number 'width'; they do in data.k, data.lr"):
        rows_of(results, params, "width")


OWN_SUITE = '''
"""A suite of scores from outside of the package."""

import torch

from hedgelab.protocols.evaluation import Scores, Suite


class Largest(Suite):
    """The largest activation.

    Args:
        batches: Batches of which it is the largest.
    """

    name = "largest"
    reads_language_model = False

    def __init__(self, batches: int = 1):
        self.batches = batches

    @torch.no_grad()
    def score(self, saes, readings):
        """Scores of each SAE."""
        x = torch.cat([readings.data.batch("val", i).x for i in range(self.batches)])
        for name, sae in saes.items():
            yield name, Scores({"largest/activation": float(sae.encode(x).to_dense().max()), "largest/rows": len(x)})
'''


def test_a_suite_of_ones_own_by_its_class_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "my_suites.py").write_text(OWN_SUITE)
    monkeypatch.syspath_prepend(tmp_path)
    save_sae(TopKSAE(6, 3, k=2), "sae")
    toy = ["--data.class_path=ToyDataModule", "--data.d_in=6", "--data.firing.class_path=IndependentFiring"]
    toy += ["--data.firing.probabilities=[0.4,0.5]", "--suite=my_suites.Largest", "--data.batch_size=8"]
    assert main(["evaluate", "sae", *toy, "--batches=2"]) == 0
    rows = next(line for line in capsys.readouterr().out.splitlines() if "largest/rows" in line)
    assert float(rows.split()[-1]) == 16
    assert "largest" not in suite_classes()
