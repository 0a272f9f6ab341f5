"""Models that are damaged, incomplete, unknown or would run code are one line; an edited one is another model."""

import json
import os
import shutil
import time

import pytest
import torch

from hedgelab.data.llm.model import ModelFiles
from hedgelab.digest import file_digest
from hedgelab.errors import UserError

transformers = pytest.importorskip("transformers", reason="needs hedgelab[llm]")


@pytest.fixture
def own(tiny_model, tmp_path):
    """A copy of the tiny model to damage."""
    return shutil.copytree(tiny_model, tmp_path / "own")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(act, *parts):
    with pytest.raises(UserError) as caught:
        act()
    line = str(caught.value)
    assert "\n" not in line
    assert all(part in line for part in parts), line


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_named(own):
    rewrite(own, lambda weights: [weights.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in range(3)])
    refused(
        ModelFiles(str(own)).causal_lm,
        "data.model: ", "lacks weights of LlamaForCausalLM", "random", "layers.0.mlp.up_proj.weight", "complete checkpoint",
    )  # fmt: skip


def test_tied_weights_are_not_missing(architecture):
    folder = architecture("Llama", tie_word_embeddings=True)
    model = ModelFiles(folder).causal_lm()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert ModelFiles(architecture("GPT2")).causal_lm() is not None


def test_weights_of_another_size_are_one_line(own):
    rewrite(own, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    refused(ModelFiles(str(own)).causal_lm, "data.model: ", str(own))


@pytest.mark.parametrize("what", ["truncated", "attention"])
def test_a_model_that_fails_to_load_leaves_the_default_number_format(own, architecture, what):
    if what == "truncated":
        (own / "model.safetensors").write_bytes((own / "model.safetensors").read_bytes()[:1000])
        refused(lambda: ModelFiles(str(own)).causal_lm("bfloat16"), "data.model: ")
    else:
        refused(lambda: ModelFiles(architecture("Gemma2")).causal_lm("bfloat16", "sdpa"), "data.attention: ")
    assert torch.get_default_dtype() == torch.float32


def test_truncated_weights_are_one_line(own):
    content = (own / "model.safetensors").read_bytes()
    (own / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(ModelFiles(str(own)).causal_lm, "data.model: ", "damaged or cut off", "copy them again")


def test_a_missing_quantisation_package_is_one_line(own):
    edit(own / "config.json", quantization_config={"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True})
    refused(ModelFiles(str(own)).causal_lm, "data.model: ", str(own), "package", "install it, or take unquantised weights")


@pytest.mark.parametrize("known", [False, True])
def test_code_of_a_models_own_never_runs(own, tmp_path, monkeypatch, known):
    """Nor is anybody asked whether it may."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    ran = tmp_path / "ran"
    (own / "code.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig as MyConfig\n")
    own_classes = {"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyModel"}
    edit(own / "config.json", auto_map=own_classes, model_type="llama" if known else "mine")
    edit(own / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.MyTokenizer"]})
    files = ModelFiles(str(own))
    if known:  # transformers has an implementation
        assert type(files.causal_lm()).__name__ == "LlamaForCausalLM"
    else:
        for act in (files.config, files.causal_lm, files.skeleton):
            refused(act, "data.model: ", "code of its own, which hedgelab does not run")
    assert not ran.exists()


def test_a_tokenizer_larger_than_the_embedding(architecture, make_data):
    data = make_data(model=architecture("Llama", vocab_size=40))
    refused(lambda: data.batch("train", 0), "data.model: ", "its tokenizer gives token 6", "embedding has 40 rows")


@pytest.mark.parametrize("name", ["GPT2", "OPT", "GPTJ", "GPTNeo", "Bloom", "Llama", "Mixtral"])
def test_contexts_longer_than_the_table_of_positions(architecture, make_data, name):
    data = make_data(model=architecture(name), context_length=80, batch_size=16)
    if name in ("Bloom", "Llama", "Mixtral"):  # these compute their positions
        assert data.batch("train", 0).x.isfinite().all()
    else:
        refused(lambda: data.batch("train", 0), "data.context_length: 80 is more than the 64 positions", "at most 64")


def test_names_of_transformer_lens_lead_to_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(ModelFiles("gpt2-small").config, "data.model: 'gpt2-small' is neither", "the hub has it as 'gpt2'")
    refused(ModelFiles("gemma-2-2b").config, "the hub has it as 'google/gemma-2-2b'")


def large_model(folder, architecture, edited=False):
    """Some weights far larger than what samples of 4 KiB cover, and a copy with 100 kB of other numbers in their middle."""
    source = architecture("Llama", vocab_size=40_000)
    shutil.copytree(source, folder)
    if edited:
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        step = len(content) // 255  # between two samples
        start = (middle // step) * step + 5000
        content[start : start + 10_000] = bytes(10_000)
        path.write_bytes(content)
    return ModelFiles(str(folder))


def test_any_edit_of_weights_is_another_model(architecture, tmp_path):
    plain, same = large_model(tmp_path / "plain", architecture), large_model(tmp_path / "same", architecture)
    edited = large_model(tmp_path / "edited", architecture, edited=True)
    assert plain.fingerprint() == same.fingerprint()
    assert plain.fingerprint() != edited.fingerprint()


def test_a_remembered_digest_does_not_outlive_the_file(tmp_path, monkeypatch):
    path, memory = tmp_path / "file", tmp_path / "memory" / "digests.json"
    path.write_bytes(b"1234")
    os.utime(path, (1e9, 1e9))
    monkeypatch.setattr("hedgelab.digest._SETTLED_SECONDS", 0.05)
    time.sleep(0.1)
    first = file_digest(path, memory)
    assert json.loads(memory.read_text())[str(path)][-1] == first
    monkeypatch.setattr("hedgelab.digest._remembered", {})
    monkeypatch.setattr("hashlib.file_digest", lambda *args: pytest.fail("read anew"))
    assert file_digest(path, memory) == first
    monkeypatch.undo()
    path.write_bytes(b"1235")
    os.utime(path, (1e9, 1e9))  # as if it had not changed
    assert file_digest(path, memory) != first
    memory.write_text("{")
    assert file_digest(path, memory) == file_digest(path)


def test_merges_belong_to_the_tokenizer(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("a b")
    first = ModelFiles(str(tmp_path)).tokenizer_fingerprint()
    (tmp_path / "merges.txt").write_text("b a")
    assert ModelFiles(str(tmp_path)).tokenizer_fingerprint() != first


def test_kept_evaluation_activations_are_those_of_the_weights(own, make_data, tmp_path):
    """Weights edited in place, under the same name and configuration, are another model."""
    from hedgelab.protocols.evaluation import Readings

    def rows():
        data = make_data(model=str(own), cache_dir=str(tmp_path / "cache"))
        tokens = data.contexts.tokens[:4]
        found = Readings(data).model.rows("a test", tokens, torch.ones_like(tokens, dtype=torch.bool))[0]
        data.teardown("fit")
        return found

    before = rows()
    assert torch.equal(rows(), before)
    rewrite(own, lambda weights: weights.update({"model.embed_tokens.weight": 2 * weights["model.embed_tokens.weight"]}))
    assert not torch.allclose(rows(), before)
