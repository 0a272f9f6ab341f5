"""Where text comes from: each source yields documents in a fixed order and says what it would yield."""

from __future__ import annotations

import ast
import gzip
import io
import json
import platform
import sysconfig
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hedgelab.digest import file_digest
from hedgelab.errors import UserError

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

    Raises:
        UserError: A file that is missing or of another kind; while reading, one that is damaged or lacks the text.
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
                    yield _decoded(file).read()
                continue
            is_parquet = _kind(path) == ".parquet"
            rows = self._parquet_rows(path) if is_parquet else json_lines(path, "data.text.paths", (self.field,), hint)
            for number, row in enumerate(rows, start=1):
                text = as_text(row[self.field], "data.text.field", f"column {self.field!r} of {path}, row {number},")
                if text is not None:
                    yield text

    def _parquet_rows(self, path: Path) -> Iterator[dict[str, Any]]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        with _readable(path, "data.text.paths", pyarrow.ArrowException) as raw:
            file = ParquetFile(io.BytesIO(raw.read()) if path.suffix == ".gz" else raw)
            if self.field not in file.schema_arrow.names:
                raise UserError(
                    f"data.text.paths: {path} has no column {self.field!r}; set data.text.field to one of "
                    f"{', '.join(file.schema_arrow.names)}"
                )
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
        for number, text in enumerate(_decoded(file), start=1):
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
def _readable(path: Path, key: str, error_type: type[Exception] = OSError) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked where it is compressed; says in one line why they cannot be read, or decoded."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}: cannot read {path}: it is not UTF-8 ({error.reason} at byte {error.start} of a part); convert it, for "
            "example with iconv"
        ) from error
    except (OSError, EOFError, zlib.error, error_type) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{key}: cannot read {path}: {reason}") from error


def _decoded(file: IO[bytes]) -> io.TextIOWrapper:
    """The bytes as text without a byte order mark."""
    return io.TextIOWrapper(file, encoding="utf-8-sig")


def _kind(path: Path) -> str:
    """The file's suffix, below that of its compression."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
