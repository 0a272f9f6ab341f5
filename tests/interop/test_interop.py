"""SAEs go to the real SAELens and come from the real libraries: the same activations, the same reconstructions."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from hedgelab.data.source import ActivationSource
from hedgelab.interop.dictionary_learning import import_dictionary_learning
from hedgelab.interop.saelens import export_saelens, import_saelens
from hedgelab.interop.sparsify import import_sparsify
from hedgelab.saes import BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, TopKSAE, VanillaSAE, load_sae, save_sae

D_IN, D_SAE = 12, 40
EXPORTED = {
    "vanilla": lambda: VanillaSAE(D_IN, D_SAE, l1_coefficient=0.1),
    "topk": lambda: TopKSAE(D_IN, D_SAE, k=5),
    "topk_norm_aware": lambda: TopKSAE(D_IN, D_SAE, k=5, norm_aware_selection=True),
    "batch": lambda: BatchTopKSAE(D_IN, D_SAE, k=5),
    "batch_norm_aware": lambda: BatchTopKSAE(D_IN, D_SAE, k=5, norm_aware_selection=True),
    "jumprelu": lambda: JumpReLUSAE(D_IN, D_SAE, l0_coefficient=0.1),
    "matryoshka": lambda: MatryoshkaSAE(D_IN, lambda d_in: BatchTopKSAE(d_in, D_SAE, k=5), [8, D_SAE], beta=0.5),
}
_READS = {"model": "some/model", "hook": "model.layers.7", "layer": 7, "context_length": 128, "skip_first": 1}
SOURCES = {
    "unknown": None,
    "scaled": ActivationSource(**_READS, normalisation="unit_norm", scale=0.25),
    "centred": ActivationSource(**_READS, normalisation="centred", mean=tuple(0.1 * i for i in range(D_IN))),
}
SAELENS = {
    "standard": ("standard", False, {}),
    "standard_without_b_dec": ("standard", False, {"apply_b_dec_to_input": False}),
    "topk": ("topk", False, {"k": 5}),
    "topk_rescaled": ("topk", False, {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("jumprelu", False, {}),
    "jumprelu_without_b_dec": ("jumprelu", False, {"apply_b_dec_to_input": False}),
    "batchtopk_checkpoint": ("batchtopk", True, {"k": 5, "rescale_acts_by_decoder_norm": False}),
    "batchtopk_checkpoint_rescaled": ("batchtopk", True, {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "matryoshka_checkpoint": ("matryoshka_batchtopk", True, {"k": 5, "matryoshka_widths": [8, D_SAE]}),
}
CLASSES = {
    "standard": "VanillaSAE",
    "topk": "TopKSAE",
    "jumprelu": "JumpReLUSAE",
    "batchtopk": "BatchTopKSAE",
    "matryoshka_batchtopk": "MatryoshkaSAE",
}
DICTIONARIES = {
    "AutoEncoder": ({}, "VanillaSAE"),
    "AutoEncoderNew": ({}, "VanillaSAE"),
    "AutoEncoderTopK": ({"k": 5}, "TopKSAE"),
    "BatchTopKSAE": ({"k": 5}, "BatchTopKSAE"),
    "MatryoshkaBatchTopKSAE": ({"k": 5, "group_sizes": [8, D_SAE - 8]}, "MatryoshkaSAE"),
    "JumpReluAutoEncoder": ({}, "JumpReLUSAE"),
}


def activations():
    """Inputs ``[64, d_in]``."""
    return torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1)) * 3


def trained(make):
    """An SAE with weights that hide nothing, the same every time."""
    sae = make()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            if "threshold" in name:
                value.fill_(0.5 if value.dim() == 0 else -0.7)
                if value.dim():
                    value.add_(0.3 * torch.randn(value.shape, generator=generator))
            elif value.is_floating_point():
                value.copy_(0.4 * torch.randn(value.shape, generator=generator))
    return sae


@pytest.fixture(scope="module")
def peers(run_peer, tmp_path_factory):
    """All answers of the other libraries, from one process: importing them takes long."""
    folder = tmp_path_factory.mktemp("peers")
    save_file({"x": activations()}, folder / "x.safetensors")
    jobs = []

    def job(name, do, **more):
        answer, place = str(folder / f"{name}.safetensors"), str(folder / name)
        jobs.append(
            {"name": name, "do": do, "folder": place, "x": str(folder / "x.safetensors"), "answer": answer, **more}
        )

    for name, make in EXPORTED.items():
        for reads, source in SOURCES.items():
            export_saelens(trained(make), folder / f"{name}-{reads}", source)
            job(f"{name}-{reads}", "load_saelens", metadata=["model_name", "hook_name", "context_size", "seqpos_slice"])
    for name, (architecture, training, arguments) in SAELENS.items():
        more = {"architecture": architecture, "training": training, "arguments": arguments}
        job(name, "make_saelens", d_in=D_IN, d_sae=D_SAE, **more)
    job("layers.3", "make_sparsify", d_in=D_IN, d_sae=D_SAE, arguments={"k": 5})
    for name, (arguments, _) in DICTIONARIES.items():
        job(name, "make_dictionary_learning", d_in=D_IN, d_sae=D_SAE, dict_class=name, arguments=arguments)
    return folder, *run_peer(jobs, folder)


def answer_of(peers, name):
    folder, answers, missing = peers
    if name in missing:
        pytest.skip(missing[name])
    return folder / name, answers[name]["acts"], answers[name]["x_hat"]


def compare(sae, acts, x_hat, rows=None):
    """Activations and reconstructions of the test's inputs, to float32 rounding."""
    with torch.no_grad():
        codes = sae.encode(activations() if rows is None else rows)
        torch.testing.assert_close(codes.to_dense(), acts, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(sae.decode(codes), x_hat, atol=2e-5, rtol=1e-4)
    assert 0 < (acts > 0).float().mean() < 1  # latents fire, and not all of them


@pytest.mark.slow
@pytest.mark.parametrize("reads", SOURCES)
@pytest.mark.parametrize("name", EXPORTED)
def test_saelens_loads_what_hedgelab_exports(peers, name, reads):
    folder, acts, x_hat = answer_of(peers, f"{name}-{reads}")
    sae, source = trained(EXPORTED[name]), SOURCES[reads] or ActivationSource()
    mean = torch.zeros(D_IN) if source.mean is None else torch.tensor(source.mean)
    with torch.no_grad():
        codes = sae.encode((activations() - mean) * source.scale)
        folded = sae.W_dec.norm(dim=1) if "norm_aware" in name and "topk" in name.split("_")[0] else torch.ones(D_SAE)
        torch.testing.assert_close(codes.to_dense() * folded, acts, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(sae.decode(codes) / source.scale + mean, x_hat, atol=2e-5 / source.scale, rtol=1e-4)
    assert 0 < (acts > 0).float().mean() < 1
    told = json.loads(folder.with_suffix(".json").read_text())
    assert told["architecture"] == {"Vanilla": "standard", "TopK": "topk"}.get(type(sae).__name__[:-3], "jumprelu")
    if reads != "unknown":
        assert (told["model_name"], told["hook_name"]) == ("some/model", "model.layers.7")
        assert (told["context_size"], told["seqpos_slice"]) == (128, [1, None])


@pytest.mark.slow
@pytest.mark.parametrize("name", SAELENS)
def test_hedgelab_reads_what_saelens_saves(peers, name):
    folder, acts, x_hat = answer_of(peers, name)
    sae, _ = import_saelens(folder)
    assert type(sae).__name__ == CLASSES[SAELENS[name][0]]
    compare(sae, acts, x_hat)


@pytest.mark.slow
def test_hedgelab_reads_what_sparsify_saves(peers):
    folder, acts, x_hat = answer_of(peers, "layers.3")
    sae, source = import_sparsify(folder)
    assert (type(sae).__name__, sae.k) == ("TopKSAE", 5)
    assert (source.hook, source.layer) == ("model.layers.3", 3)
    compare(sae, acts, x_hat)


@pytest.mark.slow
@pytest.mark.parametrize("name", DICTIONARIES)
def test_hedgelab_reads_what_dictionary_learning_saves(peers, name):
    folder, acts, x_hat = answer_of(peers, name)
    sae, source = import_dictionary_learning(folder)
    assert type(sae).__name__ == DICTIONARIES[name][1]
    assert (source.model, source.layer) == ("some/model", 3)
    compare(sae, acts, x_hat)


@pytest.mark.slow
def test_an_import_is_an_sae_like_any_other(peers, tmp_path):
    folder, acts, x_hat = answer_of(peers, "matryoshka_checkpoint")
    sae, _ = import_saelens(folder)
    save_sae(sae, tmp_path / "sae")
    again = load_sae(tmp_path / "sae")
    assert again.levels == [8, D_SAE]
    compare(copy.deepcopy(again), acts, x_hat)
