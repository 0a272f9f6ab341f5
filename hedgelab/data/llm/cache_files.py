"""Activation caches on disk: a zarr array of raw activations, a manifest that says whose, a record of each shard.

``DIR/activations`` is a zarr v3 array ``[contexts, context_length, d_in]``: one chunk a context with a checksum, many chunks
a shard. Every position is kept as the model gives it, so that batch size, seed, normalisation, held-out share, skipped
positions and outlier limit are free when it is read.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from hedgelab import __version__
from hedgelab.data.llm.cache_identity import Identity, check_identity
from hedgelab.errors import UserError

_FORMAT = 1
_SHARD_TOKENS = 16384  # at most so much is computed in vain when writing is interrupted
_ON_DISK = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}  # zarr has no bfloat16
_NOT_A_NUMBER = {"float32": "NaN", "float16": "NaN", "bfloat16": 0x7FC0}  # what a missing chunk reads as


class ActivationCache:
    """A folder of activations.

    Args:
        folder: The folder.
        manifest: What its ``manifest.json`` says.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.contexts: int = manifest["contexts"]
        self.contexts_per_shard: int = manifest["contexts_per_shard"]
        self.storage_dtype: str = manifest["storage_dtype"]
        self.shape: tuple[int, int] = (manifest["activations"]["context_length"], manifest["d_in"])
        self._check_manifest()
        mode = "r+" if os.access(folder, os.W_OK) else "r"
        self._array = _zarr().open_array(folder / "activations", mode=mode, zarr_format=3)
        self._check_array()

    @classmethod
    def open(cls, folder: str | Path) -> ActivationCache:
        """A cache that is there.

        Raises:
            UserError: It is not, or its manifest is damaged.
        """
        path = Path(folder) / "manifest.json"
        if not path.is_file():
            raise UserError(
                f"data.cache: there is no activation cache in '{folder}'; write it with `hedgelab cache` and this config, "
                "or leave data.cache out to run the model while training"
            )
        try:
            manifest = json.loads(path.read_text())
            if manifest["format"] != _FORMAT:
                raise UserError(
                    f"data.cache: '{folder}' has format {manifest['format']}, this hedgelab reads {_FORMAT}; write it anew"
                )
            return cls(Path(folder), manifest)
        except UserError:
            raise
        except Exception as error:  # whatever zarr makes of files that are not its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"data.cache: '{folder}' is damaged ({reason}); delete it and write it anew") from error

    @classmethod
    def begin(
        cls,
        folder: str | Path,
        identity: Identity,
        contexts: int,
        d_in: int,
        storage_dtype: str,
        shard: int | None = None,
        earlier: Callable[[ActivationCache], Identity] | None = None,
    ) -> ActivationCache:
        """A cache to write on: made if it is not there, made longer if it is too short.

        Args:
            folder: Where.
            identity: What the activations depend on.
            contexts: How many contexts it shall hold.
            d_in: Width of the activations.
            storage_dtype: Number format on disk.
            shard: Contexts a shard; None for about 16 thousand tokens.
            earlier: Gives what earlier releases wrote for the identity.

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
            cache = cls.open(folder)
            check_identity(folder, cache.manifest["activations"], identity, earlier(cache) if earlier else None)
            cache.check_dtype(storage_dtype, exactly=True)
            return cache if contexts <= cache.contexts else cache._lengthened(contexts)

    def _check_manifest(self) -> None:
        """See that the numbers, which may be a stranger's, are such as a cache has.

        Raises:
            ValueError: They are not.
        """
        for value in (self.contexts, self.contexts_per_shard, *self.shape):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**40:
                raise ValueError(f"manifest.json: {value!r} is no number of contexts, tokens or dimensions")
        if self.storage_dtype not in _ON_DISK:
            raise ValueError(f"manifest.json: storage_dtype: expected one of {', '.join(_ON_DISK)}")

    def _check_array(self) -> None:
        """See that the array is laid out as :func:`_make` does, so that no other codec of zarr's is ever at work.

        Raises:
            ValueError: It is not.
        """
        array = self._array
        laid_out = (array.ndim, array.shape[1:], array.chunks, str(array.dtype), array.filters)
        if laid_out != (3, self.shape, (1, *self.shape), _ON_DISK[self.storage_dtype], ()):
            raise ValueError("zarr.json: an array of another shape or kind than manifest.json says")
        if array.shards != (self.contexts_per_shard, *self.shape) or array.shape[0] < self.contexts:
            raise ValueError("zarr.json: other contexts or shards than manifest.json says")
        if [type(codec) for codec in array.compressors] != [_zarr().codecs.Crc32cCodec]:
            raise ValueError("zarr.json: other codecs than checksums")

    def check_dtype(self, wanted: str, exactly: bool = False) -> None:
        """Make sure that a number format can be had from this cache: its own, or what its float32 rounds to.

        Raises:
            UserError: It cannot.
        """
        if wanted != self.storage_dtype and (exactly or self.storage_dtype != "float32"):
            raise UserError(
                f"data.storage_dtype: the cache in '{self.folder}' holds {self.storage_dtype}, this config asks for {wanted}; "
                f"set data.storage_dtype: {self.storage_dtype}, or give data.cache a folder of its own"
            )

    def check_coverage(self, contexts: int) -> None:
        """Make sure that the first ``contexts`` contexts are there and whole, as far as sizes tell.

        Raises:
            UserError: A shard was cut off, or is not written yet.
        """
        if contexts > self.contexts:
            raise self._incomplete(self.contexts, contexts)
        for shard in self.shards(contexts):
            record, path = self._record(shard), self._path(shard)
            if record is None:
                raise self._incomplete(shard * self.contexts_per_shard, contexts)
            size = path.stat().st_size if path.is_file() else None
            if size != record["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes instead of {record['bytes']}"
                raise UserError(f"data.cache: {path} {found}; `hedgelab cache` with this config writes it anew")

    def shards(self, contexts: int | None = None) -> range:
        """Numbers of the shards that hold the first contexts, all by default."""
        return range(-(-(self.contexts if contexts is None else contexts) // self.contexts_per_shard))

    def contexts_of(self, shard: int) -> range:
        """Numbers of the contexts in a shard."""
        start = shard * self.contexts_per_shard
        return range(start, min(start + self.contexts_per_shard, self.contexts))

    def is_done(self, shard: int) -> bool:
        """Whether a shard is written, and has the size that it had then."""
        record, path = self._record(shard), self._path(shard)
        return (
            record is not None
            and record["contexts"] == len(self.contexts_of(shard))
            and path.is_file()
            and path.stat().st_size == record["bytes"]
        )

    def bytes_of(self, shard: int) -> int:
        """Size of a shard on disk, about."""
        length, d_in = self.shape
        return len(self.contexts_of(shard)) * (length * d_in * np.dtype(_ON_DISK[self.storage_dtype]).itemsize + 24)

    def write(self, shard: int, rows: Tensor) -> None:
        """Write a shard whole, ``[contexts, context_length, d_in]``; of several processes one at a time may.

        Raises:
            OSError: The disk is full, or refuses otherwise; the shard then counts as not written.
        """
        chosen, record = self.contexts_of(shard), self._record(shard)
        if record is None or not self._path(shard).is_file() or self._path(shard).stat().st_size != record["bytes"]:
            self._path(shard).unlink(missing_ok=True)  # zarr would add to what is there
        self._record_path(shard).unlink(missing_ok=True)
        for left in self._path(shard).parent.glob("*.partial"):  # of a process that was killed
            left.unlink(missing_ok=True)
        self._array[chosen.start : chosen.stop] = _to_disk(rows.cpu(), self.storage_dtype)
        written = {"contexts": len(chosen), "bytes": self._path(shard).stat().st_size}
        _write_text(self._record_path(shard), json.dumps(written))

    def read(self, numbers: Tensor) -> Tensor:
        """Activations of some contexts, ``[n, context_length, d_in]``, in the number format on disk.

        Raises:
            UserError: A chunk is damaged.
        """
        rows = torch.empty(len(numbers), *self.shape, dtype=getattr(torch, self.storage_dtype))
        for row, number in enumerate(numbers.tolist()):  # eight times as fast as zarr's own selection of several
            try:
                rows[row] = _from_disk(np.asarray(self._array[number]), self.storage_dtype)
            except Exception as error:  # whatever zarr makes of bytes that are not its own
                raise self._damaged(number, error) from error
        return rows

    def verify(self, shard: int) -> bool:
        """Whether every checksum of a shard agrees; forgets the shard, so that it is written anew, where one does not."""
        try:
            self.read(torch.tensor(self.contexts_of(shard)))
        except UserError:
            self._record_path(shard).unlink(missing_ok=True)
            return False
        return True

    @contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """Hold a shard against other processes while writing it; gives False if another one does."""
        lock = FileLock(self.folder / "locks" / f"{shard:06}", blocking=False)
        try:
            lock.acquire()
        except TimeoutError:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _incomplete(self, there: int, wanted: int) -> UserError:
        return UserError(
            f"data.cache: '{self.folder}' holds the first {there} of the {wanted} contexts that this config reads; "
            "`hedgelab cache` with this config writes the others"
            + (f", or data.max_contexts: {there} makes do with these" if there else "")
        )

    def _damaged(self, number: int, error: Exception) -> UserError:
        path = self._path(number // self.contexts_per_shard)
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        return UserError(
            f"data.cache: context {number} in {path} is damaged ({reason}); `hedgelab cache --verify` with this config "
            "finds and writes anew whatever is damaged"
        )

    def _lengthened(self, contexts: int) -> ActivationCache:
        self._array.resize((contexts, *self.shape))
        self.manifest["contexts"] = contexts
        _write_text(self.folder / "manifest.json", json.dumps(self.manifest, indent=2))
        return ActivationCache(self.folder, self.manifest)

    def _path(self, shard: int) -> Path:
        return self.folder / "activations" / "c" / str(shard) / "0" / "0"

    def _record_path(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:06}.json"

    def _record(self, shard: int) -> dict[str, int] | None:
        try:
            record: dict[str, int] = json.loads(self._record_path(shard).read_text())
            return record if {"contexts", "bytes"} <= record.keys() else None
        except (OSError, ValueError, AttributeError):
            return None


def _make(folder: Path, identity: Identity, contexts: int, d_in: int, storage_dtype: str, shard: int | None) -> None:
    """An empty cache; the manifest comes last, so that a folder without one holds nothing yet."""
    length = identity["context_length"]
    shard = max(1, _SHARD_TOKENS // length) if shard is None else shard
    for name in ("shards", "locks"):
        (folder / name).mkdir(exist_ok=True)
    zarr = _zarr()
    zarr.create_array(
        folder / "activations",
        shape=(contexts, length, d_in),
        dtype=_ON_DISK[storage_dtype],
        chunks=(1, length, d_in),
        shards=(shard, length, d_in),
        compressors=[zarr.codecs.Crc32cCodec()],  # activations do not compress; a checksum a chunk
        filters=None,
        fill_value=_NOT_A_NUMBER[storage_dtype],
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
    _write_text(folder / "manifest.json", json.dumps(manifest, indent=2))


def _to_disk(rows: Tensor, storage_dtype: str) -> NDArray[Any]:
    rows = rows.to(getattr(torch, storage_dtype)).contiguous()
    array: NDArray[Any] = (
        (rows.view(torch.int16).numpy().view(np.uint16)) if storage_dtype == "bfloat16" else rows.numpy()
    )
    return array


def _from_disk(values: NDArray[Any], storage_dtype: str) -> Tensor:
    if storage_dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _write_text(path: Path, text: str) -> None:
    """Replace a file whole, or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def _zarr() -> ModuleType:
    """The zarr package.

    Raises:
        UserError: It is not installed.
    """
    try:
        import zarr
    except ImportError:
        raise UserError("data.cache: needs zarr, which is not installed; pip install 'hedgelab[llm]'") from None
    module: ModuleType = zarr
    return module
