"""What SAEs read in an evaluation: activations, from a language model once for all SAEs, and kept on disk."""

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm import LLMDataModule
from hedgelab.data.llm.hook import SplicedModel
from hedgelab.data.llm.labelled import LabelledWords
from hedgelab.data.source import ActivationSource

_FORMAT = 1  # of kept activations; a new number leaves older ones aside
_WORDS_AT_ONCE = 128
_CONTEXTS_PER_PART = 64


class Readings:
    """Activations as the SAEs of one evaluation read them: normalised as ``known`` says, or as measured anew on the data.

    ``first`` is the validation batch from which batches are counted.
    """

    def __init__(self, data: ActivationDataModule, known: ActivationSource | None = None, first: int = 0) -> None:
        self.data, self._known, self._first = data, known, first

    @cached_property
    def model(self) -> "ModelReader":
        """The language model that gives them; suites that need none do not ask."""
        assert isinstance(self.data, LLMDataModule)
        return ModelReader(self.data, self._known)

    def rows(self, least: int) -> Tensor:
        """At least so many activations of the validation stage, in whole batches or contexts, ``[rows, d_in]``."""
        if isinstance(data := self.data, LLMDataModule):
            contexts, count = data.stage_contexts("val"), -(-least // (data.context_length - data.skip_first))
            usable = contexts.usable(data.skip_first)[:count]
            return self.model.rows("density", contexts.tokens[:count].long(), usable)[0]
        return torch.cat([batch.x.float().cpu() for batch in self.batches(-(-least // data.batch_size))])

    def batches(self, count: int) -> Iterator[Batch]:
        """Batches of the validation stage."""
        self.data.prepare_data()
        return (self.data.batch("val", self._first + i) for i in range(count))


class ModelReader:
    """A language model at work for evaluations.

    Every set of activations is kept under ``<cache_dir>/evaluation`` in parts of 64 contexts, so that an interrupted
    evaluation goes on where it was, and the next SAE needs no language model.
    """

    def __init__(self, data: LLMDataModule, known: ActivationSource | None = None) -> None:
        self.data, self._known = data, known
        data.files.prepare()
        identity = (*data.model_identity().values(), data.files.tokenizer_fingerprint())
        self._identity = repr((_FORMAT, identity)).encode()

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.data.files.tokenizer()

    @cached_property
    def spliced(self) -> SplicedModel:
        """The whole model."""
        model = self.data.files.causal_lm(self.data.model_dtype, self.data.attention)
        return SplicedModel(model.to(self.data.device), self.data.hook_path)

    def rows(self, name: str, tokens: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
        """Activations at the usable positions (bool ``[n, length]``) of contexts, in reading order; ``name`` says what for.

        ``[rows, d_in]`` float32, as an SAE reads them, and which of the usable positions they come from: bool ``[usable]``,
        for outliers of the norm are left out.
        """

        def harvest(*part: Tensor) -> Tensor:
            return self.data.harvester.rows(*part)

        parts = list(zip(torch.split(tokens, _CONTEXTS_PER_PART), torch.split(usable, _CONTEXTS_PER_PART), strict=True))
        shown = tqdm(parts, f"Activations for {name}", unit="part", delay=1)
        return self._without_outliers(torch.cat([self._kept(harvest, *part) for part in shown]))

    def word_rows(self, words: LabelledWords) -> tuple[Tensor, Tensor]:
        """Activations at words behind their common prompt, and which of the words they are of."""

        def run(prefix: Tensor, last: Tensor) -> Tensor:
            shown = tqdm(torch.split(last, _WORDS_AT_ONCE), "Activations for first letters", unit="part", delay=1)
            return torch.cat([self.spliced.last_activations(prefix, part).float().cpu() for part in shown])

        return self._without_outliers(self._kept(run, words.prefix, words.words))

    def normalise(self, raw: Tensor) -> Tensor:
        """Activations of the model as the SAE reads them."""
        mean, scale = self._normalisation
        return (raw - mean.to(raw)) * scale

    def restore(self, x: Tensor) -> Tensor:
        """Activations as the SAE writes them, as the model's."""
        mean, scale = self._normalisation
        return x / scale + mean.to(x)

    @cached_property
    def _normalisation(self) -> tuple[Tensor, float]:
        known, data = self._known, self.data
        mean = data.activation_mean if known is None else known.mean
        return torch.as_tensor(0.0 if mean is None else mean), data.activation_scale if known is None else known.scale

    def _without_outliers(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Drop outliers of the norm, as in training."""
        norms, ratio = raw.norm(dim=-1), self.data.max_norm_ratio
        kept = torch.ones_like(norms, dtype=torch.bool) if ratio is None else norms <= ratio * norms.median()
        return self.normalise(raw[kept]), kept

    def _kept(self, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """What is made of the inputs, from disk or made now; known by model, tokenizer and hook, and by the inputs."""
        digest = hashlib.sha256(self._identity)
        for part in inputs:
            digest.update(part.numpy().tobytes() + str(part.shape).encode())
        file = Path(self.data.cache_dir) / "evaluation" / f"{digest.hexdigest()[:20]}.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".unfinished")
            save_file({"x": make(*inputs).float().cpu().contiguous()}, unfinished)
            unfinished.rename(file)
        return load_file(file)["x"]
