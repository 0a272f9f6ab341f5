"""Text: documents in a fixed order from several sources, and the contexts of tokens that they are packed into."""

import ast
import gzip
import hashlib
import io
import json
import os
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from hedgelab.data.llm.model import ModelFiles, first_line
from hedgelab.digest import file_digest
from hedgelab.errors import UserError

_FORMAT = 2  # of cached contexts; a new number leaves older ones aside
_DOCUMENTS_AT_ONCE = 64
# Tests, bundled third-party code and what an operating system's package leaves out would make the text differ
# between installations of the same Python.
_EXCLUDED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class TextSource(ABC):
    """A corpus: documents in a fixed order."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents, in the same order every time."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes whenever the documents do; tokenised text is cached under it."""


class StandardLibraryText(TextSource):
    """The documentation that every Python brings along: the language reference's topics and all docstrings.

    About 530k tokens in CPython 3.11. Docstrings are read from the sources of the standard library without importing
    them; one document a topic, one a module.
    """

    def documents(self) -> Iterator[str]:
        """Topics by name, then modules by path."""
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
        root = Path(sysconfig.get_path("stdlib"))
        for path in sorted(root.rglob("*.py")):
            if not _EXCLUDED_FOLDERS.intersection(path.relative_to(root).parts) and (text := _docstrings(path)):
                yield text

    def fingerprint(self) -> str:
        """The version of Python."""
        return f"standard library of {platform.python_implementation()} {platform.python_version()}"


def _docstrings(path: Path) -> str:
    """All docstrings of a Python file, a blank line between two; empty for a file that does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))
    return "\n\n".join(text for text in found if text)


class TextFiles(TextSource):
    """Local files: ``.txt`` (one document a file), ``.jsonl`` (one a line), ``.parquet`` (one a row); also as ``.gz``.

    Args:
        paths: The files, read in this order.
        field: Key of the text in each line of a ``.jsonl`` file, column of it in a ``.parquet`` file.
    """

    def __init__(self, paths: list[str], field: str = "text") -> None:
        expected = "a .txt, .jsonl or .parquet file (or .gz of them)"
        if not paths:
            raise UserError(f"data.text.paths: names no file; list at least one {expected[2:]}")
        for i, name in enumerate(paths):
            if _kind(Path(name)) not in (".txt", ".jsonl", ".parquet"):
                raise UserError(f"data.text.paths[{i}]: expected {expected}, got {name!r}")
            if not Path(name).is_file():
                raise UserError(f"data.text.paths[{i}]: there is no file {name!r}")
        self.paths = [Path(name) for name in paths]
        self.field = field

    def documents(self) -> Iterator[str]:
        """The files' documents, in order; rows without text are left out."""
        hint = "; set data.text.field to the key that holds the text"
        for path in self.paths:
            if _kind(path) == ".txt":
                with _readable(path, "data.text.paths") as file:
                    yield file.read()
                continue
            is_parquet = _kind(path) == ".parquet"
            rows = self._parquet_rows(path) if is_parquet else json_lines(path, "data.text.paths", (self.field,), hint)
            for number, row in enumerate(rows, start=1):
                text = as_text(row[self.field], "data.text.field", f"column {self.field!r} of {path}, row {number},")
                if text is not None:
                    yield text

    def _parquet_rows(self, path: Path) -> Iterator[dict[str, Any]]:
        from pyarrow.parquet import ParquetFile

        with _readable(path, "data.text.paths", "rb", None) as raw:
            file = ParquetFile(io.BytesIO(raw.read()) if path.suffix == ".gz" else raw)
            if self.field not in file.schema_arrow.names:
                hint = f"set data.text.field to one of {', '.join(file.schema_arrow.names)}"
                raise UserError(f"data.text.paths: {path} has no column {self.field!r}; {hint}")
            for batch in file.iter_batches(columns=[self.field]):
                yield from batch.to_pylist()

    def fingerprint(self) -> str:
        """The field and a digest of every file's contents."""
        return f"files, field {self.field!r}: {' '.join(map(file_digest, self.paths))}"


def as_text(value: Any, key: str, place: str) -> str | None:
    r"""A value that should be text: a string, or bytes in UTF-8; None stays None. Anything else is refused in a line.

    >>> as_text(b"caf\xc3\xa9", "data.text.field", "column 'text'")
    'café'
    """
    try:
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value).decode("utf-8-sig")
        if isinstance(value, str):
            value.encode()
            return value
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {place} holds bytes that are not UTF-8 ({error.reason} at {error.start})") from None
    except UnicodeEncodeError as error:
        half = value[error.start].encode("unicode_escape").decode()
        raise UserError(f"{key}: {place} holds {half}, half of a surrogate pair and no character; repair it") from None
    if value is None:
        return None
    inner = f" of {type(value[0]).__name__}" if isinstance(value, list | tuple) and value else ""
    raise UserError(f"{key}: {place} holds {type(value).__name__}{inner}, not text; name what holds the text")


def json_lines(path: Path, key: str, needed: Sequence[str], hint: str = "") -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file (or .gz); empty lines are left out."""
    if not path.is_file():
        raise UserError(f"{key}: there is no file '{path}'")
    with _readable(path, key) as file:
        for number, text in enumerate(file, start=1):
            if not (text := text.strip("\ufeff \t\r\n")):  # files put together have byte order marks between
                continue
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if not isinstance(line, dict) or any(name not in line for name in needed):
                names = f"the key{'s' * (len(needed) > 1)} {', '.join(map(repr, needed))}"
                raise UserError(f"{key}: line {number} of {path} is no JSON object with {names}{hint}")
            yield line


@contextmanager
def _readable(path: Path, key: str, mode: str = "rt", encoding: str | None = "utf-8-sig") -> Iterator[Any]:
    """A file, unpacked where it is compressed; whatever goes wrong while it is read is said in one line."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, mode, encoding=encoding) as file:
            yield file
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: cannot read {path}: it is not UTF-8 ({error.reason}); convert it") from error
    except Exception as error:  # of the file system, of the decompressor, of pyarrow
        raise UserError(f"{key}: cannot read {path}: {first_line(error)}") from error


def _kind(path: Path) -> str:
    """The file's suffix, below that of its compression."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


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
    tokens = torch.cat([torch.tensor([opening], dtype=torch.int32).expand(n, -1), tokens], dim=1)
    added = [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
    special = torch.tensor(sorted({*tokenizer.all_special_ids, *added}), dtype=torch.int32)
    return Contexts(tokens, torch.isin(tokens, special))


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
