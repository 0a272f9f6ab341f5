"""Every architecture is read where its hook says, in the words of transformers and of TransformerLens."""

from collections import Counter

import pytest
import torch

from hedgelab.data.llm.hook import CutModel, SplicedModel
from hedgelab.data.llm.hook_names import block_path, hook_path
from hedgelab.data.llm.model import ModelFiles
from hedgelab.errors import UserError

from .conftest import ARCHITECTURES

EAGER = ("Gemma2", "Bloom", "GPTJ", "GPTNeo")  # transformers has no sdpa for these
PARALLEL = ("GPTNeoX", "GPTJ", "Phi")  # attention and MLP read the same stream

pytestmark = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(scope="module")
def loaded(architecture):
    """Each architecture's files and whole model, made once."""
    made = {}

    def load(name):
        if name not in made:
            files = ModelFiles(architecture(name))
            made[name] = files, files.causal_lm()
        return made[name]

    return load


@pytest.fixture
def files(loaded, name):
    return loaded(name)[0]


@pytest.fixture
def model(loaded, name):
    return loaded(name)[1]


@pytest.fixture
def tokens():
    return torch.randint(4, 64, (3, 10), generator=torch.Generator().manual_seed(0))


def read(model, hook, tokens):
    return SplicedModel(model, hook_path(model, hook)).activations(tokens)


def test_layers_are_hidden_states(files, model, tokens):
    with torch.inference_mode():
        states = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(read(model, "blocks.0.hook_resid_pre", tokens), states[0], rtol=0, atol=0)
    for layer in (0, 1):  # transformers gives the last one behind the final norm
        torch.testing.assert_close(read(model, f"blocks.{layer}.hook_resid_post", tokens), states[layer + 1])
        torch.testing.assert_close(read(model, f"blocks.{layer + 1}.hook_resid_pre", tokens), states[layer + 1])
    with torch.inference_mode():
        torch.testing.assert_close(CutModel(files.causal_lm(), block_path(model, 1))(tokens), states[2])


def test_every_module_that_gives_an_activation_for_each_token(files, model, tokens):
    """The hook gives the module's own output, with heads side by side; the skeleton knows its width."""
    given, handles, calls = {}, [], Counter()
    for path, module in model.named_modules():

        def keep(module, args, output, path=path):
            calls[path] += 1
            given[path] = output

        handles.append(module.register_forward_hook(keep))
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    block = block_path(model, 1)
    paths = [path for path in given if path.startswith(block) and "experts" not in path and calls[path] == 1]
    assert len(paths) > 5
    for path in paths:
        expected = given[path] if isinstance(given[path], torch.Tensor) else given[path][0]
        if expected.shape[-2:] == (10, 10):  # attention's probabilities
            with pytest.raises(UserError, match=r"data\.hook: the width of .* depends on the context"):
                width(files, path)
            continue
        if expected.ndim == 4 and expected.shape[1] != 10:
            expected = expected.transpose(1, 2)
        expected = expected.reshape(3, 10, -1)
        torch.testing.assert_close(read(model, path, tokens), expected)
        if path in (block, f"{block}.mlp", f"{block}.self_attn.q_norm", f"{block}.fc1"):
            assert width(files, path) == expected.shape[-1], path


def width(files, path):
    return CutModel(files.skeleton(), path).width()


def test_names_of_transformer_lens(model, tokens, name):
    """What attention and MLP write adds up to what the block adds to its stream."""
    lens = {part: read(model, f"blocks.1.{part}", tokens) for part in (
        "hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")}  # fmt: skip
    total = lens["hook_resid_pre"] + lens["hook_attn_out"] + lens["hook_mlp_out"]
    torch.testing.assert_close(total, lens["hook_resid_post"], rtol=1e-4, atol=1e-4)
    if name in PARALLEL:
        with pytest.raises(UserError, match=r"data\.hook: .* has no single place for 'blocks\.1\.hook_resid_mid'"):
            read(model, "blocks.1.hook_resid_mid", tokens)
    else:
        middle = lens["hook_resid_pre"] + lens["hook_attn_out"]
        torch.testing.assert_close(read(model, "blocks.1.hook_resid_mid", tokens), middle, rtol=1e-4, atol=1e-4)
    z, path = read(model, "blocks.1.attn.hook_z", tokens), hook_path(model, "blocks.1.attn.hook_z")
    assert z.shape == (3, 10, 32)
    projection = path.removesuffix(".input")
    torch.testing.assert_close(model.get_submodule(projection)(z), read(model, projection, tokens))
    assert read(model, "hook_embed", tokens).shape == (3, 10, 32)


def test_replacing_by_itself_changes_nothing(model, tokens):
    """For outputs, inputs, and what lies with heads apart or contexts flattened."""
    plain = SplicedModel(model, hook_path(model, "blocks.1.hook_mlp_out")).logits(tokens)
    inside = [path for path, _ in model.named_modules() if ".1." in path and path.endswith(("q_norm", "fc1", "q_proj"))]
    for hook in ("blocks.1.hook_mlp_out", "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", *inside):
        spliced = SplicedModel(model, hook_path(model, hook))
        torch.testing.assert_close(spliced.logits(tokens, lambda rows: rows.clone()), plain)
        assert not torch.allclose(spliced.logits(tokens, lambda rows: rows * 2), plain)


def test_transformers_chooses_the_attention(files, model, name):
    assert files.attention() == ("eager" if name in EAGER else "sdpa")
    assert model.config._attn_implementation == files.attention()
    assert files.causal_lm(attention="eager").config._attn_implementation == "eager"
    if name in EAGER:
        with pytest.raises(UserError, match=r"data\.attention: 'sdpa' is not to be had for .*; leave the key out") as caught:
            files.causal_lm(attention="sdpa")
        assert "\n" not in str(caught.value)
