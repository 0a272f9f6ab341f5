"""Hook points, and models cut there: nothing behind the hook is kept or computed.

Layers count from zero: layer 12 is what block ``layers[12]`` puts out, the residual stream that other tools call
``blocks.12.hook_resid_post`` (Hugging Face: ``hidden_states[13]``). A hook is the path of any module of the causal
language model, such as ``model.layers.12.mlp``; its output is taken.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hedgelab.errors import UserError


class CutModel(nn.Module):
    """A causal language model up to a hook: token ids in, the hooked module's output out.

    Blocks behind the hook and the language-model head are dropped, so take a model that nobody else uses.

    Args:
        model: A causal language model (transformers ``PreTrainedModel``), or its skeleton.
        hook: Path of a module in it.

    Raises:
        UserError: The model has no such module, or does not run it.
    """

    def __init__(self, model: nn.Module, hook: str) -> None:
        super().__init__()
        paths = {path: module for path, module in model.named_modules() if path}
        if hook not in paths:
            near = difflib.get_close_matches(hook, paths, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "give a path such as 'model.layers.12'"
            raise UserError(f"data.hook: {type(model).__name__} has no module {hook!r}; {hint}")
        self.hook = hook
        hooked = paths[hook]
        _drop_later_siblings(paths, hook)
        hooked.register_forward_hook(_stop)
        base = getattr(model, "base_model", model)  # without the head, unless the hook is there
        self.body = base if any(module is hooked for module in base.modules()) else model
        self._before = list(_blocks_before(paths, hook))
        self._hooked = hooked

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Run the blocks through ``torch.compile``; what leads to a hook inside the last one stays as it is.

        Args:
            backend: Of ``torch.compile``.
        """
        for block in [*self._before, self._hooked]:
            # The hook that ends the forward pass stays outside: it is an exception.
            block.forward = torch.compile(block.forward, backend=backend, dynamic=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hooked activations of contexts, each attending to itself alone.

        Args:
            tokens: Token ids, ``[n, length]``.

        Returns:
            Activations, ``[n, length, width]``, in the model's dtype.
        """
        try:
            # Causal masks come for free inside attention; a mask tensor would force the slower kernel.
            self.body(input_ids=tokens, use_cache=False)
        except _ReachedError as reached:
            return reached.output
        raise UserError(f"data.hook: the model does not run {self.hook!r} on plain text; choose another module")

    def width(self) -> int:
        """Width of the hooked activations; works on a skeleton."""
        device = next(self.parameters()).device
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        try:
            # A ready-made mask is taken as it is; without one transformers looks at values, which meta tensors lack.
            self.body(input_ids=token, use_cache=False, attention_mask=torch.ones(1, 1, 1, 1, device=device))
        except _ReachedError as reached:
            return reached.output.shape[-1]
        raise UserError(f"data.hook: the model does not run {self.hook!r} on plain text; choose another module")


class _ReachedError(Exception):
    """The hooked module has run: carries its output past all that would follow."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _stop(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
    """Forward hook that ends the model's forward pass here."""
    raise _ReachedError(output if isinstance(output, Tensor) else output[0])


def _drop_later_siblings(modules: dict[str, nn.Module], hook: str) -> None:
    """Shorten every list of blocks that the hook lies in to its own block."""
    parts = hook.split(".")
    for depth in range(1, len(parts)):
        blocks = modules[".".join(parts[:depth])]
        if isinstance(blocks, nn.ModuleList):
            del blocks[int(parts[depth]) + 1 :]


def _blocks_before(modules: dict[str, nn.Module], hook: str) -> Iterator[nn.Module]:
    """The blocks in front of the hook's own, of every list of blocks that the hook lies in."""
    parts = hook.split(".")
    for depth in range(1, len(parts)):
        blocks = modules[".".join(parts[:depth])]
        if isinstance(blocks, nn.ModuleList):
            yield from list(blocks)[: int(parts[depth])]
