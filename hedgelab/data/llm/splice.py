"""A whole language model with a hook whose activations can be read, or replaced while the rest runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hedgelab.data.llm.hook import Hook, check_tokens

Replacement = Callable[[Tensor], Tensor]
"""Takes hooked activations ``[n, length, width]`` to what shall stand in their place."""


class SplicedModel:
    """Logits of a causal language model, with its activations at a hook (a module's path) as they are or replaced."""

    def __init__(self, model: nn.Module, hook: str) -> None:
        self.model = model
        self._hook = Hook(model, hook)

    @torch.inference_mode()
    def logits(self, tokens: Tensor, replace: Replacement | None = None) -> Tensor:
        """Next-token logits, ``[n, length, vocabulary]``, of token ids ``[n, length]``."""

        def change(output: Tensor) -> Tensor | None:
            if replace is None:
                return None
            return self._hook.as_it_was(replace(self._hook.by_token(output, *tokens.shape)), output)

        _ = replace is None or self._hook.heads_first  # found out by a forward pass, which cannot run inside another
        with self._hook.register(change):
            logits: Tensor = self.model(input_ids=self._ids(tokens), use_cache=False).logits
        return logits

    @torch.inference_mode()
    def activations(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """Hooked activations ``[n, length, width]`` of token ids ``[n, length]``; nothing behind the hook runs."""
        with self._hook.stop():
            return self._hook.run(self._ids(tokens), cache)

    @torch.inference_mode()
    def last_activations(self, prefix: Tensor, last: Tensor) -> Tensor:
        """Hooked activations at one last token ``[n]`` behind a common prefix ``[length]``, ``[n, width]``.

        The prefix runs once; its keys and values are shared by all last tokens.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        self.activations(prefix[None], cache)
        cache.batch_repeat_interleave(len(last))
        return self.activations(last[:, None], cache)[:, -1]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def _ids(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        return tokens.long().to(self.device)
