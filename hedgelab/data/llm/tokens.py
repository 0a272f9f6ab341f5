"""Documents to contexts: tokenised once, packed to a fixed length, kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from hedgelab.data.llm.model import ModelFiles
from hedgelab.data.llm.text import TextSource
from hedgelab.errors import UserError

_FORMAT = 2  # of cached contexts; a new number leaves older ones aside
_DOCUMENTS_AT_ONCE = 64


class Contexts(NamedTuple):
    """Text as a language model reads it, ``[n, length]``: token ids, int32, and which are special (separators, chat marks)."""

    tokens: Tensor
    special: Tensor

    def usable(self, skip_first: int) -> Tensor:
        """Which positions count as activations: no special tokens, not the first ``skip_first``; ``[n, length]``."""
        keep = ~self.special
        keep[:, :skip_first] = False
        return keep


def load_contexts(
    text: TextSource, files: ModelFiles, length: int, cache_dir: str | Path = "runs/cache", most: int | None = None
) -> Contexts:
    """The first ``most`` packed contexts of a text (None: all); tokenised on first use, read from ``cache_dir`` afterwards."""
    limit = () if most is None else (most,)
    key = repr((_FORMAT, text.fingerprint(), files.tokenizer_fingerprint(), length, *limit))
    path = Path(cache_dir) / "tokens" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                contexts = pack(text.documents(), files.tokenizer(), length, most)
                unfinished = path.with_suffix(f".{os.getpid()}")
                save_file(contexts._asdict(), unfinished, metadata={"key": key})
                unfinished.rename(path)
    return Contexts(**load_file(path))


def pack(documents: Iterator[str], tokenizer: Any, length: int, most: int | None = None) -> Contexts:
    """Tokenise documents, join them with a separator and cut the result to contexts; an incomplete last one is dropped.

    Where the tokenizer itself starts every text with its BOS token, as models trained that way need, each context
    starts with it and it separates the documents; elsewhere the EOS token separates them. Documents behind the first ``most``
    contexts are not read.
    """
    opening, eos = opening_tokens(tokenizer), tokenizer.eos_token_id
    separator = opening or ([] if eos is None else [eos])
    body = length - len(opening)
    documents, parts, made = iter(documents), [torch.empty(0, dtype=torch.int32)], 0
    with tqdm(desc="Tokenising text (once)", unit=" tokens", unit_scale=True) as progress:
        while (most is None or made < most * body) and (some := list(islice(documents, _DOCUMENTS_AT_ONCE))):
            encoded = tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            ids = list(chain.from_iterable(document + separator for document in encoded))
            parts.append(torch.tensor(ids, dtype=torch.int32))
            made += len(ids)
            progress.update(len(ids))
    n = made // body if most is None else min(made // body, most)
    if n == 0:
        raise UserError(f"data.text: holds {made} tokens, too few for one context of data.context_length {length}")
    tokens = torch.cat(parts)[: n * body].view(n, body)
    if opening:
        tokens = torch.cat([torch.full((n, 1), opening[0], dtype=torch.int32), tokens], dim=1)
    added = [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
    special = torch.tensor(sorted({*tokenizer.all_special_ids, *added}), dtype=torch.int32)
    return Contexts(tokens.contiguous(), torch.isin(tokens, special))


def opening_tokens(tokenizer: Any) -> list[int]:
    """The BOS token, where the tokenizer puts it in front of every text, as models trained that way need; else nothing.

    Every place that tokenises puts these in front itself and leaves the tokenizer's own special tokens out: some tokenizers
    also append an EOS token, which belongs behind a document and never into the middle of a prompt.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return [bos] if full[: len(bare) + 1] == [bos, *bare] else []
