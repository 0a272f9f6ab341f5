"""Text from Hugging Face ``datasets``: from the hub, streamed or downloaded, or from a local folder."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hedgelab.data.llm.model import first_line, hub_problem
from hedgelab.data.llm.text import TextSource, as_text
from hedgelab.digest import file_digest
from hedgelab.errors import UserError, whole_number

_ALTERNATIVES = "offline alternatives: StandardLibraryText, TextFiles (.txt, .jsonl, .parquet), or a local folder"


class HubText(TextSource):
    """A data set that ``datasets`` can load (extra ``hedgelab[datasets]``), in the order in which it is stored.

    Args:
        dataset: Id on the Hugging Face hub; or a local folder, of data files or written by ``save_to_disk``.
        field: Column of the text.
        split: Which split.
        name: Configuration of the data set, for those that have several.
        revision: Commit, tag or branch on the hub. Text is tokenised once and known by this name afterwards, so give a
            commit where the data set may change.
        streaming: Read documents as they come, rather than download the whole data set first.
        max_documents: Documents to read at most, the first ones; None reads all. (``data.max_contexts`` stops by itself.)
    """

    def __init__(
        self,
        dataset: str,
        field: str = "text",
        split: str = "train",
        name: str | None = None,
        revision: str | None = None,
        streaming: bool = True,
        max_documents: int | None = None,
    ) -> None:
        if not dataset:
            raise UserError("data.text.dataset: names no data set; give a hub id or a local folder")
        if max_documents is not None:
            whole_number("data.text.max_documents", max_documents)
        self.dataset, self.field, self.split, self.name = dataset, field, split, name
        self.revision, self.streaming, self.max_documents = revision, streaming, max_documents

    def documents(self) -> Iterator[str]:
        """Rows in the data set's order; those without text are left out."""
        for row in islice(self._rows(), self.max_documents):
            if self.field not in row:
                has = f"has no column {self.field!r}; it has {', '.join(row)}"
                raise UserError(f"data.text.field: data set {self.dataset!r} {has}")
            text = as_text(row[self.field], "data.text.field", f"column {self.field!r} of data set {self.dataset!r}")
            if text is not None:
                yield text

    def fingerprint(self) -> str:
        """Name, split and revision; of a local folder a digest of its files."""
        which = (self.name, self.split, self.field, self.max_documents)
        folder = Path(self.dataset)
        if not folder.is_dir():
            return f"data set {self.dataset}, revision {self.revision}, {which}"
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        digests = "".join(f"{path.relative_to(folder)} {file_digest(path)}" for path in files)
        return f"data set {hashlib.sha256(digests.encode()).hexdigest()}, {which}"

    def _rows(self) -> Iterator[dict[str, Any]]:
        try:
            import datasets
        except ImportError:
            raise UserError("data.text: HubText needs a package; pip install 'hedgelab[datasets]'") from None
        datasets.disable_progress_bars()
        folder = Path(self.dataset)
        problem = None if folder.is_dir() else hub_problem()
        if problem and self.streaming:
            raise UserError(f"data.text.dataset: {self.dataset!r} is no local folder, and {problem}; {_ALTERNATIVES}")
        try:
            if any((folder / mark).is_file() for mark in ("dataset_info.json", "state.json", "dataset_dict.json")):
                loaded = datasets.load_from_disk(self.dataset)
                loaded = loaded[self.split] if isinstance(loaded, dict) else loaded
            else:
                options = {"split": self.split, "revision": self.revision, "streaming": self.streaming}
                loaded = datasets.load_dataset(self.dataset, self.name, **options)
            yield from loaded
        except Exception as error:  # dozens of kinds, by format, file system and network
            why = f"{problem}, nor is it among earlier downloads" if problem else first_line(error)
            raise UserError(f"data.text.dataset: cannot read {self.dataset!r}: {why}; {_ALTERNATIVES}") from error
