"""Steps of an SAE as CUDA graphs: where a step is many small kernels, a GPU waits for Python, and a replay does not.

What is captured is loss and backward pass; data, optimiser and clocks stay as they are. A step whose
:meth:`~hedgelab.saes.base.SAE.step_key` has come several times in a row is captured and replayed until the key changes, so
schedules and warm-ups run as ever. Replays sum in the order in which other steps do: the numbers are the same up to the choice
of the dense path for ReLU and JumpReLU latents. ``HEDGELAB_CUDA_GRAPHS=1`` switches graphs on: no GPU has run them yet.
"""

import os
from typing import Any

import torch
from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes, Layout

SWITCH = "HEDGELAB_CUDA_GRAPHS"
STEPS_BEFORE = 16  # steps of one key before one is captured, which costs about as much as so many


class StepGraph:
    """The steps of one SAE, captured when that pays."""

    def __init__(self, sae: Any) -> None:
        self.sae = sae
        self._key: Any = None
        self._seen = 0
        self._graph: Any = None
        # A class from outside may depend on what its key does not say.
        known = all(type(part).__module__.startswith(("hedgelab.", "torch.")) for part in sae.modules())
        self._switched_on = known and os.environ.get(SWITCH, "0") == "1"

    def take(self, batch: Batch) -> Any:
        """Loss terms of a batch, whose gradients are the parameters' by now; None where the step must be taken one by one."""
        key = None
        if self._switched_on and batch.x.is_cuda and batch.weight is None and batch.x.dim() == 2:
            key = self.sae.step_key(len(batch.x))
        if key is not None:
            weights = tuple((one.data_ptr(), one.requires_grad, one.dtype) for one in self.sae.parameters())
            autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
            key = key, batch.x.shape, batch.x.dtype, autocast, weights
        if key is None or key != self._key:
            self._key, self._seen, self._graph = key, 0, None
        self._seen += 1
        if key is None or self._seen <= STEPS_BEFORE:
            return None
        if self._graph is None:
            self._graph = _Graph(self.sae, batch.x)
        return self._graph.replay(batch.x)

    def release(self) -> None:
        """Let go of the captured step and its memory."""
        self._key = self._graph = None


class _Graph:
    """A captured step: loss and backward pass of the activations in ``x``."""

    def __init__(self, sae: Any, x: Tensor) -> None:
        self.x = x.clone()
        self.parameters = [one for one in sae.parameters() if one.requires_grad]
        before, beside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.clear_autocast_cache()  # of casts that a replay would not make anew
        with ops.backend("fixed"):
            beside.wait_stream(before)
            with torch.cuda.stream(beside):
                for _ in range(2):  # kernels are compiled and loaded
                    self._run(sae)
                    torch.clear_autocast_cache()
            before.wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=beside, capture_error_mode="thread_local"):
                result = self._run(sae)
                values = [term.detach().float() for term in result.terms.values()]
                self.values = torch.stack([*values, result.total.detach().float()])
        torch.clear_autocast_cache()
        self.made, self.names, self.error = type(result), list(result.terms), result.error
        self.codes = result.codes.detach()
        self.gradients = [one.grad for one in self.parameters]

    def _run(self, sae: Any) -> Any:
        for one in self.parameters:
            one.grad = None
        result = sae.loss(Batch(self.x))
        result.total.backward()
        return result

    def replay(self, x: Tensor) -> Any:
        """The step of other activations; codes and error are those of the next replay as soon as there is one."""
        self.x.copy_(x)
        self.graph.replay()
        for one, gradient in zip(self.parameters, self.gradients, strict=True):
            one.grad = gradient
        *terms, total = self.values.clone().unbind()
        codes, layout = self.codes, self.codes.layout
        if layout is not None:  # anew, for what has been derived from the last replay's must not be kept
            codes = Codes(codes.values, Layout(layout.crow, layout.latents, layout.d_sae))
        result = self.made(dict(zip(self.names, terms, strict=True)), codes, self.error)
        result.__dict__["total"] = total
        return result
