"""A place in a language model: its activations are read there, or replaced while the rest of the model runs on."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hedgelab.data.llm.hook_names import hooked_module
from hedgelab.errors import UserError, one_line

Replacement = Callable[[Tensor], Tensor]
"""Takes hooked activations ``[n, length, width]`` to what shall stand in their place."""


class SplicedModel:
    """A causal language model (or its skeleton) whose activations at a hook are read, or replaced.

    ``hook`` is the path of a module, whose output is meant; its input where the path ends in ``.input``.
    """

    def __init__(self, model: nn.Module, hook: str) -> None:
        self.model, self.path = model, hook
        self.module, self.is_input = hooked_module(model, hook)
        base = getattr(model, "base_model", model)  # without the head, unless the hook is there
        self.body = base if any(module is self.module for module in base.modules()) else model
        self.vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def logits(self, tokens: Tensor, replace: Replacement | None = None) -> Tensor:
        """Next-token logits, ``[n, length, vocabulary]``, of token ids ``[n, length]``."""
        check_tokens(tokens, self.vocabulary)
        ids = tokens.long().to(self.device)
        if replace is None:
            return self.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
        heads_first = self._heads_first  # found by a forward pass, which cannot run inside another

        def change(output: Tensor) -> Tensor:
            rows = replace(self._by_token(output, *tokens.shape)).to(output.dtype)
            if output.ndim == 4 and heads_first:
                return rows.view(output.transpose(1, 2).shape).transpose(1, 2)
            return rows.view(output.shape)

        with self._register(change):
            return self.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

    @torch.inference_mode()
    def activations(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """Hooked activations ``[n, length, width]`` of token ids ``[n, length]``; nothing behind the hook runs.

        ``cache`` holds keys and values of a prefix (transformers' ``Cache``), and grows.
        """
        check_tokens(tokens, self.vocabulary)
        with self.stop():
            return self.run(tokens.long().to(self.device), cache)

    @torch.inference_mode()
    def last_activations(self, prefix: Tensor, last: Tensor) -> Tensor:
        """Hooked activations ``[n, width]`` at last tokens ``[n]`` behind a common prefix ``[length]``, which runs once."""
        from transformers import DynamicCache

        cache = DynamicCache()
        self.activations(prefix[None], cache)
        cache.batch_repeat_interleave(len(last))
        return self.activations(last[:, None], cache)[:, -1]

    def stop(self) -> RemovableHandle:
        """End every forward pass at the hook from now on; :meth:`run` then gives what was reached."""
        return self._register(_stop)

    def keep(self, seen: Callable[[Tensor], Any]) -> RemovableHandle:
        """Show every activation tensor that passes to ``seen``, from now on."""
        return self._register(lambda values: (seen(values), values)[1])

    def run(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """Activations ``[n, length, width]`` of token ids ``[n, length]``, after :meth:`stop`."""
        return self._by_token(self._reach(tokens, cache), *tokens.shape)

    def _register(self, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """Call ``change`` with each activation tensor as the model has it; what it returns takes the tensor's place."""

        def replaced(values: Any) -> Any:
            return change(values) if isinstance(values, Tensor) else (change(values[0]), *values[1:])

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return replaced(args), kwargs
            name = next(iter(kwargs))
            return args, kwargs | {name: change(kwargs[name])}

        if self.is_input:
            return self.module.register_forward_pre_hook(before, with_kwargs=True)
        return self.module.register_forward_hook(lambda module, args, output: replaced(output))

    def _by_token(self, output: Tensor, n: int, length: int) -> Tensor:
        """What the hook gave, as ``[n, length, width]``: heads side by side, and contexts apart."""
        if output.ndim == 4 and len(output) == n and self._heads_first:
            return output.transpose(1, 2).flatten(2)
        if output.ndim > 2 and output.shape[:2] == (n, length):
            return output.flatten(2)
        if output.ndim == 2 and len(output) == n * length:
            return output.view(n, length, -1)
        gives = f"gives numbers of shape {list(output.shape)} for {n} contexts of {length} tokens"
        raise UserError(f"data.hook: {self.path!r} {gives}, not one activation a token; choose another module")

    def _reach(self, tokens: Tensor, cache: Any = None) -> Tensor:
        try:
            # Causal masks come for free inside attention; a mask tensor would force the slower kernel.
            self.body(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)
        except _ReachedError as reached:
            output: Tensor = reached.args[0]
            return output
        raise UserError(f"data.hook: the model does not run {self.path!r} on plain text; choose another module")

    @cached_property
    def _heads_first(self) -> bool:
        """Whether the hook gives ``[n, heads, length, width]``, as attention does inside."""
        with self.stop():
            two, three = (self._reach(torch.zeros(1, n, dtype=torch.long, device=self.device)).shape for n in (2, 3))
        return len(two) == 4 and two[1] == three[1]


class CutModel(nn.Module):
    """A causal language model up to a hook: token ids in, activations out, with those at other ``hooks`` in their order.

    Blocks behind the hook and the language-model head are dropped, so take a model that nobody else uses.
    """

    def __init__(self, model: nn.Module, hook: str, hooks: Sequence[str] = ()) -> None:
        super().__init__()
        self.hook = SplicedModel(model, hook)
        self._hooks, self._passed = list(hooks or [hook]), threading.local()  # passes may run side by side
        for other in {*self._hooks} - {hook}:
            SplicedModel(model, other).keep(partial(setattr, self._passed, other))
        self._before: list[nn.Module] = []
        parts = hook.split(".")
        for depth in range(1, len(parts)):  # every list of blocks that the hook lies in
            blocks = model.get_submodule(".".join(parts[:depth]))
            if isinstance(blocks, nn.ModuleList):
                number = int(parts[depth])
                self._before += blocks[:number]
                del blocks[number + 1 :]
        self.body, self.vocabulary = self.hook.body, self.hook.vocabulary
        self.hook.stop()

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Run the blocks through ``torch.compile``; what leads to a hook inside the last one stays as it is."""
        hooked = [] if self.hook.is_input else [self.hook.module]
        for block in [*self._before, *hooked]:
            # The hook that ends the forward pass stays outside: it is an exception.
            block.forward = torch.compile(block.forward, backend=backend, dynamic=False)

    def spread(self, device_map: str | dict[str, Any], folder: Path) -> None:
        """Put the model's parts onto devices: ``auto``, or by the paths of modules; ``folder`` is the device ``disk``."""
        try:
            import accelerate
        except ImportError:
            raise UserError("data.device_map: needs accelerate; pip install 'hedgelab[llm]'") from None
        whole: Any = list(getattr(self.body, "_no_split_modules", None) or [])
        try:
            if isinstance(device_map, str):
                memory = accelerate.utils.get_balanced_memory(self.body, no_split_module_classes=whole)
                device_map = accelerate.infer_auto_device_map(self.body, memory, whole)
            accelerate.dispatch_model(self.body, device_map, offload_dir=str(folder))
        except (ValueError, KeyError, RuntimeError) as error:
            paths = ", ".join(name for name, _ in self.body.named_children())
            hint = f"expected auto, or a device for each of {paths} or what is in them"
            raise UserError(f"data.device_map: {one_line(str(error))}; {hint}") from error

    def forward(self, tokens: Tensor) -> Tensor:
        """Activations ``[n, length, width]`` of contexts ``[n, length]``, each attending to itself; hooks side by side."""
        last = self.hook.run(tokens)
        if self._hooks == [self.hook.path]:
            return last
        passed = {**vars(self._passed), self.hook.path: last}
        return torch.cat([passed[hook].view(last.shape) for hook in self._hooks], dim=-1)

    def width(self) -> int:
        """Width of the activations; a skeleton is enough."""
        probe = next(self.parameters())
        with getattr(probe, "fake_mode", contextlib.nullcontext()):
            widths = {self(torch.zeros(2, n, dtype=torch.long, device=probe.device)).shape[-1] for n in (7, 5)}
        if len(widths) > 1:
            raise UserError(f"data.hook: the width of {self.hook.path!r} depends on the context; choose another module")
        return int(widths.pop())


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Raise a UserError unless a model has an embedding for every token."""
    if tokens.numel() and (largest := int(tokens.max())) >= vocabulary:
        differ = f"its tokenizer gives token {largest}, its embedding has {vocabulary} rows"
        raise UserError(f"data.model: {differ}; give a folder in which tokenizer and weights belong together")


class _ReachedError(Exception):
    """The hook is reached: carries the activations past all that would follow."""


def _stop(output: Tensor) -> NoReturn:
    raise _ReachedError(output)
