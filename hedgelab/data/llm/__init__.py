"""Activations of real language models: text → tokens → a model cut at a hook → a stream of shuffled blocks."""

from hedgelab.data.llm.datamodule import LLMDataModule
from hedgelab.data.llm.hub_text import HubText
from hedgelab.data.llm.text import StandardLibraryText, TextFiles, TextSource

__all__ = ["HubText", "LLMDataModule", "StandardLibraryText", "TextFiles", "TextSource"]
