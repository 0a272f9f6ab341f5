"""Texts with answers, for evaluations: tagged words, and words by their first letter."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hedgelab.data.llm.text import StandardLibraryText, as_text, json_lines, opening_tokens
from hedgelab.errors import UserError, whole_number
from hedgelab.seeding import generator

_MOST_TWICE = 0.02  # share of words that may be tagged twice (the first tag counts): corpora have slips
_TEST_EVERY = 3  # every third document (or word) is for testing
_LEAST = 5  # examples of a class, and others, in either split
_WORD = "[Ġ▁][A-Za-z]{2,}"  # the marks by which tokenizers say: a space in front


class LabelledRows(NamedTuple):
    """Tokens in contexts ``[n, length]``, at ``positions`` (context and position, ``[rows, 2]``), with their classes.

    ``labels`` (bool ``[rows, classes]``) and ``test`` (bool ``[rows]``) are of the tokens; no document is split for testing.
    """

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    test: Tensor
    classes: list[str]


class LabelledWords(NamedTuple):
    """Single-token words ``[n]`` behind a common prompt ``[length]``, and their first letters, bool ``[n, letters]``."""

    prefix: Tensor
    words: Tensor
    labels: Tensor
    test: Tensor
    letters: list[str]


@dataclass(frozen=True)
class TaggedWords:
    """Words with tags (parts of speech, say), for k-sparse probing.

    Attributes:
        text: JSON-lines file (or .gz) with documents: keys ``doc`` and ``text``; null for the documentation that every Python
            brings along (:class:`~hedgelab.data.llm.text.StandardLibraryText`).
        tags: JSON-lines file (or .gz) with keys ``doc``, ``tags`` and ``offsets``: begin and end of each tagged word in the
            document's text, counted from the character ``start`` where a line has that key. A document may have many lines.
            Null: each word is its own tag, so that classes are ways of spelling.
        classes: Name of each class, and regular expressions of which its tags match one in full.
        contexts: Documents read, the first ``context_length`` tokens of each; a third of them for testing.
        context_length: Tokens of each.
    """

    text: str | None = None
    tags: str | None = None
    classes: dict[str, list[str]] = field(default_factory=dict)
    contexts: int = 150
    context_length: int = 256

    def __post_init__(self) -> None:
        if not self.classes:
            raise UserError("words.classes: names no class")
        whole_number("words.contexts", self.contexts)
        whole_number("words.context_length", self.context_length, 2)
        for name, patterns in self.classes.items():
            for pattern in patterns:
                try:
                    re.compile(f"(?:{pattern})")  # as it is used below
                except re.error as error:
                    raise UserError(f"words.classes.{name}: {pattern!r} is no regular expression ({error})") from error

    def load(self, tokenizer: Any) -> LabelledRows:
        """Tokenise the documents and find the last token of every tagged word; needs a fast tokenizer."""
        if self.text is None:
            documents = {str(number): text for number, text in enumerate(StandardLibraryText().documents())}
        else:
            documents = {
                str(line["doc"]): as_text(line["text"], "words.text", f"key 'text' of {self.text}, line {number},") or ""
                for number, line in enumerate(json_lines(Path(self.text), "words.text", ("doc", "text")), start=1)
            }
        tagged: dict[str, list[tuple[int, str]]] = defaultdict(list)  # by document: ends of words, and their tags
        for name, text in documents.items() if self.tags is None else ():
            tagged[name] = [(word.end(), word[0]) for word in re.finditer(r"\w+", text[: 12 * self.context_length])]
        lines = () if self.tags is None else json_lines(Path(self.tags), "words.tags", ("doc", "tags", "offsets"))
        for number, line in enumerate(lines, start=1):
            try:
                ends = [int(line.get("start", 0)) + int(end) for _, end in line["offsets"]]
                tagged[str(line["doc"])] += zip(ends, map(str, line["tags"]), strict=True)
            except (TypeError, ValueError):
                where = f"line {number} of {self.tags}"
                raise UserError(f"words.tags: {where} must have as many `tags` as `offsets` [begin, end]") from None
        names = [name for name in documents if name in tagged]
        if not names:
            raise UserError(f"words.tags: {self.tags} tags no document of {self.text}; both need the same keys `doc`")
        contexts: list[list[int]] = []
        tag_at: dict[tuple[int, int], str] = {}
        twice = 0
        for name in _evenly_spaced(names, self.contexts):
            text = documents[name][: 12 * self.context_length]
            for ids, offsets in islice(_pieces(tokenizer, text, self.context_length), 1):
                first = len(ids) - len(offsets)
                token_at = {end: i for i, (start, end) in enumerate(offsets, start=first) if end > start}
                for end, tag in tagged[name]:
                    if end in token_at:
                        place = len(contexts), token_at[end]
                        twice += place in tag_at
                        tag_at.setdefault(place, tag)
                contexts.append(ids)
        if twice > _MOST_TWICE * len(tag_at):
            raise UserError(f"words.tags: {self.tags} tags {twice} words twice; do offsets count from another place?")
        patterns = [re.compile("|".join(f"(?:{p})" for p in ps)) for ps in self.classes.values()]
        labels = [[pattern.fullmatch(tag) is not None for pattern in patterns] for tag in tag_at.values()]
        result = LabelledRows(
            torch.tensor(contexts, dtype=torch.int64),
            torch.tensor(list(tag_at), dtype=torch.int64).view(-1, 2),
            torch.tensor(labels, dtype=torch.bool).view(-1, len(patterns)),
            torch.tensor([context % _TEST_EVERY == 0 for context, _ in tag_at], dtype=torch.bool),
            list(self.classes),
        )
        for name, column in zip(self.classes, result.labels.T, strict=True):
            for part in (column[result.test], column[~result.test]):
                if not _LEAST <= int(part.sum()) <= len(part) - _LEAST:
                    raise UserError(f"words.classes.{name}: fits too few of the words read, or nearly all; check it")
        return result


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
        prefix = torch.tensor(opening_tokens(tokenizer) + prompt)
        letters = sorted({word[0] for _, word in words})
        labels = torch.tensor([[word[0] == letter for letter in letters] for _, word in words])
        test = torch.arange(len(words)) % _TEST_EVERY == 0
        enough = ((labels & test[:, None]).sum(0) >= 2) & ((labels & ~test[:, None]).sum(0) >= 4)
        names = [letter for letter, kept in zip(letters, enough.tolist(), strict=True) if kept]
        return LabelledWords(prefix, torch.tensor([i for i, _ in words]), labels[:, enough], test, names)


def _evenly_spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _pieces(tokenizer: Any, text: str, length: int) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Pieces of ``length`` tokens, with a BOS token first where models expect it, and where the others begin and end."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    opening = opening_tokens(tokenizer)
    body = length - len(opening)
    for start in range(0, len(ids) - body + 1, body):
        yield [*opening, *ids[start : start + body]], offsets[start : start + body]
