"""Words with tags (parts of speech, say) in texts, for probes on single tokens."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hedgelab.errors import UserError

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
        for name, patterns in self.classes.items():
            for pattern in patterns:
                _compiled(pattern, f"words.classes.{name}")

    def load(self, tokenizer: Any) -> LabelledRows:
        """Tokenise the documents and find the last token of every tagged word; needs a fast tokenizer."""
        documents = {
            str(line["doc"]): str(line["text"]) for line in json_lines(self.text, "words.text", ("doc", "text"))
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
        for name in spread(usable, self.contexts):
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
        for line in json_lines(self.tags, "words.tags", ("doc", "tags", "offsets")):
            if str(line["doc"]) in names:
                ends = (int(line.get("start", 0)) + int(end) for _, end in line["offsets"])
                tagged.setdefault(str(line["doc"]), []).extend(zip(ends, line["tags"], strict=True))
        if not tagged:
            raise UserError(f"words.tags: {self.tags} tags no document of {self.text}; both need the same keys `doc`")
        return tagged


def _compiled(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is no regular expression ({error})") from error


def json_lines(name: str, key: str, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file.

    Raises:
        UserError: The file is missing, or a line is no object with the needed keys.
    """
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{key}: there is no file {name!r}")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                missing = [part for part in needed if part not in line]
            except (json.JSONDecodeError, TypeError):
                line, missing = None, list(needed)
            if missing or not isinstance(line, dict):
                raise UserError(f"{key}: line {number} of {name} is no JSON object with the keys {', '.join(needed)}")
            yield line


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _tokenised(tokenizer: Any, text: str, length: int) -> tuple[list[int], dict[int, int]]:
    """The first ``length`` tokens of a text, a BOS token among them where one is put in front, and which ends where."""
    encoded = tokenizer(
        text[: 12 * length],
        return_offsets_mapping=True,
        truncation=True,
        max_length=length,
        return_attention_mask=False,
    )
    return encoded["input_ids"], {end: i for i, (start, end) in enumerate(encoded["offset_mapping"]) if end > start}


def _check_classes(labels: Tensor, test: Tensor, classes: list[str], key: str) -> None:
    for i, name in enumerate(classes):
        for part in (labels[test], labels[~test]):
            if not 5 <= int(part[:, i].sum()) <= len(part) - 5:
                raise UserError(f"{key}.{name}: fits too few of the words read, or nearly all; check its patterns")
