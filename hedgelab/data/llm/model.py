"""Language models by name: hub ids, local folders, GGUF files and the embedded ``smollm2``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hedgelab.data.llm.cache_identity import files_fingerprint
from hedgelab.data.llm.conversion import convert, converted_folder, find_gguf
from hedgelab.data.llm.hub import load, transformers

ModelDtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]


class ModelFiles:
    """The files of one language model, and what transformers makes of them.

    A GGUF file is converted to safetensors in the cache on first use. Nothing but a hub id ever asks the hub.

    Args:
        name: ``smollm2``, a ``.gguf`` file, a local folder, or an id on the Hugging Face hub.
        cache_dir: Folder for converted models.

    Raises:
        UserError: The model is not there, or a package that it needs is not installed.
    """

    def __init__(self, name: str, cache_dir: str | Path = "runs/cache") -> None:
        self.name = name
        self._gguf = find_gguf(name)
        folder = converted_folder(name, self._gguf, Path(cache_dir)) if self._gguf else Path(name)
        self._is_local = self._gguf is not None or folder.is_dir()
        self._location = str(folder) if self._is_local else name

    @property
    def location(self) -> str:
        """What transformers loads: a folder (that of a GGUF file as converted, once it is), or an id on the hub."""
        return self._location

    def prepare(self) -> None:
        """Convert a GGUF file that has not been converted yet."""
        if self._gguf:
            convert(self._gguf, Path(self._location))

    def config(self) -> Any:
        """The configuration (transformers' ``PretrainedConfig``), without touching any weights."""
        if self._gguf and not Path(self._location).is_dir():
            return load("AutoConfig", str(self._gguf.parent), local=True, gguf_file=self._gguf.name)
        return load("AutoConfig", self._location, self._is_local)

    def tokenizer(self) -> Any:
        """The tokenizer (transformers' ``PreTrainedTokenizerBase``)."""
        self.prepare()
        return load("AutoTokenizer", self._location, self._is_local)

    def tokenizer_fingerprint(self) -> str:
        """A string that changes whenever the tokenizer does; cheaper to have than the tokenizer itself."""
        self.prepare()
        if not self._is_local:
            return f"hub {self.name} at {getattr(self.config(), '_commit_hash', None)}"
        digest = hashlib.sha256()
        for file in sorted(Path(self._location).glob("*token*")) + sorted(Path(self._location).glob("vocab*")):
            digest.update(file.name.encode() + file.read_bytes())
        return f"tokenizer {digest.hexdigest()}"

    def fingerprint(self) -> str:
        """A string that changes whenever the weights do."""
        self.prepare()
        if not self._is_local:
            return f"hub {self.name} at {getattr(self.config(), '_commit_hash', None)}"
        return f"weights {files_fingerprint(Path(self._location))}"

    def causal_lm(self, dtype: ModelDtype = "float32", attention: Attention = "sdpa") -> nn.Module:
        """The whole causal language model: on the CPU, frozen, in evaluation mode."""
        self.prepare()
        options = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
        model: nn.Module = load("AutoModelForCausalLM", self._location, self._is_local, **options)
        return model.eval().requires_grad_(False)

    def skeleton(self) -> nn.Module:
        """The causal language model without weights, on the meta device."""
        with torch.device("meta"):
            model: nn.Module = transformers().AutoModelForCausalLM.from_config(self.config())
        return model.eval()
