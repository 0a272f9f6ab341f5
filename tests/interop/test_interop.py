"""SAEs go to the real SAELens and come from the real libraries: the same activations, the same reconstructions."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hedgelab.data.llm.model import find_model
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.interop.foreign import read_tensors
from hedgelab.interop.formats import import_dictionary_learning, import_folder, import_sparsify
from hedgelab.interop.saelens import export_saelens, import_saelens
from hedgelab.saes import BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, TopKSAE, VanillaSAE

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
                value.fill_(0.5)
            elif "theta" in name:
                value.copy_((0.3 * torch.randn(value.shape, generator=generator) - 0.7).exp())
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
        jobs.append({"name": name, "do": do, "folder": place, "x": str(folder / "x.safetensors"), "answer": answer, **more})

    for name, make in EXPORTED.items():
        for reads, source in SOURCES.items():
            export_saelens(trained(make), folder / f"{name}-{reads}", source)
            job(f"{name}-{reads}", "load_saelens", metadata=["model_name", "hook_name", "context_size", "seqpos_slice"])
    job("aliases", "list_model_aliases")
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
def test_hedgelab_reads_what_sparsify_saves(peers):
    folder, acts, x_hat = answer_of(peers, "layers.3")
    sae, source = import_sparsify(folder)
    assert (type(sae).__name__, sae.k) == ("TopKSAE", 5)
    assert (source.hook, source.layer) == ("layers.3", 3)  # data.hook finds it below the body of any model
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
def test_models_have_the_names_that_transformer_lens_gives_them(peers):
    folder, _, missing = peers
    if "aliases" in missing:
        pytest.skip(missing["aliases"])
    table = json.loads((folder / "aliases.json").read_text())
    translated = {alias: (find_model(alias), name) for name, aliases in table.items() for alias in aliases if "/" not in alias}
    known = {alias: pair for alias, pair in translated.items() if pair[0] is not None}
    assert len(known) > 60
    assert {alias: ours for alias, (ours, theirs) in known.items() if ours != theirs} == {}


@pytest.mark.parametrize("reads", SOURCES)
@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_comes_back_as_what_it_was(name, reads, tmp_path):
    sae, source = trained(EXPORTED[name]), SOURCES[reads] or ActivationSource()
    export_saelens(sae, tmp_path, SOURCES[reads])
    again, told = import_saelens(tmp_path)
    assert type(again) is type(sae)
    mean = torch.zeros(D_IN) if source.mean is None else torch.tensor(source.mean)
    with torch.no_grad():
        codes, raw = sae.encode((activations() - mean) * source.scale), again.encode(activations())
        norms = sae.W_dec.norm(dim=1) if name == "topk_norm_aware" else torch.ones(D_SAE)
        torch.testing.assert_close(raw.to_dense(), codes.to_dense() * norms, atol=2e-5, rtol=1e-4)
        x_hat = sae.decode(codes) / source.scale + mean
        torch.testing.assert_close(again.decode(raw), x_hat, atol=2e-5 / source.scale, rtol=1e-4)
    assert (told.hook, told.layer, told.scale) == (source.hook, source.layer, 1.0)


def test_an_untrained_threshold_stays_unknown(tmp_path):
    export_saelens(BatchTopKSAE(D_IN, D_SAE, k=5), tmp_path)
    assert import_saelens(tmp_path)[0].threshold.isnan()


def test_changed_thresholds_are_those_of_a_jumprelu(tmp_path):
    export_saelens(trained(EXPORTED["batch"]), tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["threshold"][3] *= 2
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    sae, _ = import_saelens(tmp_path)
    assert type(sae) is JumpReLUSAE
    torch.testing.assert_close(sae.thresholds(), tensors["threshold"])


def test_hooks_as_transformer_lens_names_them(tmp_path):
    metadata = export_saelens(trained(EXPORTED["vanilla"]), tmp_path, SOURCES["scaled"], "transformer_lens")["metadata"]
    assert (metadata["hook_name"], metadata["model_class_name"]) == ("blocks.7.hook_resid_post", "HookedTransformer")
    elsewhere = replace(SOURCES["scaled"], hook="model.layers.7.mlp", layer=None)
    with pytest.raises(UserError, match=r"no name for model.layers.7.mlp"):
        export_saelens(trained(EXPORTED["vanilla"]), tmp_path, elsewhere, "transformer_lens")


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"architecture": "crosscoder"}, {}, 'architecture: hedgelab reads "standard", "topk"'),
        ({"architecture": "temporal"}, {}, "architecture: 'temporal' reads earlier positions too"),
        ({"architecture": "gated"}, {}, "holds W_dec, W_enc, b_dec, b_enc; expected W_enc, b_mag, W_dec, b_dec, b_gate, r_mag"),
        ({"architecture": "transcoder"}, {"W_dec": torch.zeros(3)}, r"W_dec: expected \[40, 12\], got \[3\]"),
        ({"normalize_activations": "batch_norm"}, {}, 'normalize_activations: hedgelab reads "none"'),
        ({}, {"W_dec": torch.zeros(3, D_IN)}, r"W_dec: expected \[40, 12\], got \[3, 12\]"),
        ({}, {"b_dec": torch.full((D_IN,), torch.nan)}, "b_dec: holds values that are not finite"),
        ({}, {"r_mag": torch.zeros(3)}, "holds W_dec, W_enc, b_dec, b_enc, r_mag; expected W_enc, b_enc, W_dec, b_dec"),
        ({}, {"scaling_factor": torch.full((D_SAE,), 2.0)}, "finetuning_scaling_factor: is false, but"),
        ({}, {"scaling_factor": torch.ones(3)}, r"scaling_factor: expected \[40\], got \[3\]"),
        ({"architecture": "topk", "k": "many"}, {}, "k: expected a whole number of at least 1, got 'many'"),
        ({"architecture": "topk", "k": 400}, {}, "k: must lie between 1 and"),
        ({"architecture": "jumprelu"}, {}, "expected W_enc, b_enc, W_dec, b_dec, threshold"),
        ({"metadata": 3}, {}, "damaged"),
    ],
)
def test_what_hedgelab_cannot_read_is_refused_in_one_line(config, tensors, message, tmp_path):
    export_saelens(trained(EXPORTED["vanilla"]), tmp_path)
    written = json.loads((tmp_path / "cfg.json").read_text())
    written["metadata"].pop("hedgelab")
    (tmp_path / "cfg.json").write_text(json.dumps({**written, **config}))
    kept = load_file(tmp_path / "sae_weights.safetensors")
    save_file({**kept, **tensors}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match=message) as refused:
        import_saelens(tmp_path)
    assert "\n" not in str(refused.value)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a stranger\\'s code ran')",))


@pytest.mark.parametrize("content", [{"encoder.weight": Malicious()}, [torch.zeros(2)], {"k": 3}, b"no pickle"])
def test_pickles_with_more_than_tensors_are_refused(content, tmp_path):
    path = tmp_path / "ae.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match="refused"):
        read_tensors(path)


def test_folders_of_no_known_library(tmp_path):
    with pytest.raises(UserError, match=r"holds no SAE of a known library; expected cfg.json and sae_weights"):
        import_folder(tmp_path)
    export_saelens(trained(EXPORTED["vanilla"]), tmp_path)
    assert import_folder(tmp_path)[2] == "saelens"
    (tmp_path / "sae_weights.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="damaged"):
        import_folder(tmp_path)
