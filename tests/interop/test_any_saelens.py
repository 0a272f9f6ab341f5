"""Any SAE of the real SAELens: each architecture of its registry, from its folder, from memory and in older spellings."""

import copy
import json
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import hedgelab
from hedgelab import UserError, from_saelens
from hedgelab.cli import main
from hedgelab.data.source import ActivationSource
from hedgelab.interop.saelens import LAYOUTS, import_saelens
from hedgelab.saes import InferenceSAE, TopKSAE, VanillaSAE, load_sae, save_sae

D_IN, D_SAE, HEADS = 12, 40, 3
_SCALED = {"normalize_activations": "expected_average_only_in"}
_LN, _RESCALE = {"normalize_activations": "layer_norm"}, {"normalize_activations": "constant_norm_rescale"}
_RAW, _OUT = {"apply_b_dec_to_input": False}, {"apply_b_dec_to_input": False, "d_out": 7}
_NORMS = {"k": 5, "rescale_acts_by_decoder_norm": True}
_NO_NORMS = {"k": 5, "rescale_acts_by_decoder_norm": False}
_LEVELS = {"k": 5, "matryoshka_widths": [8, D_SAE]}
_HEADS = {"reshape_activations": "hook_z"}
CASES = {  # architecture, whether it is the training class, arguments, what it becomes
    "standard": ("standard", False, {}, "VanillaSAE"),
    "standard_raw": ("standard", False, _RAW, "VanillaSAE"),
    "standard_scaled": ("standard", False, _SCALED, "VanillaSAE"),
    "standard_heads": ("standard", False, _HEADS, "VanillaSAE"),
    "standard_layer_norm": ("standard", False, _LN, "InferenceSAE"),
    "standard_layer_norm_raw": ("standard", False, _LN | _RAW, "InferenceSAE"),
    "standard_layer_norm_heads": ("standard", False, _LN | _HEADS, "InferenceSAE"),
    "standard_rescale": ("standard", False, _RESCALE, "InferenceSAE"),
    "standard_bfloat16": ("standard", False, {"dtype": "bfloat16"}, "VanillaSAE"),
    "standard_float64": ("standard", False, {"dtype": "float64"}, "VanillaSAE"),
    "standard_training": ("standard", True, {}, "VanillaSAE"),
    "topk": ("topk", False, {"k": 5}, "TopKSAE"),
    "topk_norms": ("topk", False, _NORMS, "TopKSAE"),
    "topk_norms_scaled": ("topk", False, _NORMS | _SCALED, "TopKSAE"),
    "topk_layer_norm": ("topk", False, _NORMS | _LN, "InferenceSAE"),
    "topk_training": ("topk", True, {"k": 5}, "TopKSAE"),
    "abstopk": ("abstopk", False, {"k": 5}, "AbsTopKSAE"),
    "abstopk_norms": ("abstopk", False, _NORMS | _RAW, "AbsTopKSAE"),
    "abstopk_rescale": ("abstopk", False, {"k": 5} | _RESCALE, "InferenceSAE"),
    "abstopk_training": ("abstopk", True, {"k": 5}, "AbsTopKSAE"),
    "jumprelu": ("jumprelu", False, {}, "JumpReLUSAE"),
    "jumprelu_raw": ("jumprelu", False, _RAW, "JumpReLUSAE"),
    "jumprelu_scaled": ("jumprelu", False, _SCALED | _RAW, "JumpReLUSAE"),
    "jumprelu_layer_norm": ("jumprelu", False, _LN, "InferenceSAE"),
    "jumprelu_bfloat16": ("jumprelu", False, {"dtype": "bfloat16"} | _RAW, "JumpReLUSAE"),
    "jumprelu_training": ("jumprelu", True, {}, "JumpReLUSAE"),
    "gated": ("gated", False, {}, "JumpReLUSAE"),
    "gated_raw": ("gated", False, _RAW, "JumpReLUSAE"),
    "gated_layer_norm": ("gated", False, _LN, "InferenceSAE"),
    "gated_training": ("gated", True, {}, "JumpReLUSAE"),
    "batchtopk_training": ("batchtopk", True, _NO_NORMS, "BatchTopKSAE"),
    "batchtopk_training_norms": ("batchtopk", True, _NORMS, "BatchTopKSAE"),
    "batchtopk_training_layer_norm": ("batchtopk", True, _NORMS | _LN, "InferenceSAE"),
    "matryoshka_training": ("matryoshka_batchtopk", True, _LEVELS, "MatryoshkaSAE"),
    "transcoder": ("transcoder", False, _OUT, "InferenceSAE"),
    "transcoder_layer_norm": ("transcoder", False, _OUT | _LN, "InferenceSAE"),
    "skip_transcoder": ("skip_transcoder", False, _OUT, "InferenceSAE"),
    "jumprelu_transcoder": ("jumprelu_transcoder", False, _OUT, "InferenceSAE"),
    "jumprelu_skip_transcoder": ("jumprelu_skip_transcoder", False, _OUT, "InferenceSAE"),
}
_TEMPORAL = {"n_heads": 1, "bottleneck_factor": 40, "kval_topk": 5}
_WHITENED = {"normalize_activations": "covariance_whitening"}
REFUSED = {
    "temporal": ("temporal", False, _TEMPORAL, "architecture: 'temporal' reads earlier positions too"),
    "pursuit": ("matching_pursuit", False, {}, "architecture: 'matching_pursuit' takes latents one after another"),
    "pursuit_training": ("matching_pursuit", True, {"decoder_init_norm": 1.0}, "'matching_pursuit' takes latents one"),
    "whitened": ("standard", False, _WHITENED, "'covariance_whitening' is not folded into the weights; call the SAE's"),
}
_OLD = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "model_name": "gpt2-small"}
_OLD |= {"hook_point_layer": 2, "context_size": 32, "dataset_path": "some/text"}
_TWO = {"hook_point": "blocks.2.hook_resid_pre"}
OLD = {  # config, weights besides the four, what it becomes, layer, hook
    "no_architecture": (_TWO, {}, "VanillaSAE", 1, None),
    "raw": (_TWO | _RAW, {}, "VanillaSAE", 1, None),
    "normalised_or_not": (_TWO | {"normalize_activations": False}, {}, "VanillaSAE", 1, None),
    "tuned_by_1": (_TWO | {"finetuning_scaling_factor": False}, {"scaling_factor": "ones"}, "VanillaSAE", 1, None),
    "tuned_but_no_factor": (_TWO | {"finetuning_scaling_factor": True}, {}, "VanillaSAE", 1, None),
    "topk": (_TWO | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}, {}, "TopKSAE", 1, None),
    "jumprelu": (_TWO | {"architecture": "jumprelu"}, {"threshold": "some"}, "JumpReLUSAE", 1, None),
    "gated": (_TWO | {"architecture": "gated"}, {"b_gate": "some", "b_mag": "some", "r_mag": "some"}, "JumpReLUSAE", 1, None),
    "heads": ({"hook_point": "blocks.2.attn.hook_z"}, {}, "VanillaSAE", None, "blocks.2.attn.hook_z"),
    "layer_norm": (_TWO | _LN, {}, "InferenceSAE", 1, None),
}


def activations():
    """Inputs ``[64, d_in]`` with a mean."""
    return torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1)) * 3 + 0.5


def old_folder(folder, config, more):
    """A folder as SAELens wrote it before 6.0: everything lies flat."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if "b_mag" in more:
        del tensors["b_enc"]
    kinds = {"ones": lambda: torch.ones(D_SAE), "some": lambda: torch.rand(D_SAE, generator=generator)}
    folder.mkdir()
    save_file(tensors | {name: kinds[kind]() for name, kind in more.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**_OLD, **config}))
    return folder


@pytest.fixture(scope="module")
def peers(run_peer, tmp_path_factory):
    """All answers of SAELens, from one process: importing it takes long."""
    folder = tmp_path_factory.mktemp("saelens")
    save_file({"x": activations()}, folder / "x.safetensors")
    # Behind what that interpreter has: hedgelab, and what hedgelab needs besides.
    places = [str(Path(hedgelab.__file__).parents[1]), sysconfig.get_path("purelib")]
    common = {"x": str(folder / "x.safetensors"), "d_in": D_IN, "d_sae": D_SAE, "hedgelab": places}
    jobs = [{"name": "registry", "do": "list_saelens"}]
    for name, (architecture, training, arguments, _) in {**CASES, **REFUSED}.items():
        more = {"scaling_factor": 0.37} if _SCALED.items() <= arguments.items() else {}
        more |= {"heads": HEADS} if "reshape_activations" in arguments else {}
        made = {"architecture": architecture, "training": training, "arguments": arguments, "refused": name in REFUSED}
        jobs.append({"name": name, "do": "make_saelens", **made, **more})
    for name, (config, tensors, *_) in OLD.items():
        old_folder(folder / f"old_{name}", config, tensors)
        more = {"heads": HEADS} if name == "heads" else {}
        jobs.append({"name": f"old_{name}", "do": "load_saelens", **more})
    jobs.append({"name": "pretrained", "do": "import_release", "id": "jumprelu_raw"})
    for job in jobs:
        job |= {**common, "folder": str(folder / job["name"]), "answer": str(folder / f"{job['name']}.safetensors")}
    answers, missing = run_peer(jobs, folder)
    assert missing.keys() <= {"pretrained"}
    return folder, answers


def compare(sae, answer, atol=2e-5):
    """Activations and reconstructions of the test's inputs, to float32 rounding."""
    codes = sae.encode(activations())
    torch.testing.assert_close(codes.to_dense(), answer["acts"], atol=atol, rtol=1e-4)
    torch.testing.assert_close(sae.decode(codes), answer["x_hat"], atol=atol, rtol=1e-4)
    if "forward" in answer:
        torch.testing.assert_close(sae(activations()), answer["forward"], atol=atol, rtol=1e-4)
    assert 0 < (answer["acts"] != 0).float().mean() < 1  # latents fire, and not all of them


@pytest.mark.slow
def test_every_registered_architecture_is_tried(peers):
    registry = json.loads((peers[0] / "registry.json").read_text())
    registered = {(name, kind == "training") for kind, names in registry.items() for name in names}
    assert {(architecture, training) for architecture, training, *_ in (CASES | REFUSED).values()} == registered
    assert {architecture for architecture, *_ in CASES.values()} == set(LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_hedgelab_reads_what_saelens_saves(peers, name):
    folder, answers = peers
    sae, _ = import_saelens(folder / name)
    assert type(sae).__name__ == CASES[name][3]
    wide = CASES[name][2].get("dtype") == "float64"
    assert sae.W_dec.dtype == (torch.float64 if wide else torch.float32)
    compare(sae, answers[name], 1e-12 if wide else 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_hedgelab_takes_what_saelens_has_in_memory(peers, name):
    _, answers = peers
    if "our_acts" not in answers[name]:
        pytest.skip("the interpreter with SAELens finds nothing of what hedgelab needs")
    for part in ("acts", "x_hat", "forward"):
        torch.testing.assert_close(answers[name][f"our_{part}"], answers[name][part], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_hedgelab_takes_what_from_pretrained_gives(peers):
    _, answers = peers
    if "pretrained" not in answers:
        pytest.skip("the interpreter with SAELens finds nothing of what hedgelab needs")
    for part in ("acts", "x_hat"):
        torch.testing.assert_close(answers["pretrained"][part], answers["jumprelu_raw"][part], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_one_line_that_says_why(peers, name, tmp_path, capsys):
    folder, _ = peers
    assert main(["import", str(folder / name), "--to", str(tmp_path / "out")]) == 2
    told = [capsys.readouterr().err]
    if (live := folder / f"{name}.json").exists():
        told.append(json.loads(live.read_text())["refused"] + "\n")
    for line in told:
        assert REFUSED[name][3] in line
        assert line.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", OLD)
def test_older_spellings_are_read_as_saelens_reads_them(peers, name):
    folder, answers = peers
    sae, source = import_saelens(folder / f"old_{name}")
    *_, becomes, layer, hook = OLD[name]
    assert type(sae).__name__ == becomes
    assert (source.model, source.layer, source.hook) == ("gpt2", layer, hook)
    compare(sae, answers[f"old_{name}"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["matryoshka_training", "jumprelu_skip_transcoder", "topk_layer_norm"])
def test_an_import_is_an_sae_like_any_other(peers, name, tmp_path):
    folder, answers = peers
    save_sae(import_saelens(folder / name)[0], tmp_path / "sae")
    again = load_sae(tmp_path / "sae")
    assert getattr(again, "levels", [8, D_SAE]) == [8, D_SAE]
    compare(copy.deepcopy(again), answers[name])


def test_a_tuned_factor_multiplies_activations_where_they_are_decoded(tmp_path):
    """As SAELens 5 did; SAELens 6 knows no such factor and refuses one other than 1."""
    folder = old_folder(tmp_path / "sae", _TWO | {"finetuning_scaling_factor": True}, {"scaling_factor": "some"})
    told = load_file(folder / "sae_weights.safetensors")
    sae, _ = import_saelens(folder)
    codes = sae.encode(activations())
    x_hat = (codes.to_dense() * told["scaling_factor"]) @ told["W_dec"] + told["b_dec"]
    torch.testing.assert_close(sae.decode(codes), x_hat)


def theirs(scale=1.0, **config):
    """What ``from_saelens`` asks of an object."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    metadata = {"model_name": "gpt2-small", "hook_name": "blocks.2.hook_resid_post"}
    whole = {"architecture": "standard", "metadata": metadata, **config}
    return SimpleNamespace(cfg=SimpleNamespace(to_dict=lambda: whole), state_dict=lambda: tensors)


def test_what_an_object_says_of_its_activations_comes_along():
    sae, source = from_saelens(theirs())
    assert (type(sae), source.model, source.layer) == (VanillaSAE, "gpt2", 2)
    with pytest.raises(UserError, match="from_saelens: expected an SAE of SAELens 6, got a Linear"):
        from_saelens(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"is not folded into the weights; call its fold_activation_norm_scaling_factor"):
        from_saelens(theirs(**_SCALED))


@pytest.fixture
def sae_lens(monkeypatch):
    """A SAELens that lists one release and gives what it was asked for."""
    client = pytest.importorskip("huggingface_hub", reason="needs hedgelab[llm]")
    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", True)
    asked = []

    def from_pretrained(release, sae_id):
        asked.append((release, sae_id))
        if sae_id == "absent":
            raise ValueError("ID absent not found in release.\nValid IDs are ...")
        return theirs(**(_LN if sae_id == "normed" else {}))

    package, directory = ModuleType("sae_lens"), ModuleType("pretrained_saes_directory")
    package.SAE = SimpleNamespace(from_pretrained=from_pretrained)
    directory.get_pretrained_saes_directory = lambda: {"a-release": None}
    monkeypatch.setitem(sys.modules, "sae_lens", package)
    monkeypatch.setitem(sys.modules, "sae_lens.loading", ModuleType("loading"))
    monkeypatch.setitem(sys.modules, "sae_lens.loading.pretrained_saes_directory", directory)
    return asked


def test_import_by_release_and_id(sae_lens, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["import", "saelens:a-release/layer_2/width_40", "--to", "listed"]) == 0
    assert main(["import", "saelens:user/repository/layer_2", "--to", "other"]) == 0
    assert sae_lens == [("a-release", "layer_2/width_40"), ("user/repository", "layer_2")]
    assert "saelens → VanillaSAE, 12 × 40, in listed" in capsys.readouterr().out
    assert ActivationSource.load("listed").layer == 2
    assert main(["import", "saelens:a-release/normed", "--to", "normed"]) == 0
    assert "it cannot be trained on; measure it: hedgelab evaluate normed" in capsys.readouterr().out
    assert main(["import", "saelens:a-release/absent", "--to", "no"]) == 2
    told = capsys.readouterr().err
    assert "saelens:a-release/absent: SAELens does not give it (ID absent not found in release.)" in told
    assert told.count("\n") == 1


def test_without_saelens_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    assert main(["import", "saelens:a/b", "--to", str(tmp_path / "out")]) == 2
    assert "pip install 'hedgelab[saelens]'" in capsys.readouterr().err


def random_sae(sae):
    """An SAE with random weights."""
    for value in sae.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(value))).abs())
    return sae


def test_codes_know_how_to_undo_the_normalisation_of_their_rows():
    sae = random_sae(InferenceSAE(D_IN, D_SAE, "layer_norm", k=5))
    x = activations().view(4, 16, D_IN)
    codes = sae.encode(x)
    assert sae.decode(codes).shape == x.shape
    torch.testing.assert_close(sae(3 * x + 1), 3 * sae(x) + 1, atol=1e-3, rtol=1e-3)  # but for the 1e-5
    flat = sae.encode(activations())
    parts = torch.cat([sae.decode(part) for part in flat.split(10)])
    torch.testing.assert_close(parts, sae(activations()))
    mean = activations().mean(1, keepdim=True)
    std = activations().std(1, keepdim=True)
    torch.testing.assert_close(flat.on_raw().to_dense() @ sae.W_dec + sae.b_dec * std + mean, sae(activations()))
    with pytest.raises(UserError, match=r"decode: only the codes of encode know what layer_norm did to x"):
        sae.decode(codes.to_dense())


def test_measures_see_latents_in_units_of_the_activations():
    sae = random_sae(InferenceSAE(D_IN, D_SAE, "layer_norm", k=5))
    x = torch.randn(2048, D_IN, generator=torch.Generator().manual_seed(5)) * torch.logspace(-1, 1, 2048)[:, None]
    plain = SimpleNamespace(W_dec=sae.W_dec, encode=lambda rows: sae.encode(rows).on_raw().to_dense())
    plain.decode = lambda codes: sae(x)[: len(codes)]
    assert hedgelab.residual_hedging(x, sae).hedging == hedgelab.residual_hedging(x, plain).hedging
    with pytest.raises(UserError, match="a transcoder writes what another hook gives, and does not reconstruct x"):
        hedgelab.residual_hedging(x, InferenceSAE(D_IN, D_SAE, d_out=D_IN))


def test_nothing_is_trained_or_widened_of_them():
    sae = InferenceSAE(6, 3)
    with pytest.raises(UserError, match="cannot be trained"):
        sae.loss(torch.ones(2, 6))
    with pytest.raises(UserError, match=r"k: must lie between 1 and d_sae = 3"):
        InferenceSAE(6, 3, k=4)
    with pytest.raises(UserError, match="is no SAE that hedgelab widens"):
        hedgelab.saes.widen(sae, 1)
    assert TopKSAE.trainable
