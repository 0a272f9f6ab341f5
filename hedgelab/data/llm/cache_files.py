"""Activation caches on disk: a zarr array of raw activations, a manifest that says whose, a record of each shard.

``DIR/activations`` is a zarr v3 array ``[contexts, context_length, d_in]``: one chunk a context with a checksum, many chunks
a shard. Every position is kept as the model gives it, so that batch size, seed, normalisation, held-out share, skipped
positions and outlier limit are free when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from filelock import BaseFileLock, FileLock, Timeout
from torch import Tensor

from hedgelab import __version__
from hedgelab.data.llm.harvest import Worker
from hedgelab.errors import UserError, one_line

Identity = Mapping[str, Any]
"""Keys of section ``data`` (``model``, ``hook``, …) with the values that raw activations depend on."""

_FORMAT = 1
_SHARD_TOKENS = 16384  # at most so much is computed in vain when writing is interrupted
_ON_DISK = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}  # zarr has no bfloat16
_MENDED = "`hedgelab cache --verify` with this config finds and writes anew whatever is damaged"
_SHOWN = 72


class ActivationCache:
    """A folder of activations that is there already; :meth:`begin` makes one.

    Raises:
        UserError: There is none, or its files are not those of a cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._zarr = _zarr()
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise UserError(
                f"data.cache: there is no activation cache in '{folder}'; write it with `hedgelab cache` and this config, "
                "or leave data.cache out to run the model while training"
            )
        try:
            self.manifest = json.loads(path.read_text())
            self._open()
        except Exception as error:  # whatever zarr makes of files that are not its own
            reason = (one_line(str(error)) or type(error).__name__)[:200]
            raise UserError(f"data.cache: '{folder}' is damaged ({reason}); delete it and write it anew") from error

    def _open(self) -> None:
        """Open the array, if it is laid out as :meth:`begin` does: no other codec of zarr's is ever at work."""
        manifest = self.manifest
        if manifest["format"] != _FORMAT:
            raise ValueError(f"it has format {manifest['format']}, this hedgelab reads {_FORMAT}")
        self.contexts: int = manifest["contexts"]
        self.contexts_per_shard: int = manifest["contexts_per_shard"]
        self.storage_dtype: str = manifest["storage_dtype"]
        self.shape: tuple[int, int] = (manifest["activations"]["context_length"], manifest["d_in"])
        self._array = self._zarr.open_array(
            self.folder / "activations", mode="r+" if os.access(self.folder, os.W_OK) else "r", zarr_format=3
        )
        array, codecs = self._array, [type(codec) for codec in self._array.compressors]
        found = (array.shape[1:], array.chunks, array.shards, str(array.dtype), array.filters, codecs)
        shard, stored = (self.contexts_per_shard, *self.shape), _ON_DISK[self.storage_dtype]
        if found != (self.shape, (1, *self.shape), shard, stored, (), [self._zarr.codecs.Crc32cCodec]):
            raise ValueError("zarr.json: an array of another shape or kind than manifest.json says")
        if not 1 <= self.contexts <= array.shape[0]:
            raise ValueError("zarr.json: another number of contexts than manifest.json says")

    @classmethod
    def begin(
        cls,
        folder: str | Path,
        identity: Identity,
        contexts: int,
        d_in: int,
        storage_dtype: str,
        shard: int | None = None,
    ) -> ActivationCache:
        """A cache to write on: made if it is not there, made longer if it is too short.

        Args:
            folder: Where.
            identity: What the activations depend on.
            contexts: How many contexts it shall hold.
            d_in: Width of the activations.
            storage_dtype: Number format on disk.
            shard: Contexts a shard; None for about 16 thousand tokens.

        Raises:
            UserError: The folder holds other activations, or something else.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache: cannot make the folder '{folder}': {error.strerror}") from error
        with FileLock(folder / ".lock"):
            if not (folder / "manifest.json").is_file():
                if any(path.name != ".lock" for path in folder.iterdir()):
                    raise UserError(f"data.cache: '{folder}' holds other files; give a folder that is new or empty")
                _make(folder, identity, contexts, d_in, storage_dtype, shard)
            cache = cls(folder)
            cache.check_identity(identity)
            cache.check_dtype(storage_dtype, exactly=True)
            if contexts > cache.contexts:
                cache._array.resize((contexts, *cache.shape))
                cache.contexts = cache.manifest["contexts"] = contexts
                _write_json(folder / "manifest.json", cache.manifest)
            return cache

    def check_identity(self, wanted: Identity) -> None:
        """Raise a UserError that names the first key in which a config asks for other activations than these."""
        holds = self.manifest["activations"]
        for key, value in wanted.items():
            if holds.get(key) == value:
                continue
            fix = "correct the key, or give data.cache a folder of its own"
            if key == "model" and re.fullmatch(r"weights [0-9a-f]{16}", str(holds.get(key))):
                fix = "release 0.1.0 knew models by samples of their weights: write the cache anew, into a folder of its own"
            raise UserError(
                f"data.{key}: the cache in '{self.folder}' holds {_shown(holds.get(key))}, this config asks for "
                f"{_shown(value)}; {fix}"
            )

    def check_dtype(self, wanted: str, exactly: bool = False) -> None:
        """Raise a UserError unless a number format can be had: the cache's own, or what its float32 rounds to."""
        if wanted != self.storage_dtype and (exactly or self.storage_dtype != "float32"):
            raise UserError(
                f"data.storage_dtype: the cache in '{self.folder}' holds {self.storage_dtype}, this config asks for {wanted}; "
                f"set data.storage_dtype: {self.storage_dtype}, or give data.cache a folder of its own"
            )

    def check_coverage(self, contexts: int) -> None:
        """Raise a UserError unless the first ``contexts`` contexts are written, as far as sizes tell."""
        for shard in self.shards:
            record, size = self._record(shard), self._size(shard)
            if shard * self.contexts_per_shard < contexts and record and size != record["bytes"]:
                raise UserError(
                    f"data.cache: {self._path(shard)} has {size} bytes instead of {record['bytes']}; `hedgelab cache` with "
                    "this config writes it anew"
                )
        there = self.leading()
        if there < contexts:
            raise UserError(
                f"data.cache: '{self.folder}' holds the first {there} of the {contexts} contexts that this config reads; "
                "`hedgelab cache` with this config writes the others"
                + (f", or data.max_contexts: {there} makes do with these" if there else "")
            )

    @property
    def shards(self) -> range:
        """Numbers of the shards."""
        return range(-(-self.contexts // self.contexts_per_shard))

    def contexts_of(self, shard: int) -> range:
        """Numbers of the contexts in a shard."""
        start = shard * self.contexts_per_shard
        return range(start, min(start + self.contexts_per_shard, self.contexts))

    def is_done(self, shard: int) -> bool:
        """Whether a shard is written with all of its contexts, and has the size that it had then."""
        return self._written(shard) == len(self.contexts_of(shard))

    def leading(self) -> int:
        """How many contexts are written without a gap."""
        first = next((shard for shard in self.shards if not self.is_done(shard)), None)
        return self.contexts if first is None else self.contexts_of(first).start + self._written(first)

    def bytes_of(self, shard: int) -> int:
        """Size of a shard on disk, about."""
        length, d_in = self.shape
        return len(self.contexts_of(shard)) * (length * d_in * np.dtype(_ON_DISK[self.storage_dtype]).itemsize + 24)

    def write(self, shard: int, rows: Tensor) -> None:
        """Write a shard whole, ``[contexts, context_length, d_in]``; of several processes one at a time may.

        Raises:
            OSError: The disk is full, or refuses otherwise; the shard then counts as not written.
        """
        chosen = self.contexts_of(shard)
        if not self._written(shard):
            self._path(shard).unlink(missing_ok=True)  # zarr would add to what is there
        self._record_path(shard).unlink(missing_ok=True)
        for left in self._path(shard).parent.glob("*.partial"):  # of a process that was killed
            left.unlink(missing_ok=True)
        values = rows.cpu().to(getattr(torch, self.storage_dtype)).contiguous()
        bits = values.view(torch.uint16) if self.storage_dtype == "bfloat16" else values
        self._array[chosen.start : chosen.stop] = bits.numpy()
        _write_json(self._record_path(shard), {"contexts": len(chosen), "bytes": self._size(shard)})

    def read(self, numbers: Tensor) -> Tensor:
        """Activations of some contexts, ``[n, context_length, d_in]``, in the number format on disk.

        Raises:
            UserError: A chunk is damaged.
        """
        rows = torch.empty(len(numbers), *self.shape, dtype=getattr(torch, self.storage_dtype))
        bits = (rows.view(torch.uint16) if self.storage_dtype == "bfloat16" else rows).numpy()
        for row, number in enumerate(numbers.tolist()):  # eight times as fast as zarr's own selection of several
            try:
                bits[row] = self._array[number]
            except Exception as error:  # whatever zarr makes of bytes that are not its own
                reason = one_line(str(error)).split(". ")[0] or type(error).__name__
                path = self._path(number // self.contexts_per_shard)
                raise UserError(f"data.cache: context {number} in {path} is damaged ({reason}); {_MENDED}") from error
        return rows

    def verify(self, shard: int) -> bool:
        """Whether every checksum of a shard agrees; forgets the shard, so that it is written anew, where one does not."""
        try:
            self.read(torch.tensor(self.contexts_of(shard)))
        except UserError:
            self._record_path(shard).unlink(missing_ok=True)
            return False
        return True

    def claim(self, shard: int) -> BaseFileLock | None:
        """Hold a shard against other processes until released, in whatever thread; None where another one holds it."""
        lock = FileLock(self.folder / "locks" / f"{shard:06}", blocking=False, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    def _path(self, shard: int) -> Path:
        return self.folder / "activations" / "c" / str(shard) / "0" / "0"

    def _size(self, shard: int) -> int:
        return self._path(shard).stat().st_size if self._path(shard).is_file() else 0

    def _record_path(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:06}.json"

    def _record(self, shard: int) -> dict[str, int] | None:
        try:
            record: dict[str, int] = json.loads(self._record_path(shard).read_text())
            return record if {"contexts", "bytes"} <= record.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def _written(self, shard: int) -> int:
        """How many contexts of a shard are on disk: those of its record, while the file has the size that it had then."""
        record = self._record(shard)
        return record["contexts"] if record and record["bytes"] == self._size(shard) else 0


class CachedRows(Worker):
    """Reads the activations that count out of a cache, in the number format and on the device of the run."""

    def __init__(self, cache: ActivationCache, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._cache, self._dtype, self._device = cache, dtype, device

    def rows(self, numbers: Tensor, usable: Tensor) -> Tensor:
        """Activations at the usable positions ``[n, length]`` of contexts ``numbers`` ``[n]``, ``[rows, d_in]``.

        Raises:
            UserError: The cache is damaged there.
        """
        start = time.perf_counter()
        rows = self._cache.read(numbers).to(self._dtype)[usable]
        if not torch.isfinite(rows).all():
            raise UserError(
                f"data.cache: '{self._cache.folder}' lacks activations that it had, or holds some not finite; {_MENDED}"
            )
        self.tokens += usable.numel()
        self.seconds += time.perf_counter() - start
        return rows.to(self._device)


def _zarr() -> ModuleType:
    try:
        import zarr
    except ImportError:
        raise UserError("data.cache: needs zarr, which is not installed; pip install 'hedgelab[llm]'") from None
    module: ModuleType = zarr
    return module


def _make(folder: Path, identity: Identity, contexts: int, d_in: int, storage_dtype: str, shard: int | None) -> None:
    """An empty cache; the manifest comes last, so that a folder without one holds nothing yet."""
    zarr, length = _zarr(), identity["context_length"]
    shard = max(1, _SHARD_TOKENS // length) if shard is None else shard
    for name in ("shards", "locks"):
        (folder / name).mkdir(exist_ok=True)
    zarr.create_array(
        folder / "activations",
        shape=(contexts, length, d_in),
        dtype=_ON_DISK[storage_dtype],
        chunks=(1, length, d_in),
        shards=(shard, length, d_in),
        compressors=[zarr.codecs.Crc32cCodec()],  # activations do not compress; a checksum a chunk
        filters=None,
        fill_value=0x7FC0 if storage_dtype == "bfloat16" else "NaN",  # what a missing chunk reads as: not a number
    )
    manifest = {
        "format": _FORMAT,
        "hedgelab": __version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "contexts": contexts,
        "contexts_per_shard": shard,
        "d_in": d_in,
        "storage_dtype": storage_dtype,
        "normalisation": "none: applied when read",
        "activations": dict(identity),
    }
    _write_json(folder / "manifest.json", manifest)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file whole, or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=2))
    unfinished.replace(path)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
