"""Words with tags (parts of speech, say) in texts, for probes on single tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hedgelab.data.llm.text import as_text, json_lines
from hedgelab.data.llm.tokens import opening_tokens
from hedgelab.errors import UserError, whole_number

_MOST_TWICE = 0.02
"""Share of words that may be tagged twice (the first tag counts): corpora have slips."""
TEST_EVERY = 3
"""Every third document (or word) is for testing."""


class LabelledRows(NamedTuple):
    """Token positions with the classes they belong to.

    Attributes:
        tokens: Contexts, ``[n, length]`` int64.
        positions: Context and position of each labelled token, ``[rows, 2]``, in reading order.
        labels: Which classes it belongs to, bool ``[rows, classes]``.
        test: Whether it is for testing; documents are never split, bool ``[rows]``.
        classes: Names of the classes.
    """

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    test: Tensor
    classes: list[str]


@dataclass(frozen=True)
class TaggedWords:
    """Words with tags (parts of speech, say), for k-sparse probing.

    Attributes:
        text: JSON-lines file (or .gz) with documents: keys ``doc`` and ``text``.
        tags: JSON-lines file (or .gz) with keys ``doc``, ``tags`` and ``offsets``: begin and end of each tagged word in the
            document's text, counted from the character ``start`` where a line has that key. A document may have many lines.
        classes: Name of each class, and regular expressions of which its tags match one in full.
        contexts: Documents read, the first ``context_length`` tokens of each; a third of them for testing.
        context_length: Tokens of each.
    """

    text: str
    tags: str
    classes: dict[str, list[str]]
    contexts: int = 150
    context_length: int = 256

    def __post_init__(self) -> None:
        if not self.classes:
            raise UserError("words.classes: names no class")
        whole_number("words.contexts", self.contexts)
        whole_number("words.context_length", self.context_length)
        for name, patterns in self.classes.items():
            for pattern in patterns:
                _compiled(pattern, f"words.classes.{name}")

    def load(self, tokenizer: Any) -> LabelledRows:
        """Tokenise the documents and find the last token of every tagged word; needs a fast tokenizer."""
        documents = {
            str(line["doc"]): as_text(line["text"], "words.text", f"key 'text' of {self.text}, line {number},") or ""
            for number, line in enumerate(json_lines(Path(self.text), "words.text", ("doc", "text")), start=1)
        }
        tags = self._tagged(set(documents))
        patterns = [re.compile("|".join(f"(?:{p})" for p in ps)) for ps in self.classes.values()]
        contexts: list[list[int]] = []
        positions: list[tuple[int, int]] = []
        labels: list[list[bool]] = []
        test: list[bool] = []
        seen: set[tuple[int, int]] = set()
        twice = 0
        usable = [name for name in documents if name in tags]
        for name in evenly_spaced(usable, self.contexts):
            ids, ends = _tokenised(tokenizer, documents[name], self.context_length)
            if len(ids) < self.context_length:
                continue
            for end, tag in tags[name]:
                if end in ends:
                    place = (len(contexts), ends[end])
                    if place in seen:
                        twice += 1
                        continue
                    seen.add(place)
                    positions.append(place)
                    labels.append([pattern.fullmatch(tag) is not None for pattern in patterns])
                    test.append(len(contexts) % TEST_EVERY == 0)
            contexts.append(ids)
        result = LabelledRows(
            torch.tensor(contexts, dtype=torch.int64),
            torch.tensor(positions, dtype=torch.int64).reshape(-1, 2),
            torch.tensor(labels, dtype=torch.bool).reshape(-1, len(patterns)),
            torch.tensor(test, dtype=torch.bool),
            list(self.classes),
        )
        if twice > _MOST_TWICE * len(positions):
            raise UserError(
                f"words.tags: {self.tags} tags {twice} words twice; are offsets counted from another place?"
            )
        _check_classes(result.labels, result.test, result.classes, "words.classes")
        return result

    def _tagged(self, names: set[str]) -> dict[str, list[tuple[int, str]]]:
        tagged: dict[str, list[tuple[int, str]]] = {}
        for number, line in enumerate(json_lines(Path(self.tags), "words.tags", ("doc", "tags", "offsets")), start=1):
            if str(line["doc"]) not in names:
                continue
            try:
                ends = [int(line.get("start", 0)) + int(end) for _, end in line["offsets"]]
                words = list(zip(ends, map(str, line["tags"]), strict=True))
            except (TypeError, ValueError):
                raise UserError(
                    f"words.tags: line {number} of {self.tags} must have as many `tags` as `offsets` [begin, end]"
                ) from None
            tagged.setdefault(str(line["doc"]), []).extend(words)
        if not tagged:
            raise UserError(f"words.tags: {self.tags} tags no document of {self.text}; both need the same keys `doc`")
        return tagged


def _compiled(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is no regular expression ({error})") from error


def evenly_spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _tokenised(tokenizer: Any, text: str, length: int) -> tuple[list[int], dict[int, int]]:
    """The first ``length`` tokens of a text, a BOS token among them where models expect one, and which ends where."""
    opening = opening_tokens(tokenizer)
    encoded = tokenizer(
        text[: 12 * length], add_special_tokens=False, return_offsets_mapping=True, truncation=True,
        max_length=length - len(opening), return_attention_mask=False,
    )  # fmt: skip
    ends = {end: i for i, (start, end) in enumerate(encoded["offset_mapping"], start=len(opening)) if end > start}
    return [*opening, *encoded["input_ids"]], ends


def _check_classes(labels: Tensor, test: Tensor, classes: list[str], key: str) -> None:
    for i, name in enumerate(classes):
        for part in (labels[test], labels[~test]):
            if not 5 <= int(part[:, i].sum()) <= len(part) - 5:
                raise UserError(f"{key}.{name}: fits too few of the words read, or nearly all; check its patterns")
