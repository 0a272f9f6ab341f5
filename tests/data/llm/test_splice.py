"""Reading and replacing activations inside a whole model."""

import pytest
import torch

from hedgelab.data.llm.hook import SplicedModel
from hedgelab.data.llm.model import ModelFiles
from hedgelab.errors import UserError

HOOK = "model.layers.1"


@pytest.fixture(scope="module")
def model(tiny_model):
    return SplicedModel(ModelFiles(tiny_model).causal_lm(), HOOK)


@pytest.fixture
def tokens():
    return torch.randint(4, 64, (3, 10), generator=torch.Generator().manual_seed(0))


def test_untouched_logits_are_the_models(model, tokens):
    torch.testing.assert_close(model.logits(tokens), model.model(input_ids=tokens).logits, rtol=0, atol=0)
    same = model.logits(tokens, lambda hooked: hooked)
    torch.testing.assert_close(same, model.logits(tokens), rtol=0, atol=0)


def test_replaced_activations_are_what_the_rest_computes_with(model, tokens):
    other = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(1))
    body = model.model.model
    with torch.no_grad():
        rotary = body.rotary_emb(other, torch.arange(10)[None])
        expected = body.layers[2](other, position_embeddings=rotary)
        expected = model.model.lm_head(body.norm(expected))
    torch.testing.assert_close(model.logits(tokens, lambda hooked: other), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.logits(tokens), model.model(input_ids=tokens).logits)  # the hook is gone


def test_a_common_prefix_is_run_once_and_changes_nothing(model, tokens):
    prefix, last = tokens[0, :7], torch.tensor([5, 6, 60])
    whole = torch.cat([prefix.expand(3, -1), last[:, None]], dim=1)
    expected = model.activations(whole)[:, -1]
    torch.testing.assert_close(model.last_activations(prefix, last), expected, rtol=1e-4, atol=1e-5)


def test_a_wrong_hook_is_named(tiny_model):
    with pytest.raises(UserError, match=r"has no module 'model\.layer\.1'; did you mean"):
        SplicedModel(ModelFiles(tiny_model).causal_lm(), "model.layer.1")
