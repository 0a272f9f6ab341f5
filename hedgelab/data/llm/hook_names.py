"""Names of hooks, in the words of transformers, TransformerLens, SAELens, sparsify and dictionary_learning.

Layers count from zero. ``layer: 12`` is the residual stream behind block 12. TransformerLens calls the same place
``blocks.12.hook_resid_post``, and also ``blocks.13.hook_resid_pre``; sparsify calls it ``layers.12``; the module is
``model.layers.12`` in a Llama and ``transformer.h.12`` in a GPT-2. A name that ends in ``.input`` is what goes into a module.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from hedgelab.errors import UserError

_INPUT, _OUTPUT = ".input", ".output"
_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)+")
_BLOCK = re.compile(r"(?:(?:model|decoder|transformer|gpt_neox|language_model|text_model)\.)*(?:layers|h|blocks)\.(\d+)")
_LENS = re.compile(r"blocks\.(\d+)\.(hook_resid_(?:pre|mid|post)|hook_attn_out|hook_mlp_out|attn\.hook_z|mlp\.hook_post)")
_SHORT = re.compile(r"(resid|resid_post|resid_pre|mlp|mlp_out|attn|attn_out)(?:_layer)?_(\d+)")
_EMBEDDINGS = ("hook_embed", "embed", "embed_tokens", "embed_in", "wte", "word_embeddings")
_ENDS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "lm_head", "embed_out")

_ATTENTION = ("self_attn", "attn.attention", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "block_sparse_moe")
_LAST_OF_ATTENTION = [f"{part}.{last}" for part in _ATTENTION for last in ("o_proj", "out_proj", "c_proj", "dense")]
_LAST_OF_MLP = [f"{part}.{last}" for part in _MLP for last in ("down_proj", "c_proj", "fc_out", "dense_4h_to_h", "fc2")]
_NORMS_BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "final_layer_norm")
# What TransformerLens hooks, by the modules of a block of transformers: the first that is there.
_PLACES: dict[str, Sequence[str]] = {
    "hook_resid_mid": [norm + _INPUT for norm in _NORMS_BEFORE_MLP],
    "hook_attn_out": _ATTENTION,
    "hook_mlp_out": (*_MLP, "fc2"),
    "attn.hook_z": [last + _INPUT for last in _LAST_OF_ATTENTION],
    "mlp.hook_post": [last + _INPUT for last in (*_LAST_OF_MLP, "fc2")],
}
# Gemma-2 and OLMo-2 normalise what attention and MLP give before it is added to the residual stream.
_NORMED = {
    "hook_resid_mid": ("pre_feedforward_layernorm.input", "mlp.input"),
    "hook_attn_out": ("post_attention_layernorm",),
    "hook_mlp_out": ("post_feedforward_layernorm",),
}
# Bloom adds the residual stream inside its modules.
_BLOOM = {"hook_attn_out": _LAST_OF_ATTENTION, "hook_mlp_out": _LAST_OF_MLP}


class HookPoint(NamedTuple):
    """A hook as ``data.layer`` or else ``data.hook`` takes it, or why it is neither, in words that go after its name."""

    layer: int | None = None
    hook: str | None = None
    why_not: str | None = None


def read_hook_name(name: str) -> HookPoint:
    """What ``LLMDataModule`` has to be told to read the place that another library calls ``name``.

    No model is needed. Known are names of TransformerLens and SAELens (``blocks.2.hook_mlp_out``), hookpoints of sparsify
    (``layers.5``, ``h.5.mlp``, ``embed_tokens``), submodule names of dictionary_learning (``resid_post_layer_8``), and paths
    of modules. One head of a hook (SAELens' ``hook_head_index``) is no name: the caller must refuse it.

    >>> read_hook_name("blocks.2.hook_resid_pre").layer
    1
    >>> read_hook_name("gpt_neox.layers.3").layer
    3
    >>> read_hook_name("blocks.2.attn.hook_z").hook
    'blocks.2.attn.hook_z'
    >>> read_hook_name("blocks.2.attn.hook_pattern").why_not
    'is a hook of TransformerLens that no module of transformers has as its input or output'
    """
    name = name.removesuffix(_OUTPUT)
    if found := _BLOCK.fullmatch(name):
        return HookPoint(layer=int(found[1]))
    if found := _SHORT.fullmatch(name):
        place = {"resid": "resid_post", "mlp": "mlp_out", "attn": "attn_out"}.get(found[1], found[1])
        return read_hook_name(f"blocks.{found[2]}.hook_{place}")
    if found := _LENS.fullmatch(name):
        layer = int(found[1])
        if found[2] == "hook_resid_post":
            return HookPoint(layer=layer)
        if found[2] == "hook_resid_pre" and layer > 0:
            return HookPoint(layer=layer - 1)
        return HookPoint(hook=name)
    if name in (*_EMBEDDINGS, *_ENDS):
        return HookPoint(hook="hook_embed" if name == "embed" else name)
    if "hook_" in name or name.startswith("blocks."):
        return HookPoint(why_not="is a hook of TransformerLens that no module of transformers has as its input or output")
    if _PATH.fullmatch(name):
        return HookPoint(hook=name)
    return HookPoint(why_not="is neither a hook of TransformerLens nor the path of a module")


def block_path(model: Any, layer: int) -> str:
    """The module path of transformer block number ``layer``, from zero; negative numbers count from the end."""
    n_layers = model.config.get_text_config().num_hidden_layers
    if not -n_layers <= layer < n_layers:
        raise UserError(f"data.layer: the model has layers 0 to {n_layers - 1}, got {layer}")
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return f"{path}.{layer % n_layers}"
    raise UserError(f"data.layer: {type(model).__name__} has no list of {n_layers} blocks; set data.hook to a module")


def block_number(model: Any, path: str) -> int | None:
    """The number of the block whose output a hook is; None for any other hook."""
    number = path.rpartition(".")[2]
    is_block = number.isdecimal() and path == block_path(model, 0).removesuffix("0") + number
    return int(number) if is_block else None


def hook_path(model: Any, name: str) -> str:
    """The one name of a hook in a model: a module's path, with ``.input`` where it is what goes into the module.

    ``name`` is a path, also as seen from the model's body (``layers.5``), or a name of TransformerLens.
    """
    if name == "hook_embed":
        if model.config.model_type.startswith("gemma"):  # TransformerLens scales its embeddings by sqrt(d_model)
            return block_path(model, 0) + _INPUT
        embedding = model.get_input_embeddings()
        return str(next(path for path, module in model.named_modules() if module is embedding))
    if not (lens := _LENS.fullmatch(name)):
        bare = name.removesuffix(_OUTPUT)
        from_body = f"{getattr(model, 'base_model_prefix', '')}.{bare}"
        modules = dict(model.named_modules())
        if bare.removesuffix(_INPUT) not in modules and from_body.removesuffix(_INPUT) in modules:
            return from_body
        hooked_module(model, bare)  # says what is wrong
        return bare
    layer, place = int(lens[1]), lens[2]
    block = block_path(model, layer)
    if place == "hook_resid_post":
        return block
    if place == "hook_resid_pre":
        return block_path(model, layer - 1) if layer else block + _INPUT
    inside = {path for path, _ in model.get_submodule(block).named_modules()}
    candidates = _PLACES[place]
    if "post_feedforward_layernorm" in inside:
        candidates = _NORMED.get(place, candidates)
    elif model.config.model_type == "bloom":
        candidates = _BLOOM.get(place, candidates)
    elif place == "hook_resid_mid" and getattr(model.config, "use_parallel_residual", False):
        candidates = ()
    for path in candidates:
        if path.removesuffix(_INPUT) in inside:
            return f"{block}.{path}"
    raise UserError(f"data.hook: {type(model).__name__} has no single place for '{name}'; name a module")


def hooked_module(model: nn.Module, hook: str) -> tuple[nn.Module, bool]:
    """The module of a hook, and whether its input is meant rather than its output."""
    modules = {path: module for path, module in model.named_modules() if path}
    for path, is_input in ((hook, False), (hook.removesuffix(_INPUT), True)):
        if path in modules:
            return modules[path], is_input
    near = difflib.get_close_matches(hook, modules, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "give a path such as 'model.layers.12'"
    raise UserError(f"data.hook: {type(model).__name__} has no module {hook!r}; {hint}")
