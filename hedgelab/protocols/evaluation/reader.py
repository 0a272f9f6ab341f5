"""What SAEs read in an evaluation: activations, from a language model once for all SAEs, and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm import LLMDataModule
from hedgelab.data.llm.hook import SplicedModel
from hedgelab.data.llm.labelled import LabelledWords
from hedgelab.data.source import ActivationSource

_FORMAT = 1  # of kept activations; a new number leaves older ones aside
_WORDS_AT_ONCE = 128
_CONTEXTS_PER_PART = 64


class Rows(NamedTuple):
    """Activations ``x [rows, d_in]``, float32, as an SAE reads them.

    ``kept`` says which of the usable positions they come from, bool ``[usable]``: outliers of the norm are left out.
    """

    x: Tensor
    kept: Tensor


class Readings:
    """Activations as the SAEs of one evaluation read them, made when first asked for.

    ``known`` says how they were normalised for the SAEs; None measures that anew on the data.
    """

    def __init__(self, data: ActivationDataModule, known: ActivationSource | None = None) -> None:
        self.data, self._known = data, known
        self._rows: dict[int, Tensor] = {}

    @cached_property
    def model(self) -> ModelReader:
        """The language model that gives them; suites that need none do not ask."""
        assert isinstance(self.data, LLMDataModule)
        return ModelReader(self.data, self._known)

    def rows(self, least: int) -> Tensor:
        """At least so many activations of the validation stage, in whole batches or contexts, ``[rows, d_in]``."""
        if least in self._rows:
            return self._rows[least]
        if isinstance(data := self.data, LLMDataModule):
            reader, contexts = self.model, data.stage_contexts("val")
            count = -(-least // (data.context_length - data.skip_first))
            x = reader.rows("density", contexts.tokens[:count].long(), contexts.usable(data.skip_first)[:count]).x
        else:
            data.prepare_data()
            x = torch.cat([data.batch("val", i).x.float().cpu() for i in range(-(-least // data.batch_size))])
        self._rows[least] = x
        return x


class ModelReader:
    """A language model at work for evaluations.

    Every set of activations is kept under ``<cache_dir>/evaluation`` in parts of 64 contexts, so that an interrupted
    evaluation goes on where it was, and the next SAE needs no language model.
    """

    def __init__(self, data: LLMDataModule, known: ActivationSource | None = None) -> None:
        self.data, self._known = data, known
        data.files.prepare()

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.data.files.tokenizer()

    @cached_property
    def spliced(self) -> SplicedModel:
        """The whole model."""
        model = self.data.files.causal_lm(self.data.model_dtype, self.data.attention)
        return SplicedModel(model.to(self.data.device), self.data.hook_path)

    def rows(self, name: str, tokens: Tensor, usable: Tensor) -> Rows:
        """Activations at the usable positions (bool ``[n, length]``) of contexts, in reading order; ``name`` says what for."""
        parts = list(zip(torch.split(tokens, _CONTEXTS_PER_PART), torch.split(usable, _CONTEXTS_PER_PART), strict=True))
        shown = tqdm(parts, f"Activations for {name}", unit="part", delay=1)
        return self._usual(torch.cat([self._kept(part, partial(self._harvest, *part)) for part in shown]))

    def word_rows(self, words: LabelledWords) -> Rows:
        """Activations at words behind their common prompt."""

        def run() -> Tensor:
            shown = tqdm(
                torch.split(words.words, _WORDS_AT_ONCE), "Activations for first letters", unit="part", delay=1
            )
            return torch.cat([self.spliced.last_activations(words.prefix, part).float().cpu() for part in shown])

        return self._usual(self._kept((words.prefix, words.words), run))

    def normalise(self, raw: Tensor) -> Tensor:
        """Activations of the model as the SAE reads them."""
        x = raw if self._mean is None else raw - self._mean.to(raw)
        return x * self._scale

    def restore(self, x: Tensor) -> Tensor:
        """Activations as the SAE writes them, as the model's."""
        raw = x / self._scale
        return raw if self._mean is None else raw + self._mean.to(raw)

    @cached_property
    def _mean(self) -> Tensor | None:
        if self._known is None:
            return self.data.activation_mean
        return None if self._known.mean is None else torch.tensor(self._known.mean)

    @cached_property
    def _scale(self) -> float:
        return self.data.activation_scale if self._known is None else self._known.scale

    def _harvest(self, tokens: Tensor, usable: Tensor) -> Tensor:
        return self.data.harvester.rows(tokens, usable).float().cpu()

    def _usual(self, raw: Tensor) -> Rows:
        """Drop outliers of the norm, as in training."""
        norms = raw.norm(dim=-1)
        ratio = self.data.max_norm_ratio
        kept = torch.ones_like(norms, dtype=torch.bool) if ratio is None else norms <= ratio * norms.median()
        return Rows(self.normalise(raw[kept]), kept)

    def _kept(self, inputs: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        """A tensor from disk, or made now and kept there; known by model, tokenizer and hook, and by what it is made of."""
        digest = hashlib.sha256(repr((_FORMAT, self._model)).encode())
        for part in inputs:
            digest.update(part.numpy().tobytes() + str(part.shape).encode())
        file = Path(self.data.cache_dir) / "evaluation" / f"{digest.hexdigest()[:20]}.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".unfinished")
            save_file({"x": make().contiguous()}, unfinished)
            unfinished.rename(file)
        return load_file(file)["x"]

    @cached_property
    def _model(self) -> tuple[object, ...]:
        return *self.data.model_identity().values(), self.data.files.tokenizer_fingerprint()
