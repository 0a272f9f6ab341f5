"""Activations of a language model as a DataModule: streamed in shuffled blocks while an SAE trains on them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hedgelab.batch import Batch, on_device
from hedgelab.data.datamodule import NormalisedActivations, Stage, held_out_split
from hedgelab.data.llm.cache_files import ActivationCache
from hedgelab.data.llm.hook import CutModel
from hedgelab.data.llm.hook_names import block_number, block_path, hook_path
from hedgelab.data.llm.model import Attention, ModelDtype, ModelFiles, find_gguf
from hedgelab.data.llm.stream import BlockStream, Harvester, Rows, beside_training, shared_by_ranks
from hedgelab.data.llm.text import Contexts, StandardLibraryText, TextSource, load_contexts
from hedgelab.data.source import ActivationSource, Normalisation
from hedgelab.errors import UserError, whole_number


def model_path(name: Any) -> Path | None:
    """The file or folder that a model's name stands for, if it is on this machine."""
    return find_gguf(str(name)) or (Path(str(name)) if Path(str(name)).is_dir() else None)


class LLMDataModule(NormalisedActivations):
    """Activations of a language model at one hook, over packed contexts of text.

    The model is cut at the hook, and runs in the background while the SAE trains on the block before. Nothing is
    needed from a model hub with the defaults: a small model that comes from PyPI, and the text of Python's own
    documentation. With a ``cache`` that ``hedgelab cache`` has written the model does not run at all; the batches are
    those of the live stream, to the last bit where the model gives the same bits twice. Of several ranks each runs the
    model over its part of every block.

    Args:
        model: ``smollm2`` (extra ``hedgelab[smollm2]``), a ``.gguf`` file, a local folder, or a Hugging Face hub id.
        layer: Take the residual stream that block ``layers[layer]`` puts out; counted from zero, negative from the end.
        hook: Another place instead: path of a module whose output to take, such as ``model.layers.12.mlp``, or its input
            (``….input``); or a name of TransformerLens, such as ``blocks.12.hook_mlp_out``.
        text: The text; None is the standard library's documentation, about 530k tokens.
        context_length: Tokens the model sees at a time.
        max_contexts: Contexts of the text to use at most, the first ones; None uses all. Needed for texts without end.
        contexts_per_block: Contexts whose activations are shuffled together.
        contexts_at_once: Contexts of one forward pass.
        batch_size: Activations a step, over all ranks together.
        skip_first: First positions of each context to leave out; the very first is an attention sink in most models.
        max_norm_ratio: Leave out activations longer than this many times the median (further sinks); None keeps them.
        normalisation: ``unit_norm`` scales to a mean squared norm of 1, ``centred`` subtracts the mean; either as
            measured on the first block of training activations.
        held_out: Share of the contexts kept for validation and test, half each.
        model_dtype: Number format in which the model runs; batches are float32.
        storage_dtype: Number format to which activations are rounded, in a cache and live; None leaves the model's.
        attention: Attention implementation of transformers; None is the one that it prefers for the model.
        compile: Run the model's blocks through ``torch.compile``; pays for long runs on a GPU.
        device: Where the model runs; ``auto`` is a GPU if there is one. It may be another than the SAE's, such as ``cuda:1``.
        device_map: Spread the model over several devices: ``auto``, by their free memory, or a device for each path of a module
            in it, such as ``{embed_tokens: 0, layers: 1, ...}``. Activations then go to ``device``.
        seed: Seed of the order of the training data; None takes the run's. Validation and test never depend on it.
        val_batches: Batches of a validation or test pass.
        chunk_steps: Most training steps that travel together.
        cache: Folder of an activation cache to read instead of running the model; see ``hedgelab cache``.
        cache_dir: Folder for converted models and tokenised text.
    """

    where_and_how = frozenset({"cache", "cache_dir", "device", "device_map", "contexts_at_once", "compile"})
    inputs: ClassVar[Mapping[str, Callable[[Any], Any]]] = {
        "model": model_path,
        "text": lambda text: StandardLibraryText().fingerprint() if text is None else None,
    }

    def __init__(
        self,
        model: str = "smollm2",
        layer: int = 12,
        hook: str | None = None,
        text: TextSource | None = None,
        context_length: int = 256,
        max_contexts: int | None = None,
        contexts_per_block: int = 64,
        contexts_at_once: int = 8,
        batch_size: int = 1024,
        skip_first: int = 1,
        max_norm_ratio: float | None = 10.0,
        normalisation: Normalisation = "unit_norm",
        held_out: float = 0.1,
        model_dtype: ModelDtype = "float32",
        storage_dtype: ModelDtype | None = None,
        attention: Attention | None = None,
        compile: bool = False,
        device: str = "auto",
        device_map: str | dict[str, Any] | None = None,
        seed: int | None = None,
        val_batches: int = 8,
        chunk_steps: int = 1,
        cache: str | None = None,
        cache_dir: str = "runs/cache",
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, val_batches=val_batches, chunk_steps=chunk_steps)
        self.model, self.hook, self.layer = model, hook, whole_number("data.layer", layer, least=-(2**31))
        self.text = text or StandardLibraryText()
        self.context_length = whole_number("data.context_length", context_length)
        self.contexts_per_block = whole_number("data.contexts_per_block", contexts_per_block)
        self.contexts_at_once = whole_number("data.contexts_at_once", contexts_at_once)
        self.max_contexts = None if max_contexts is None else whole_number("data.max_contexts", max_contexts)
        self.skip_first = whole_number("data.skip_first", skip_first, least=0)
        try:
            name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
            torch.empty(0, dtype=torch.float64, device=name)  # which normalisation needs, and a Mac's GPU has not
            self.device = torch.device(name)
        except (RuntimeError, AssertionError, TypeError):
            raise UserError(f"data.device: {device!r} is not to be had here; expected auto, cpu or cuda") from None
        if skip_first >= context_length:
            raise UserError(f"data.skip_first: must be from 0 to data.context_length - 1, got {skip_first}")
        if max_norm_ratio is not None and max_norm_ratio <= 1:
            raise UserError(f"data.max_norm_ratio: must be greater than 1, or null to keep all, got {max_norm_ratio}")
        self.max_norm_ratio, self.normalisation, self.held_out = max_norm_ratio, normalisation, held_out
        self.model_dtype, self.attention, self.compile = model_dtype, attention, compile
        self.device_map = device_map
        self.storage_dtype: ModelDtype = storage_dtype or model_dtype
        self.cache, self.cache_dir = cache, cache_dir
        self._streams: dict[Stage, BlockStream] = {}
        self.tokens_read, self.seconds_read = 0, 0.0

    @cached_property
    def files(self) -> ModelFiles:
        """The model's files."""
        return ModelFiles(self.model, self.cache_dir)

    @cached_property
    def hook_path(self) -> str:
        """Path of the hooked module in the causal language model."""
        skeleton = self.files.skeleton()
        return hook_path(skeleton, self.hook) if self.hook else block_path(skeleton, self.layer)

    @cached_property
    def d_in(self) -> int:
        """Width of the hooked activations, from the model's configuration alone."""
        if self.hook is not None:
            return CutModel(self.files.skeleton(), self.hook_path).width()
        _ = self.hook_path  # refuses a layer that the model does not have
        return int(self.files.config().get_text_config().hidden_size)

    @cached_property
    def contexts(self) -> Contexts:
        """The packed text, all stages together."""
        self.files.check_length(self.context_length)
        return load_contexts(self.text, self.files, self.context_length, self.cache_dir, self.max_contexts)

    @cached_property
    def block(self) -> int | None:
        """The block whose residual stream it is, counted from zero; None for any other hook."""
        return block_number(self.files.skeleton(), self.hook_path)

    @cached_property
    def harvester(self) -> Harvester:
        """The cut model at work."""
        return self.harvester_of([self.hook_path])

    def harvester_of(self, hooks: Sequence[str]) -> Harvester:
        """The model at work, cut at this hook, giving what is at all of ``hooks`` side by side; none of them lies behind."""
        model = self.files.causal_lm(self.model_dtype, self.attention)
        with beside_training(self._own_device()):
            cut = CutModel(model, self.hook_path, hooks)
            if self.device_map is None:
                cut.to(self._own_device())
            else:
                cut.spread(self.device_map, Path(self.cache_dir) / "offloaded")
        if self.compile:
            cut.compile_blocks()
        device = None if self.device_map is None else self._own_device()
        return Harvester(cut, self.contexts_at_once, getattr(torch, self.storage_dtype), device)

    @cached_property
    def rows(self) -> Rows:
        """Gives activations by the numbers of contexts, of the model (ranks that train together share it) or the cache."""
        dtype, device, tokens = getattr(torch, self.storage_dtype), self._own_device(), self.contexts.tokens
        if self.cache is None:
            harvester = self.harvester
            return shared_by_ranks(self.timed(lambda numbers, usable: harvester.rows(tokens[numbers], usable)))
        cache, identity = ActivationCache(self.cache), self.identity()
        if cache.storage_dtype != "float32":  # which serves narrower formats too
            identity["storage_dtype"] = self.storage_dtype
        cache.check_identity(identity)
        cache.check_coverage(len(tokens))

        def rows(numbers: Tensor, usable: Tensor) -> Tensor:
            all_of_them = on_device(cache.read(numbers), device).to(dtype).flatten(0, 1)
            return all_of_them.index_select(0, on_device(usable.flatten().nonzero().flatten(), device))

        return self.timed(rows)

    def timed(self, rows: Rows) -> Rows:
        """The same rows, counted, and with them the time that they take."""

        def timed(numbers: Tensor, usable: Tensor) -> Tensor:
            start = time.perf_counter()
            found = rows(numbers, usable)
            self.tokens_read += usable.numel()
            self.seconds_read += time.perf_counter() - start
            return found

        return timed

    @cached_property
    def _text_of(self) -> Callable[[int], str]:
        """Gives the text of a token, which is decoded once."""
        tokenizer = self.files.tokenizer()
        return cache(lambda token: tokenizer.decode([token]))

    @cached_property
    def background(self) -> ThreadPoolExecutor:
        """The thread that makes blocks of all stages, one after the other."""
        return ThreadPoolExecutor(1, "hedgelab-blocks")

    def identity(self) -> dict[str, Any]:
        """What raw activations depend on, by config key."""
        text = f"{self.text.fingerprint()}; {self.files.tokenizer_fingerprint()}"
        return self.model_identity() | {"context_length": self.context_length, "text": text}

    def model_identity(self) -> dict[str, str]:
        """What the activations of given tokens depend on, by config key."""
        return {
            "model": self.files.fingerprint(),
            "hook": self.hook_path,
            "model_dtype": self.model_dtype,
            "attention": self.attention or self.files.attention(),
        }

    def prepare_data(self) -> None:
        """Convert the model and tokenise the text where that has not been done; on one rank only."""
        self.files.prepare()
        _ = self.contexts

    def setup(self, stage: str) -> None:
        """Load the model and run the first block, so that whatever is wrong shows before training starts."""
        _ = self.stream("train").block(0), self._measured

    def batch(self, stage: Stage, index: int) -> Batch:
        """Global batch number ``index``, ``[batch_size, d_in]``, float32; passes over the text repeat without end."""
        return self.normalised(self.stream(stage).batch(index).float())

    def batches_at(self, stage: Stage, numbers: Sequence[int]) -> Iterator[Batch]:
        """This rank's slices of the batches with these numbers, the next block under way in the background."""
        stream = self.stream(stage) if isinstance(numbers, range) else self._new_stream(stage)
        for rows in stream.read(numbers):
            yield self.slice_for_rank(self.normalised(rows.float()))

    def tokens(self, stage: Stage, index: int) -> list[str]:
        """The tokens that the rows of batch number ``index`` are of, as text."""
        return [self._text_of(token) for token in self.stream(stage).picked(index, self.contexts.tokens).tolist()]

    def batches_per_block(self, stage: Stage) -> int:
        """How many consecutive batches come from one block of contexts."""
        return self.stream(stage).batches_per_block

    def stream(self, stage: Stage) -> BlockStream:
        """The stage's stream of activations as the model gives them, before normalisation."""
        if stage not in self._streams:
            self._streams[stage] = self._new_stream(stage)
        return self._streams[stage]

    def _new_stream(self, stage: Stage) -> BlockStream:
        mine = self._split[stage]
        usable, seed = self.contexts.usable(self.skip_first)[mine], self.seed if stage == "train" else 0
        return BlockStream(
            self.rows, self.background, mine, usable, self.contexts_per_block, self.batch_size, self.max_norm_ratio, seed,
            stage, self._own_device(),
        )  # fmt: skip

    def measured_rows(self) -> Tensor:
        """The first block of training activations."""
        return self.stream("train").block(0).rows

    def source(self) -> ActivationSource:
        """Model, hook, contexts, and the normalisation as measured."""
        opening = set(self.contexts.tokens[:, 0].tolist())
        return self.described(
            model=self.model, hook=self.hook_path, layer=self.block, context_length=self.context_length,
            skip_first=self.skip_first, opens_with_bos=len(opening) == 1 and bool(self.contexts.special[:, 0].all()),
            text=self.text.fingerprint(), dataset=getattr(self.text, "dataset", None),
        )  # fmt: skip

    def stage_contexts(self, stage: Stage) -> Contexts:
        """The packed text of one stage."""
        return Contexts(*(part[self._split[stage]] for part in self.contexts))

    def describe(self) -> dict[str, float]:
        """Percentiles of the activation norms over the first block of training activations."""
        return {f"data/norm/{name}": value for name, value in self.stream("train").norm_percentiles().items()}

    def throughput(self) -> dict[str, float]:
        """Tokens a second of the language model, or of its cache, while it shared the machine with training."""
        return {"data/tokens_per_s": self.tokens_read / self.seconds_read if self.seconds_read else 0.0}

    def teardown(self, stage: str) -> None:
        """End the background work."""
        background = vars(self).pop("background", None)
        if background is not None:  # no further block begins, and the one in progress ends at its next forward pass
            background.shutdown(wait=False, cancel_futures=True)
        if "harvester" in vars(self):
            self.harvester.close()
        if background is not None:
            background.shutdown()
        # Ranks need not go on together from here; streams made later ask anew who shares their work.
        self._streams.clear()
        vars(self).pop("rows", None)

    def on_exception(self, exception: BaseException) -> None:
        """End the background work, so that an interrupted run does not wait for a block nobody will use."""
        self.teardown("fit")

    def _own_device(self) -> torch.device:
        """Where the model runs: of several GPUs this rank's own, unless the config names one."""
        own = None if self.trainer is None else self.trainer.strategy.root_device
        unnumbered = self.device.type == "cuda" and self.device.index is None
        return own if own is not None and unnumbered and own.type == "cuda" else self.device

    @cached_property
    def _split(self) -> dict[Stage, Tensor]:
        """Which contexts belong to which stage."""
        return held_out_split(len(self.contexts.tokens), self.held_out, "contexts")
