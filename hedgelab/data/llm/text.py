"""Where text comes from: each source yields documents in a fixed order and says what it would yield."""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import platform
import sysconfig
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from hedgelab.errors import UserError

# Tests, bundled third-party code and what an operating system's package leaves out would make the text differ
# between installations of the same Python.
_EXCLUDED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
_TEXT_KINDS = (".txt", ".jsonl", ".parquet")
_EXPECTED = "a .txt, .jsonl or .parquet file (or .gz of them)"


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
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
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
        if not paths:
            raise UserError(f"data.text.paths: names no file; list at least one {_EXPECTED[2:]}")
        for i, name in enumerate(paths):
            if _kind(Path(name)) not in _TEXT_KINDS:
                raise UserError(f"data.text.paths[{i}]: expected {_EXPECTED}, got {name!r}")
            if not Path(name).is_file():
                raise UserError(f"data.text.paths[{i}]: there is no file {name!r}")
        self.paths = [Path(name) for name in paths]
        self.field = field

    def documents(self) -> Iterator[str]:
        """Files in the given order, lines or rows in the file's."""
        for path in self.paths:
            try:
                yield from self._documents_of(path)
            except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
                raise UserError(f"data.text.paths: cannot read {path}: {error}") from error

    def _documents_of(self, path: Path) -> Iterator[str]:
        if _kind(path) == ".parquet":
            yield from self._parquet_rows(path)
            return
        with _open_text(path) as file:
            if _kind(path) == ".txt":
                yield file.read()
            else:
                yield from self._json_lines(path, file)

    def _parquet_rows(self, path: Path) -> Iterator[str]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as raw:
                file = ParquetFile(io.BytesIO(raw.read()) if path.suffix == ".gz" else raw)
                if self.field not in file.schema_arrow.names:
                    raise UserError(
                        f"data.text.paths: {path} has no column {self.field!r}; set data.text.field to one of "
                        f"{', '.join(file.schema_arrow.names)}"
                    )
                for batch in file.iter_batches(columns=[self.field]):
                    yield from (str(text) for text in batch.column(0).to_pylist() if text is not None)
        except pyarrow.ArrowException as error:
            raise UserError(f"data.text.paths: cannot read {path}: {str(error).splitlines()[0]}") from error

    def _json_lines(self, path: Path, file: io.TextIOBase) -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[self.field]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise UserError(
                    f"data.text.paths: line {number} of {path} is no JSON object with the key {self.field!r}; "
                    "set data.text.field to the key that holds the text"
                ) from None
            if text is not None:
                yield str(text)

    def fingerprint(self) -> str:
        """The field and a digest of every file's contents."""
        digests = []
        for path in self.paths:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return f"files, field {self.field!r}: {' '.join(digests)}"


def _kind(path: Path) -> str:
    """The file's suffix, below that of its compression."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _open_text(path: Path) -> io.TextIOWrapper:
    """The file as text, unpacked where it is compressed."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")
