"""Names of other libraries lead to the right place, or to none."""

import pytest

from hedgelab.data.llm.hook_names import HookPoint, read_hook_name


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("blocks.2.hook_resid_pre", HookPoint(layer=1)),
        ("blocks.0.hook_resid_pre", HookPoint(hook="blocks.0.hook_resid_pre")),
        ("blocks.2.hook_resid_post", HookPoint(layer=2)),
        ("blocks.2.hook_resid_mid", HookPoint(hook="blocks.2.hook_resid_mid")),
        ("blocks.2.hook_mlp_out", HookPoint(hook="blocks.2.hook_mlp_out")),
        ("blocks.2.attn.hook_z", HookPoint(hook="blocks.2.attn.hook_z")),
        ("hook_embed", HookPoint(hook="hook_embed")),
        ("layers.5", HookPoint(layer=5)),
        ("h.5", HookPoint(layer=5)),
        ("h.5.mlp", HookPoint(hook="h.5.mlp")),
        ("gpt_neox.layers.3", HookPoint(layer=3)),
        ("model.decoder.layers.11", HookPoint(layer=11)),
        ("model.layers.20.output", HookPoint(layer=20)),
        ("model.layers.20.self_attn.o_proj.input", HookPoint(hook="model.layers.20.self_attn.o_proj.input")),
        ("embed_tokens", HookPoint(hook="embed_tokens")),
        ("resid_post_layer_8", HookPoint(layer=8)),
        ("mlp_3", HookPoint(hook="blocks.3.hook_mlp_out")),
        ("attn_0", HookPoint(hook="blocks.0.hook_attn_out")),
        ("vision_tower.layers.4", HookPoint(hook="vision_tower.layers.4")),
    ],
)
def test_known_names(name, point):
    assert read_hook_name(name) == point


@pytest.mark.parametrize(
    "name",
    ["blocks.2.attn.hook_pattern", "blocks.2.attn.hook_q", "blocks.2.ln1.hook_scale", "hook_pos_embed", "unembed",
     "residual", "blocks.x.hook_resid_post", "blocks.2.mlp", "my sae", "", "../layers.3", "layers.-1"],
)  # fmt: skip
def test_other_names_are_not_known(name):
    point = read_hook_name(name)
    assert (point.layer, point.hook) == (None, None)
    assert point.why_not
