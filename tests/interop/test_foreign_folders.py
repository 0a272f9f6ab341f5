"""What the folders of other libraries say: understood, or said in one line; never guessed, never a traceback."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from hedgelab.cli import main
from hedgelab.data.llm.model import find_model
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.interop.formats import import_folder
from hedgelab.interop.saelens import WRITTEN_FOR, export_saelens
from hedgelab.saes import TopKSAE, VanillaSAE, load_sae

D_IN, D_SAE = 6, 10
METADATA = {"model_name": "gpt2-small", "hook_name": "blocks.2.hook_resid_post", "context_size": 32}


def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def saelens(folder, metadata=(), bom="", **config):
    """A folder of SAELens 6 with one setting changed."""
    folder.mkdir(exist_ok=True)
    save_file(weights(), folder / "sae_weights.safetensors")
    whole = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "metadata": {**METADATA, **dict(metadata)}, **config}
    (folder / "cfg.json").write_text(bom + json.dumps(whole), encoding="utf-8")
    return folder


def sparsify(folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    found = weights()
    tensors = {"encoder.weight": found["W_enc"].t().contiguous(), "encoder.bias": found["b_enc"]}
    save_file({**tensors, "W_dec": found["W_dec"], "b_dec": found["b_dec"]}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": 3, "d_in": D_IN, "expansion_factor": 32, **config}))
    return folder


def dictionary(folder, trainer, **config):
    folder.mkdir(exist_ok=True)
    found = weights()
    tensors = {"encoder.weight": found["W_enc"].t().contiguous(), "encoder.bias": found["b_enc"]}
    torch.save({**tensors, "decoder.weight": found["W_dec"].t().contiguous(), "b_dec": found["b_dec"]}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, **config}))
    return folder


@pytest.mark.parametrize(
    ("metadata", "layer", "hook"),
    [
        ({}, 2, None),
        ({"hook_name": "blocks.2.hook_resid_pre"}, 1, None),
        ({"hook_name": "blocks.2.hook_resid_pre", "hook_layer": 2}, 1, None),
        ({"hook_name": "gpt_neox.layers.3"}, 3, "gpt_neox.layers.3"),
        ({"hook_name": "blocks.2.hook_mlp_out", "hook_layer": 2}, None, "blocks.2.hook_mlp_out"),
        ({"hook_name": "blocks.2.attn.hook_z", "hook_layer": 2}, None, "blocks.2.attn.hook_z"),
        ({"hook_name": "model.embed_tokens"}, None, "model.embed_tokens"),
        ({"hook_name": "blocks.5.attn.hook_z", "hook_head_index": 3}, None, None),
        ({"hook_name": "blocks.5.attn.hook_q", "hook_layer": 5}, None, None),
        ({"hook_name": None, "hook_layer": 5}, None, None),
    ],
)
def test_saelens_hooks(metadata, layer, hook, tmp_path):
    _, source, _ = import_folder(saelens(tmp_path / "sae", metadata))
    assert (source.layer, source.hook) == (layer, hook)
    assert ("layer" in source.unknown) == (layer is None and hook is None)


@pytest.mark.parametrize(
    ("name", "layer", "known"),
    [("h.5", 5, True), ("gpt_neox.layers.3", 3, True), ("layers.7", 7, True), ("embed_tokens", None, True),
     ("layers.7.mlp", None, True), ("my sae", None, False)],
)  # fmt: skip
def test_sparsify_hookpoints_and_the_model_of_its_run(name, layer, known, tmp_path):
    folder = sparsify(tmp_path / "run" / name)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    _, source, _ = import_folder(folder)
    assert (source.layer, source.model) == (layer, "EleutherAI/pythia-70m")
    assert source.hook == (name if known else None)
    assert ("layer" in source.unknown) == (not known)


@pytest.mark.parametrize(
    ("trainer", "buffer", "layer", "reason"),
    [
        ({"layer": 3}, {}, 3, None),
        ({"layer": 3, "submodule_name": "resid_post_layer_3"}, {"io": "out", "ctx_len": 64}, 3, None),
        ({"submodule_name": "resid_post_layer_3"}, {}, 3, None),
        ({"layer": 3, "submodule_name": "resid_post"}, {}, 3, None),
        ({"layer": 3, "submodule_name": "resid_post_layer_4"}, {}, None, "but layer is 3"),
        ({"layer": 3}, {"io": "in"}, None, "what goes into a module"),
        ({}, {}, None, "names no layer"),
    ],
)
def test_dictionary_learning_submodules(trainer, buffer, layer, reason, tmp_path):
    trainer = {"dict_class": "AutoEncoderTopK", "k": 2, "lm_name": "pythia-70m-deduped", **trainer}
    _, source, _ = import_folder(dictionary(tmp_path / "sae", trainer, buffer=buffer))
    assert (source.layer, source.model) == (layer, "EleutherAI/pythia-70m-deduped")
    assert source.context_length == buffer.get("ctx_len")
    assert reason is None or reason in source.unknown["layer"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"normalize_activations": True}, "normalize_activations: True needs the factor"),
        ({"normalize_activations": "expected_average_only_in"}, "put activation_scaler.json"),
        ({"normalize_activations": "something"}, 'normalize_activations: hedgelab reads "none"'),
        ({"activation_fn_str": "tanh-relu"}, 'activation_fn_str: hedgelab reads "relu", "topk", got "tanh-relu"'),
        ({"activation_fn": "topk"}, "k: expected a whole number of at least 1, got None"),
        ({"activation_fn": "topk", "activation_fn_kwargs": "k=3"}, "k: expected a whole number of at least 1, got None"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": True}}, "k: expected a whole number of at least 1, got True"),
        ({"architecture": ["standard"]}, "architecture: hedgelab reads"),
        ({"reshape_activations": "heads"}, 'reshape_activations: hedgelab reads "none", "hook_z", got "heads"'),
        ({"apply_b_dec_to_input": "false"}, 'apply_b_dec_to_input: hedgelab reads true, false, got "false"'),
        ({"metadata": {**METADATA, "seqpos_slice": 5}}, r"seqpos_slice: expected a list such as [1, null], got 5"),
        ({"metadata": {**METADATA, "seqpos_slice": {}}}, r"seqpos_slice: expected a list such as [1, null], got {}"),
    ],
)
def test_what_saelens_says_and_hedgelab_cannot_do_is_refused(config, message, tmp_path, capsys):
    folder = saelens(tmp_path / "sae", **config)
    assert main(["import", str(folder), "--to", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("factor", ['{"scaling_factor": null}', '{"scaling_factor": "1"}', "[1]", '{"scaling_factor": -1}'])
def test_a_scaler_without_a_factor_is_refused(factor, tmp_path):
    folder = saelens(tmp_path / "sae", normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text(factor)
    with pytest.raises(UserError, match=r"activation_scaler\.json: "):
        import_folder(folder)


def test_the_factor_beside_the_weights_is_folded_in(tmp_path):
    plain, _, _ = import_folder(saelens(tmp_path / "plain"))
    folder = saelens(tmp_path / "scaled", normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.25, "has_whitening": false}')
    scaled, source, _ = import_folder(folder)
    x = torch.randn(8, D_IN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(scaled(x), plain(x * 0.25) / 0.25)
    assert (source.normalisation, source.scale) == ("none", 1.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"signed": True}, "signed: hedgelab does not know what True changes"),
        ({"activation": "groupmax"}, 'activation: hedgelab reads "topk", got "groupmax"'),
        ({"transcode": True}, "transcode: hedgelab does not know what True changes"),
        ({"k": True}, "k: expected a whole number of at least 1, got True"),
        ({"k": None}, "k: expected a whole number of at least 1, got None"),
    ],
)
def test_what_sparsify_says_and_hedgelab_cannot_do_is_refused(config, message, tmp_path):
    with pytest.raises(UserError) as refused:
        import_folder(sparsify(tmp_path / "layers.3", **config))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"trainer": {"k": 3}}, "trainer.dict_class: hedgelab reads AutoEncoder, "),
        ({}, "trainer.dict_class: hedgelab reads AutoEncoder, "),
        ({"trainer": {"dict_class": "GatedAutoEncoder"}}, "JumpReluAutoEncoder, got 'GatedAutoEncoder'"),
        ({"trainer": {"dict_class": "AutoEncoderTopK"}}, "k: expected a whole number of at least 1, got None"),
    ],
)
def test_what_dictionary_learning_does_not_say_is_refused(config, message, tmp_path):
    folder = dictionary(tmp_path / "sae", {})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as refused:
        import_folder(folder)
    assert message in str(refused.value)


def test_a_byte_order_mark_and_a_file_for_its_folder(tmp_path):
    folder = saelens(tmp_path / "sae", bom="\ufeff")
    for path in (folder, folder / "cfg.json", folder / "sae_weights.safetensors"):
        assert type(import_folder(path)[0]) is VanillaSAE


@pytest.mark.parametrize(
    ("metadata", "key", "reason"),
    [
        ({"model_name": "attn-only-2l"}, "model", "'attn-only-2l' is no model that hedgelab knows by this name"),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, "model", "loaded with center_writing_weights"),
        ({"model_from_pretrained_kwargs": {"revision": "step1000"}}, "model", "loaded with revision: step1000"),
        ({"seqpos_slice": [0, 16]}, "skip_first", "it reads positions [0, 16] (seqpos_slice)"),
        ({"seqpos_slice": [16]}, "skip_first", "it reads positions [16] (seqpos_slice)"),
        ({"hook_name": "blocks.5.attn.hook_z", "hook_head_index": 3}, "layer", "it reads one head of 'blocks.5.attn.hook_z'"),
    ],
)
def test_what_is_not_known_is_left_open_in_the_config_with_a_line(metadata, key, reason, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(saelens(tmp_path / "sae", metadata)), "--to", "out"]) == 0
    printed = capsys.readouterr().out.split("config:\n")[1]
    (line,) = (line for line in printed.splitlines() if line.startswith("#"))
    assert line.startswith(f"# data.{key} is not known: ")
    assert reason in line
    arguments = yaml.safe_load(printed)["data"]["init_args"]
    if key != "skip_first":
        assert arguments[key] == "???"
        (tmp_path / "on.yaml").write_text(printed)
        assert main(["fit", "--config", "on.yaml", "--trainer.logger", "false"]) == 2
        told = capsys.readouterr().err
        assert f"data.{key}" in told
        assert told.count("\n") == 1
    assert ActivationSource.load("out").unknown == {key: line.partition("known: ")[2]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-small", "gpt2"),
        ("gpt2", "gpt2"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("my/model", "my/model"),
        ("no-such", None),
    ],
)
def test_models(name, expected):
    assert find_model(name) == expected


class Own(TopKSAE):
    """Selects as TopK does, and then computes something else."""

    def encode(self, x):
        return super().encode(2 * x)


def test_what_saelens_cannot_compute_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="SAELens knows nothing that computes what Own does; --format hedgelab keeps it"):
        export_saelens(Own(D_IN, D_SAE, k=2), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dataset", "written"), [("monology/pile", "monology/pile"), (None, None), (".", None)])
def test_the_text_is_named_so_that_it_can_be_loaded_or_not_at_all(dataset, written, tmp_path):
    source = ActivationSource(model="gpt2", layer=3, text="the text, in words", dataset=dataset)
    metadata = export_saelens(TopKSAE(D_IN, D_SAE, k=2), tmp_path, source)["metadata"]
    assert metadata.get("dataset_path") == written
    assert metadata["sae_lens_version"] == WRITTEN_FOR
    assert metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert metadata["hedgelab"]["text"] == "the text, in words"


def test_export_in_hedgelabs_own_format(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(saelens(tmp_path / "sae")), "--to", "in"]) == 0
    assert main(["export", "in", "--to", "out", "--format", "hedgelab"]) == 0
    assert 'load it: hedgelab.saes.load_sae("out")' in capsys.readouterr().out
    assert ActivationSource.load("out").layer == 2
    assert torch.equal(load_sae("out").W_dec, weights()["W_dec"])
