"""Short texts with one property or two, for probes on whole texts."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hedgelab.data.llm.labelled import TEST_EVERY, evenly_spaced
from hedgelab.data.llm.text import as_text, json_lines
from hedgelab.data.llm.tokens import opening_tokens
from hedgelab.errors import UserError, whole_number


class LabelledTexts(NamedTuple):
    """Short texts with the classes they belong to.

    Attributes:
        tokens: ``[texts, length]`` int64.
        labels: Which classes, bool ``[texts, classes]``.
        test: Whether it is for testing; documents are never split, bool ``[texts]``.
        classes: Names of the classes.
    """

    tokens: Tensor
    labels: Tensor
    test: Tensor
    classes: list[str]


@dataclass(frozen=True)
class Property:
    """A property of a text, with two classes or more.

    Attributes:
        classes: Name of each class, and its values in ``column``; or, without a column, words of which a text of the class
            contains one, and none of another class's.
        column: Key of the JSON line that says the class.
    """

    classes: dict[str, list[str]]
    column: str | None = None

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise UserError(f"texts: a property needs at least two classes, got {list(self.classes)}")

    def of(self, line: dict[str, Any], piece: str) -> int | None:
        """Number of the class of a piece of a line's text; None for none, or several."""
        if self.column is not None:
            value = line.get(self.column)
            if isinstance(value, list | dict):
                raise UserError(
                    f"texts: column {self.column!r} says a class by {type(value).__name__}, not by one value"
                )
            value = str(value)
            found = [i for i, values in enumerate(self.classes.values()) if value in values]
        else:
            words = set(re.findall(r"\w+", piece.lower()))
            found = [i for i, some in enumerate(self.classes.values()) if words.intersection(some)]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class ClassifiedTexts:
    """Texts with one property (for targeted probe perturbation) or two (for spurious correlation removal).

    Attributes:
        text: JSON-lines file (or .gz), one document a line.
        label: The property to predict.
        spurious: A second one that goes along with it in biased training; both then need exactly two classes.
        field: Key of the text.
        per_class: Pieces taken of each class, or of each of the four combinations; a third of them for testing.
        length: Tokens a piece.
    """

    text: str
    label: Property
    spurious: Property | None = None
    field: str = "text"
    per_class: int = 150
    length: int = 64

    def __post_init__(self) -> None:
        whole_number("texts.per_class", self.per_class)
        whole_number("texts.length", self.length, 2)
        if self.spurious is not None and (len(self.label.classes) != 2 or len(self.spurious.classes) != 2):
            raise UserError("texts.spurious: spurious correlation removal needs two classes of label and of spurious")

    def load(self, tokenizer: Any) -> LabelledTexts:
        """Cut the documents into pieces and take equally many of each kind, spread over the documents."""
        kinds: dict[tuple[bool, tuple[int, ...]], list[tuple[list[int], int]]] = {}
        for number, line in enumerate(json_lines(Path(self.text), "texts.text", (self.field,))):
            text = as_text(line[self.field], "texts.field", f"key {self.field!r} of {self.text}, line {number + 1},")
            for piece, ids in _pieces(tokenizer, text or "", self.length):
                kind = [self.label.of(line, piece)]
                if self.spurious is not None:
                    kind.append(self.spurious.of(line, piece))
                if None not in kind:
                    key = (_is_test(number), tuple(k for k in kind if k is not None))
                    kinds.setdefault(key, []).append((ids, number))
        combinations = sorted({kind for _, kind in kinds})
        expected = len(self.label.classes) * (1 if self.spurious is None else 2)
        counts = Counter({key: len(found) for key, found in kinds.items()})
        per = {True: self.per_class // TEST_EVERY, False: self.per_class - self.per_class // TEST_EVERY}
        for key in ((test, kind) for test in per for kind in combinations):
            per[key[0]] = min(per[key[0]], counts[key])
        if len(combinations) < expected or min(per.values()) < 5:
            raise UserError(f"texts.label: too few pieces of text of some class in {self.text}: {dict(counts)}")
        tokens, labels, test = [], [], []
        for (is_test, combination), found in sorted(kinds.items()):
            for ids, _ in evenly_spaced(found, per[is_test]):
                tokens.append(ids)
                labels.append(self._row(combination))
                test.append(is_test)
        names = list(self.label.classes) if self.spurious is None else ["label", "spurious"]
        return LabelledTexts(torch.tensor(tokens), torch.tensor(labels), torch.tensor(test), names)

    def _row(self, kind: tuple[int, ...]) -> list[bool]:
        """One-hot of the classes; with a spurious property the two as booleans (second class of each)."""
        if self.spurious is not None:
            return [bool(value) for value in kind]
        return [kind[0] == i for i in range(len(self.label.classes))]


def _is_test(number: int) -> bool:
    """Whether a document is for testing: a third of them, in no rhythm that classes might have as well."""
    return zlib.crc32(str(number).encode()) % TEST_EVERY == 0


def _pieces(tokenizer: Any, text: str, length: int) -> Iterator[tuple[str, list[int]]]:
    """Consecutive pieces of ``length`` tokens with their text; where models expect a BOS token each starts with it."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    opening = opening_tokens(tokenizer)
    body = length - len(opening)
    for start in range(0, len(ids) - body + 1, body):
        stop = start + body
        yield text[offsets[start][0] : offsets[stop - 1][1]], [*opening, *ids[start:stop]]
