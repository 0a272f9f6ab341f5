"""A whole language model with a hook whose output can be read, or replaced while the rest runs on."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hedgelab.errors import UserError

Replacement = Callable[[Tensor], Tensor]
"""Takes hooked activations ``[n, length, width]`` to what shall stand in their place."""


class SplicedModel:
    """Logits of a causal language model, with its activations at a hook as they are or replaced.

    Args:
        model: A causal language model (transformers ``PreTrainedModel``).
        hook: Path of a module in it.

    Raises:
        UserError: The model has no such module.
    """

    def __init__(self, model: nn.Module, hook: str) -> None:
        modules = dict(model.named_modules())
        if hook not in modules:
            near = difflib.get_close_matches(hook, modules, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "give a path such as 'model.layers.12'"
            raise UserError(f"data.hook: {type(model).__name__} has no module {hook!r}; {hint}")
        self.model, self.hook, self._hooked = model, hook, modules[hook]

    @torch.inference_mode()
    def logits(self, tokens: Tensor, replace: Replacement | None = None) -> Tensor:
        """Next-token logits, ``[n, length, vocabulary]``, of token ids ``[n, length]``."""

        def hook(module: nn.Module, args: object, output: Any) -> Any:
            assert replace is not None
            if isinstance(output, Tensor):
                return replace(output).to(output.dtype)
            return (replace(output[0]).to(output[0].dtype), *output[1:])

        handle = None if replace is None else self._hooked.register_forward_hook(hook)
        try:
            logits: Tensor = self.model(input_ids=tokens.long().to(self.device), use_cache=False).logits
        finally:
            if handle is not None:
                handle.remove()
        return logits

    @torch.inference_mode()
    def activations(self, tokens: Tensor) -> Tensor:
        """Hooked activations ``[n, length, width]`` of token ids ``[n, length]``; nothing behind the hook runs."""
        return self._run_to_hook(tokens.long().to(self.device))

    @torch.inference_mode()
    def last_activations(self, prefix: Tensor, last: Tensor) -> Tensor:
        """Hooked activations at one last token behind a common prefix, ``[n, width]``.

        The prefix runs once; its keys and values are shared by all last tokens.

        Args:
            prefix: Token ids, ``[length]``.
            last: Token ids, ``[n]``.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        self._run_to_hook(prefix.long()[None].to(self.device), cache)
        cache.batch_repeat_interleave(len(last))
        return self._run_to_hook(last.long()[:, None].to(self.device), cache)[:, -1]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def _run_to_hook(self, tokens: Tensor, cache: Any = None) -> Tensor:
        caught: list[Tensor] = []

        def hook(module: nn.Module, args: object, output: Any) -> None:
            caught.append(output if isinstance(output, Tensor) else output[0])
            raise _ReachedError

        handle = self._hooked.register_forward_hook(hook)
        try:
            self.model(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)
        except _ReachedError:
            pass
        finally:
            handle.remove()
        if not caught:
            raise UserError(f"data.hook: the model does not run {self.hook!r} on plain text; choose another module")
        return caught[0]


class _ReachedError(Exception):
    """The hooked module has run: nothing behind it is needed."""
