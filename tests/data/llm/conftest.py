"""A language model small enough to build for each test session, saved like any other."""

import gzip
import json
from pathlib import Path

import lightning as L
import pytest
import torch

from hedgelab.data.llm import LLMDataModule, TextFiles

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="session")
def make_tokenizer():
    """Build a tokenizer of 60 words, with or without a BOS token before every text and an EOS token behind it."""
    pytest.importorskip("transformers")

    def make(with_bos: bool, with_eos: bool = False, eos: str = "</s>"):
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "<chat>", *WORDS])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        if with_bos or with_eos:
            single = f"{'<s> ' * with_bos}$A{f' {eos}' * with_eos}"
            special = [("<s>", 0), ("</s>", 1)]
            backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, unk_token="<unk>")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<chat>"]})
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tiny_model(make_tokenizer, tmp_path_factory) -> str:
    """Folder of a random Llama: 3 blocks, 32 wide."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(with_bos=False).save_pretrained(folder)
    return str(folder)


_IDS = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, **_IDS,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **_IDS}
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
ARCHITECTURES = {
    "Llama": _LLAMA,
    "Gemma2": {**_LLAMA, "head_dim": 8},
    "Gemma3Text": {**_LLAMA, "head_dim": 8},
    "GPT2": _GPT2,
    "GPTNeoX": _NEOX,
    "Qwen2": _LLAMA,
    "Qwen3": {**_LLAMA, "head_dim": 8},
    "Mistral": _LLAMA,
    "Mixtral": {**_LLAMA, "num_local_experts": 4},
    "Olmo2": _LLAMA,
    "Phi": _LLAMA,
    "OPT": {**_NEOX, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, **_IDS},
    "GPTJ": {**_GPT2, "rotary_dim": 4},
    "GPTNeo": {
        "hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 64, "intermediate_size": 48,
        "attention_types": [[["global", "local", "global"], 1]], **_IDS,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def architecture(make_tokenizer, tmp_path_factory):
    """Folder of a random model of an architecture: 3 blocks, 32 wide, 4 heads, 64 words."""
    transformers = pytest.importorskip("transformers", reason="needs hedgelab[llm]")
    made: dict[str, str] = {}

    def make(name: str, **options) -> str:
        if name not in made or options:
            folder = tmp_path_factory.mktemp(name)
            config = getattr(transformers, f"{name}Config")(**(ARCHITECTURES[name] | options))
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
                for parameter in model.parameters():  # biases and norms too, which begin at 0 and 1
                    torch.nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(folder)
            make_tokenizer(with_bos=False).save_pretrained(folder)
            if options:
                return str(folder)
            made[name] = str(folder)
        return made[name]

    return make


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> list[str]:
    """A text file and a compressed JSON-lines file, about 4 000 words in documents of 50."""
    folder: Path = tmp_path_factory.mktemp("text")
    documents = [" ".join(WORDS[(7 * i + i * i * j + j) % len(WORDS)] for j in range(50)) for i in range(80)]
    (folder / "first.txt").write_text(documents[0])
    with gzip.open(folder / "rest.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents[1:])
    return [str(folder / "first.txt"), str(folder / "rest.jsonl.gz")]


@pytest.fixture(scope="session")
def make_data(tiny_model, tiny_text, tmp_path_factory):
    """Build a DataModule over the tiny model and text."""
    cache = tmp_path_factory.mktemp("cache")

    def make(**options) -> LLMDataModule:
        defaults = {
            "model": tiny_model,
            "layer": 1,
            "text": TextFiles(tiny_text),
            "context_length": 16,
            "contexts_per_block": 20,
            "contexts_at_once": 8,
            "batch_size": 32,
            "seed": 0,
            "normalisation": "none",
            "max_norm_ratio": None,
            "device": "cpu",
            "cache_dir": str(cache),
        }
        return LLMDataModule(**(defaults | options))

    return make


class Recorder(L.LightningModule):
    """Keeps what it is given; one optimiser step a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch.x)
        self.optimizers().step()

    def validation_step(self, batch, _):
        self.seen.append(batch.x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture(scope="session")
def fit():
    """Train nothing on a DataModule; the trainer, and the model that keeps what it saw."""
    return _fit


def _fit(data, max_steps, **options):
    model = Recorder()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(
        max_steps=max_steps, accelerator="cpu", enable_checkpointing=False, num_sanity_val_steps=0,
        limit_val_batches=0, **quiet,
    )  # fmt: skip
    trainer.fit(model, datamodule=data, **options)
    return trainer, model
