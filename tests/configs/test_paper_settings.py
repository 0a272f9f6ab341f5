"""The full-size configs have the settings of the paper (SPEC sections 6 and 9), and what those settings mean is so."""

from pathlib import Path

import pytest
import torch

from hedgelab.config.tree import load
from hedgelab.data.toy import IndependentFiring, ToyDataModule
from hedgelab.protocols.sweep.config import read_sweep
from hedgelab.saes import BatchTopKSAE
from hedgelab.saes.initialization import Initialization

LLM = Path(__file__).parents[2] / "configs/llm"
FULL_SIZE = sorted([*LLM.glob("gemma2_2b*.yaml"), *LLM.glob("llama32_1b*.yaml")])


def cells_of(file):
    """Whole configs: the cells of a sweep, or the one experiment."""
    tree = load(file)
    return [cell for _, cell in read_sweep(["--config", str(file)]).cells] if "sweep" in tree else [tree]


def flat(model):
    return model["init_args"].get("inner", model)


@pytest.mark.parametrize("file", FULL_SIZE, ids=lambda file: file.stem)
def test_optimiser_clipping_start_and_activations_are_the_papers(file):
    for tree in cells_of(file):
        model = flat(tree["model"])
        arguments = model["init_args"]
        l1 = model["class_path"] == "VanillaSAE"
        optimizer = arguments["optimizer"]["init_args"]
        assert list(optimizer["betas"]) == [0.0, 0.999]
        balance = "balance" in file.stem
        assert optimizer["lr"] == (7e-5 if l1 else 1e-4 if balance else 3e-4)
        assert arguments["gradient_clip_norm"] == 1.0
        assert arguments["init"] == {"decoder_norm": 1.4142 if l1 else 0.1, "b_dec": "geometric_median"}
        assert tree["data"]["init_args"]["max_norm_ratio"] is None
        assert tree["data"]["init_args"]["normalisation"] == "none"
        assert tree["trainer"]["precision"] == "bf16-mixed"
        assert tree["trainer"]["max_steps"] == (122_071 if balance else 61_036)


@pytest.mark.parametrize(
    ("name", "axis", "by_kind"),
    [
        ("gemma2_2b_layer_grid", "layer", {"BatchTopKSAE": [0, 6, 12, 18, 24], "VanillaSAE": [0, 6, 12, 18, 24]}),
        ("llama32_1b_layer_grid", "layer", {"BatchTopKSAE": [0, 7, 14], "VanillaSAE": [0, 7, 14]}),
        ("gemma2_2b_sparsity_grid", "k", {"BatchTopKSAE": [5, 10, 50, 100, 200]}),
        ("gemma2_2b_sparsity_grid", "l1_coefficient", {"VanillaSAE": [5, 7.5, 10, 20, 40]}),
        ("llama32_1b_sparsity_grid", "l1_coefficient", {"VanillaSAE": [0.2, 0.35, 0.5, 1]}),
    ],
)
def test_grids_are_the_papers(name, axis, by_kind):
    found = {}
    for tree in cells_of(LLM / f"{name}.yaml"):
        arguments = (tree["data"] if axis == "layer" else tree["model"])["init_args"]
        if axis in arguments and tree["model"]["class_path"] in by_kind:
            found.setdefault(tree["model"]["class_path"], set()).add(arguments[axis])
    assert found == {kind: set(values) for kind, values in by_kind.items()}


def test_llama_restarts_its_penalty_from_a_half_and_the_case_study_has_four_seeds():
    assert all(tree["hedge"]["l1_restart"] == 0.5 for tree in cells_of(LLM / "llama32_1b_sparsity_grid.yaml"))
    assert load(LLM / "gemma2_2b_case_study.yaml")["hedge"] == {"n_new": 1, "seeds": 4}


@pytest.mark.parametrize("name", ["gemma2_2b_width_sparsity_grid", "smollm2_width_sparsity_grid"])
def test_width_and_sparsity_vary_apart(name):
    places = {(tree["model"]["init_args"]["d_sae"], tree["model"]["init_args"]["k"]) for tree in cells_of(LLM / f"{name}.yaml")}
    widths, ks = ({place[i] for place in places} for i in range(2))
    assert len(places) == len(widths) * len(ks) >= 9
    shares = [k / width for width, k in places]
    assert len(set(shares)) < len(shares)  # some cells share the share of latents that fire


def test_a_norm_of_1_4142_is_that_of_kaiming_rows():
    d_in = 2304
    rows = torch.nn.init.kaiming_uniform_(torch.empty(64, d_in))
    assert rows.norm(dim=1).mean().item() == pytest.approx(1.4142, rel=0.01)
    _, decoder = Initialization(decoder_norm=1.4142, seed=0).random_weights(d_in, 64)
    torch.testing.assert_close(decoder.norm(dim=1), torch.full((64,), 1.4142))


def test_decoder_rows_and_bias_start_as_configured():
    data = ToyDataModule(IndependentFiring([0.3] * 6), d_in=8, batch_size=200, bias=2.0, seed=0)
    sae = BatchTopKSAE(8, 16, k=2, init=Initialization(decoder_norm=0.1, b_dec="geometric_median", seed=0))
    first = data.batch("train", 0)
    sae.initialize(first, data.feature_directions)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((16,), 0.1))
    torch.testing.assert_close(sae.W_enc, sae.W_dec.t())
    # The geometric median minimises the sum of distances: no step of any direction lowers it.
    x, start = first.x.double(), sae.b_dec.detach().double()
    least = (x - start).norm(dim=1).sum()
    for step in torch.cat([torch.eye(8), -torch.eye(8)]).double() * 0.01:
        assert (x - (start + step)).norm(dim=1).sum() > least - 1e-6
