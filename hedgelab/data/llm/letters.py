"""Words of a model's own vocabulary by their first letter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hedgelab.data.llm.labelled import TEST_EVERY
from hedgelab.data.llm.tokens import opening_tokens
from hedgelab.errors import UserError, whole_number
from hedgelab.seeding import generator

_WORD = "[Ġ▁][A-Za-z]{2,}"  # the marks by which tokenizers say: a space in front


class LabelledWords(NamedTuple):
    """Single-token words behind a common prompt.

    Attributes:
        prefix: Tokens of the solved examples, ``[length]`` int64.
        words: The words' tokens, ``[n]`` int64.
        labels: Their first letters, bool ``[n, letters]``.
        test: Whether the word is for testing, bool ``[n]``.
        letters: The letters.
    """

    prefix: Tensor
    words: Tensor
    labels: Tensor
    test: Tensor
    letters: list[str]


@dataclass(frozen=True)
class FirstLetters:
    """Words of the model's own vocabulary in a spelling prompt, for the first-letter task.

    Attributes:
        words: Most words taken; null for all single-token words of ASCII letters.
        examples: Solved examples in front of each word.
        template: Prompt; ``{word}`` stands for the word.
    """

    words: int | None = 6000
    examples: int = 8
    template: str = "{word} has the first letter:"

    def __post_init__(self) -> None:
        if self.words is not None:
            whole_number("letters.words", self.words)
        whole_number("letters.examples", self.examples, 0)
        if "{word}" not in self.template:
            raise UserError(f"letters.template: must contain {{word}}, got {self.template!r}")

    def load(self, tokenizer: Any) -> LabelledWords:
        """The prompt, the words, their letters and the split; letters of fewer than 6 words are left out."""
        vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        words = [(i, token[1:].lower()) for i, token in enumerate(vocabulary) if re.fullmatch(_WORD, token or "")]
        if len(words) < 50:
            raise UserError("letters.words: the model's vocabulary has too few single-token words of ASCII letters")
        order = torch.randperm(len(words), generator=generator(0, "first letters")).tolist()
        words = [words[i] for i in order]
        shown, words = words[: self.examples], words[self.examples :][: self.words]
        examples = "".join(f"\n{self.template.format(word=' ' + w)} {w[0].upper()}" for _, w in shown)
        before = self.template.split("{word}")[0]
        prompt = tokenizer(f"{examples}\n{before}".rstrip(" "), add_special_tokens=False)["input_ids"]
        prefix = opening_tokens(tokenizer) + prompt
        letters = sorted({word[0] for _, word in words})
        labels = torch.tensor([[word[0] == letter for letter in letters] for _, word in words])
        test = torch.arange(len(words)) % TEST_EVERY == 0
        enough = ((labels & test[:, None]).sum(0) >= 2) & ((labels & ~test[:, None]).sum(0) >= 4)
        labels = labels[:, enough]
        names = [letter for letter, kept in zip(letters, enough.tolist(), strict=True) if kept]
        tokens = torch.tensor([i for i, _ in words])
        return LabelledWords(torch.tensor(prefix), tokens, labels, test, names)
