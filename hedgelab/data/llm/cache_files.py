"""Activation caches on disk: a manifest that says whose activations they are, and shards in safetensors.

A shard ``DIR/shards/000012.safetensors`` holds ``activations`` ``[contexts, context_length, d_in]`` and a checksum of each
context. It appears whole or not at all. Every position is kept as the model gives it, so that batch size, seed,
normalisation, held-out share, skipped positions and outlier limit are free when it is read.
"""

import hashlib
import json
import os
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from hedgelab.errors import UserError, one_line
from hedgelab.version import __version__

_FORMAT = 3  # format 2 has CRC-32s for checksums, and is read and continued
_SHARD_TOKENS = 16384  # at most so much is computed in vain when writing is interrupted
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # in the words of safetensors
_LARGEST = 2**40
_READERS = min(4, os.cpu_count() or 1)
_SHOWN = 72


class ActivationCache:
    """A folder of activations that is there already; :meth:`begin` makes one."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            hint = "write it with `hedgelab cache` and this config, or leave data.cache out to run the model"
            raise UserError(f"data.cache: there is no activation cache in '{folder}'; {hint}")
        try:
            self.manifest = json.loads(path.read_text())
            if self.manifest["format"] not in (2, _FORMAT):
                raise ValueError(f"it has format {self.manifest['format']}, this hedgelab reads format {_FORMAT}")
            self.contexts: int = self.manifest["contexts"]
            self.contexts_per_shard: int = self.manifest["contexts_per_shard"]
            self.storage_dtype: str = self.manifest["storage_dtype"]
            self.shape: tuple[int, int] = (self.manifest["activations"]["context_length"], self.manifest["d_in"])
            numbers = (self.contexts, self.contexts_per_shard, *self.shape)
            if self.storage_dtype not in _DTYPES or any(type(n) is not int or not 0 < n < _LARGEST for n in numbers):
                raise ValueError(f"manifest.json: impossible sizes {numbers} or number format {self.storage_dtype!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"is damaged or of another release ({one_line(str(error))[:200]})"
            hint = "delete it and write it anew with `hedgelab cache` and this config"
            raise UserError(f"data.cache: '{folder}' {why}; {hint}") from error
        self.dtype: torch.dtype = getattr(torch, self.storage_dtype)
        self.shards = range(-(-self.contexts // self.contexts_per_shard))

    @classmethod
    def begin(
        cls, folder: Path, identity: Mapping[str, Any], contexts: int, d_in: int, storage_dtype: str, shard: int | None = None
    ) -> Self:
        """A cache to write on: made if it is not there, made longer if it is too short; ``shard``: see ``write_cache``."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache: cannot make the folder '{folder}': {error.strerror}") from error
        path = folder / "manifest.json"
        with FileLock(folder / ".lock"):
            if not path.is_file():
                if not all(found.name.startswith((".lock", ".manifest.json")) for found in folder.iterdir()):
                    raise UserError(f"data.cache: '{folder}' holds other files; give a folder that is new or empty")
                manifest = {
                    "format": _FORMAT,
                    "hedgelab": __version__,
                    "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "contexts": contexts,
                    "contexts_per_shard": shard or max(1, _SHARD_TOKENS // identity["context_length"]),
                    "d_in": d_in,
                    "storage_dtype": storage_dtype,
                    "normalisation": "none: applied when read",
                    "activations": dict(identity),
                }
                _replace(path, json.dumps(manifest, indent=2).encode())
            for name in ("shards", "locks"):
                (folder / name).mkdir(exist_ok=True)
            cache = cls(folder)
            cache.check_identity({**identity, "storage_dtype": storage_dtype})
            if contexts > cache.contexts:
                _replace(path, json.dumps(cache.manifest | {"contexts": contexts}, indent=2).encode())
            return cls(folder)

    def check_identity(self, wanted: Mapping[str, Any]) -> None:
        """Raise a UserError that names the first key in which a config asks for other activations than these."""
        held = {**self.manifest["activations"], "storage_dtype": self.storage_dtype}
        for key, value in wanted.items():
            if held.get(key) != value:
                differ = f"holds {_shown(held.get(key))}, this config asks for {_shown(value)}"
                hint = "correct the key, or give data.cache a folder of its own"
                raise UserError(f"data.{key}: the cache in '{self.folder}' {differ}; {hint}")

    def check_coverage(self, contexts: int) -> None:
        """Raise a UserError unless the first ``contexts`` contexts are written, as far as sizes tell."""
        there = self.leading()
        if there < contexts:
            holds = f"'{self.folder}' holds the first {there} of the {contexts} contexts that this config reads"
            or_fewer = f", or data.max_contexts: {there} makes do with these" if there else ""
            raise UserError(f"data.cache: {holds}; `hedgelab cache` with this config writes the others{or_fewer}")

    def contexts_of(self, shard: int) -> range:
        """Numbers of the contexts in a shard."""
        start = shard * self.contexts_per_shard
        return range(start, min(start + self.contexts_per_shard, self.contexts))

    def is_done(self, shard: int) -> bool:
        """Whether a shard is written with all of its contexts, as far as sizes tell."""
        return self._written(shard) == len(self.contexts_of(shard))

    def leading(self) -> int:
        """How many contexts are written without a gap."""
        first = next((shard for shard in self.shards if not self.is_done(shard)), None)
        return self.contexts if first is None else self.contexts_of(first).start + self._written(first)

    def bytes_of(self, shard: int) -> int:
        """Size of a shard on disk, about."""
        return len(self.contexts_of(shard)) * (self.shape[0] * self.shape[1] * self.dtype.itemsize + 8)

    def write(self, shard: int, rows: Tensor) -> None:
        """Write a shard, ``[contexts, context_length, d_in]``, whole or (``OSError``) not at all; one process at a time may."""
        rows = rows.cpu().to(self.dtype).contiguous()
        checksums = torch.tensor([self._checksum(row.data.cast("B")) for row in rows.view(torch.uint8).numpy()])
        _replace(self._path(shard), save({"activations": rows, "checksums": checksums}))

    def read(self, numbers: Tensor) -> Tensor:
        """Activations of some contexts, ``[n, context_length, d_in]``, in the number format on disk.

        Each context is one read from its place in a file into its place in the result, which is pinned where there is a GPU,
        and one checksum over it. Neither holds Python's lock, so that several threads go through the shards.
        """
        rows = torch.empty(len(numbers), *self.shape, dtype=self.dtype, pin_memory=torch.cuda.is_available())
        wanted: dict[int, list[tuple[int, memoryview]]] = {}
        for number, row in zip(numbers.tolist(), rows.view(torch.uint8).numpy(), strict=True):
            shard, place = divmod(number, self.contexts_per_shard)
            wanted.setdefault(shard, []).append((place, row.data.cast("B")))
        with ThreadPoolExecutor(_READERS, "hedgelab-cache") as readers:
            list(readers.map(self._read_shard, wanted, wanted.values()))
        return rows

    def _read_shard(self, shard: int, wanted: list[tuple[int, memoryview]]) -> None:
        """Read contexts of a shard, each by its place there, into memory."""
        number = self.contexts_of(shard).start + wanted[0][0]
        try:
            with self._path(shard).open("rb", buffering=0) as file:
                n, start, sums = _contents(file, self.shape, _DTYPES[self.storage_dtype])
                file.seek(sums)
                checksums = memoryview(file.read(8 * n)).cast("q")
                for place, row in wanted:
                    number = self.contexts_of(shard).start + place
                    file.seek(start + place * len(row))
                    if file.readinto(row) != len(row) or self._checksum(row) != checksums[place]:
                        raise ValueError("its checksum differs")
        except (OSError, ValueError, LookupError, TypeError) as error:
            where = f"context {number} in {self._path(shard)} is damaged ({one_line(str(error))})"
            hint = "`hedgelab cache --verify` with this config writes anew whatever is damaged"
            raise UserError(f"data.cache: {where}; {hint}") from error

    def verify(self, shard: int) -> None:
        """Compare every checksum of a shard; delete the shard, so that it is written anew, where one differs."""
        try:
            self.read(torch.tensor(self.contexts_of(shard)))
        except UserError:
            self._path(shard).unlink(missing_ok=True)

    def claim(self, shard: int) -> BaseFileLock | None:
        """Hold a shard against other processes until released, in whatever thread; None where another one holds it."""
        lock = FileLock(self.folder / "locks" / f"{shard:06}", blocking=False, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    def _checksum(self, context: memoryview) -> int:
        """Of the bytes of a context: the sum of its words of 64 bits, each 64th of them times an odd number of its own.

        It is as fast as memory. A change inside of one word always changes it, any other but for one in 2^64.
        """
        if self.manifest["format"] == 2:
            return zlib.crc32(context)
        whole = len(context) // 512 * 512
        parts = np.frombuffer(context[:whole], "<u8").reshape(64, -1).sum(1)
        parts = np.append(parts, np.uint64(zlib.crc32(context[whole:])))
        return int((parts @ np.arange(1, 131, 2, dtype="<u8")).view("<i8"))

    def _path(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:06}.safetensors"

    def _written(self, shard: int) -> int:
        """How many contexts of a shard are on disk; none where its file is missing, cut off or of another shape."""
        try:
            with self._path(shard).open("rb", buffering=0) as file:
                n, _, _ = _contents(file, self.shape, _DTYPES[self.storage_dtype])
                return n if n <= self.contexts_per_shard else 0
        except (OSError, ValueError, LookupError, TypeError):
            return 0


def _contents(file: FileIO, shape: tuple[int, int], dtype: str) -> tuple[int, int, int]:
    """Contexts in a shard's file, and where its activations and checksums begin; Lookup-, Type- or ValueError if damaged."""
    size = os.fstat(file.fileno()).st_size  # safetensors: size of the header in 8 bytes, the header in JSON, the tensors
    begin = 8 + int.from_bytes(file.read(8), "little")
    if begin > size:
        raise ValueError("it is cut off")
    header = json.loads(file.read(begin - 8))
    n, *rest = header["activations"]["shape"]
    starts, stops = zip(*(header[name]["data_offsets"] for name in ("activations", "checksums")), strict=True)
    if header["activations"]["dtype"] != dtype or tuple(rest) != shape or stops[1] - starts[1] != 8 * n:
        raise ValueError("it holds something else")
    if begin + max(stops) > size:
        raise ValueError("it is cut off")
    return n, begin + starts[0], begin + starts[1]


def _replace(path: Path, content: bytes) -> None:
    """Replace a file whole, or not at all; only one process at a time may."""
    for left in path.parent.glob(f".{path.name}.*"):  # of a process that was killed
        left.unlink(missing_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
