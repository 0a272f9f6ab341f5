"""Activations of your own: a tensor, a file, or any map-style dataset, as a DataModule."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import lru_cache
from itertools import tee
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils import data as torch_data
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hedgelab.batch import Batch
from hedgelab.data.datamodule import NormalisedActivations, Stage, held_out_split
from hedgelab.data.source import ActivationSource, Normalisation
from hedgelab.errors import UserError, one_line, whole_number
from hedgelab.seeding import generator

_ROWS_AT_ONCE = 65_536  # that the normalisation is measured on, and that are checked together

Pair = tuple[Tensor, Tensor | None]


class DatasetActivations(NormalisedActivations):
    """Activations of any map-style dataset whose items are tensors ``[d_in]`` or pairs (tensor, features).

    Each epoch puts the training rows into a new order. Batch i takes the rows at places ``i * batch_size`` to
    ``(i + 1) * batch_size - 1`` of these orders laid end to end, so every row comes once an epoch. Which rows are held out
    does not depend on the seed. Batches are float32.

    Args:
        dataset: The dataset; or a DataLoader over one, of which dataset, batch size, ``collate_fn`` and ``num_workers`` are
            taken. The order of its rows is hedgelab's: a seeded permutation an epoch.
        feature_directions: Directions of the features, ``[n_features, d_in]``; items must then be pairs.
        batch_size: Rows a step, over all ranks together; None: the DataLoader's, else 1024.
        num_workers: Processes that read ahead; None: the DataLoader's, else none.
        held_out: Share of the rows kept for validation and test, half each. Rows are held out at random: where neighbours
            are alike (tokens of one text), validation is a little too easy.
        normalisation: ``unit_norm`` scales to a mean squared norm of 1, ``centred`` subtracts the mean; measured on the first
            65 536 training rows.
        seed: Seed of the order of the training rows; None takes the run's.
        val_batches: Batches of a validation or test pass; None: as many as the held-out rows fill. More repeat rows.
        chunk_steps: Most training steps a chunk.
    """

    where_and_how: ClassVar[frozenset[str]] = frozenset({"num_workers"})
    d_in = 0  # until item 0 has been read
    feature_directions: Tensor | None = None

    def __init__(
        self,
        dataset: torch_data.Dataset[Any] | DataLoader[Any],
        feature_directions: Tensor | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        held_out: float = 0.1,
        normalisation: Normalisation = "none",
        seed: int | None = None,
        val_batches: int | None = None,
        chunk_steps: int = 1,
    ) -> None:
        self._collate = torch_data.default_collate
        if isinstance(dataset, DataLoader):
            usual = torch_data.SequentialSampler | torch_data.RandomSampler
            if dataset.batch_size is None or not isinstance(dataset.sampler, usual):
                own = type(dataset.sampler if dataset.batch_size else dataset.batch_sampler).__name__
                raise UserError(f"data.dataset: the DataLoader's own {own} would be ignored; give the dataset instead")
            batch_size = dataset.batch_size if batch_size is None else batch_size
            num_workers = dataset.num_workers if num_workers is None else num_workers
            self._collate, dataset = dataset.collate_fn, dataset.dataset
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            raise UserError(f"data.dataset: expected a map-style dataset (length, items), got {type(dataset).__name__}")
        self._dataset = dataset
        self._workers = whole_number("data.num_workers", num_workers or 0, 0)
        batch_size = whole_number("data.batch_size", 1024 if batch_size is None else batch_size)
        n = len(self._dataset)
        self._parts = held_out_split(n, held_out, "rows")
        x, features = self._read(torch.tensor([0]))
        self.d_in = x.shape[1]
        if feature_directions is not None:
            if features is None:
                raise UserError("data.feature_directions: need data.features, the features' magnitudes in each row")
            expected, shape = [features.shape[1], self.d_in], list(feature_directions.shape)
            if shape != expected:
                raise UserError(f"data.feature_directions: expected [n_features, d_in] = {expected}, got {shape}")
            self.feature_directions = feature_directions.float()
        training, held = len(self._parts["train"]), len(self._parts["val"])
        if training < batch_size:
            rows = f"{training} training rows ({n} rows, {2 * held} of them held out)"
            raise UserError(f"data.batch_size: must be at most the {rows}, got {batch_size}")
        # Fewer held-out rows than a batch are served in batches of a power of two, which ranks can split.
        held_batch = batch_size if held >= batch_size else 1 << (held.bit_length() - 1)
        super().__init__(batch_size, seed, held // held_batch if val_batches is None else val_batches, chunk_steps)
        self._sizes: dict[Stage, int] = {"train": batch_size, "val": held_batch, "test": held_batch}
        self.normalisation = normalisation

    def _read(self, rows: Tensor) -> Pair:
        return next(self.read([rows], ahead=False))

    def batch(self, stage: Stage, index: int) -> Batch:
        """Global batch number ``index`` of a stage, ``[batch_size, d_in]``; held-out rows may make smaller ones."""
        return self.normalised(*self._read(self._rows(stage, index)))

    def batches_at(self, stage: Stage, numbers: Sequence[int]) -> Iterator[Batch]:
        """This rank's slices of the batches with these numbers; no other rows are read."""
        mine = self.rows_for_rank(self._sizes[stage])
        for pair in self.read((self._rows(stage, number)[mine] for number in numbers), ahead=True):
            yield self.normalised(*pair)

    def source(self) -> ActivationSource | None:
        """The normalisation as measured; None where activations are served as they are."""
        return None if self.normalisation == "none" else self.described()

    def measured_rows(self) -> Tensor:
        """The first training rows."""
        return self._read(self._parts["train"][:_ROWS_AT_ONCE])[0]

    def _rows(self, stage: Stage, index: int) -> Tensor:
        """Numbers of the rows of a batch."""
        part, size = self._parts[stage], self._sizes[stage]
        epoch, first = divmod(index * size, len(part))
        if stage != "train":
            return part[torch.arange(first, first + size) % len(part)]
        chosen = _order(self.seed, len(part), epoch)[first : first + size]
        if missing := size - len(chosen):  # the batch ends in the next epoch
            chosen = torch.cat([chosen, _order(self.seed, len(part), epoch + 1)[:missing]])
        return part[chosen]

    def read(self, batches: Iterable[Tensor], ahead: bool) -> Iterator[Pair]:
        """Of each set of rows activations ``[n, d_in]`` and, where known, magnitudes ``[n, n_features]``, float32."""
        numbers, sampler = tee(rows.tolist() for rows in batches)
        loader = DataLoader(
            self._dataset, batch_sampler=sampler, collate_fn=self._collate, num_workers=self._workers if ahead else 0,
            generator=torch.Generator(),  # none of the run's random numbers
        )  # fmt: skip
        try:
            for rows, items in zip(numbers, loader, strict=True):
                yield self._checked(rows, items)
        except RuntimeError as error:
            if "equal size" not in str(error):
                raise
            reason = one_line(str(error).rpartition("stack expects")[2])
            raise UserError(f"data.dataset: expected items of width {self.d_in}, as item 0 has ({reason})") from error

    def _checked(self, rows: list[int], items: Any) -> Pair:
        parts = items if isinstance(items, tuple | list) else (items,)
        if not 1 <= len(parts) <= 2 or not all(isinstance(part, Tensor) and part.dim() == 2 for part in parts):
            shown = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
            raise UserError(f"data.dataset: items must be tensors [d_in], or pairs of them (x, features), got {shown}")
        x = parts[0].float()
        if self.d_in and x.shape[1] != self.d_in:
            raise UserError(f"data.dataset: expected items of width {self.d_in}, as item 0 has, got {x.shape[1]}")
        if (wrong := _row_not_finite(x)) is not None:
            raise UserError(f"data.dataset: item {rows[wrong]} is not finite (NaN or infinite)")
        return x, parts[1].float() if len(parts) == 2 else None


@lru_cache(maxsize=4)
def _order(seed: int, n: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "rows", epoch))


class TensorActivations(DatasetActivations):
    """Activations that you have: a tensor, or a ``.safetensors`` or ``.npy`` file.

    >>> data = TensorActivations(torch.randn(1000, 8), batch_size=100)
    >>> [tuple(batch.x.shape) for batch in data.plain(2)]
    [(100, 8), (100, 8)]

    Args:
        x: Activations ``[n, d_in]``, or the path of a file. A ``.safetensors`` file holds them under the name ``x`` or as
            its only tensor, and may hold ``features`` and ``feature_directions`` beside them. A ``.npy`` file is mapped, so it
            may be larger than memory.
        features: True magnitudes of known features in each row, ``[n, n_features]`` (0 where silent).
        feature_directions: Directions of these features, ``[n_features, d_in]``; they need ``features``.
        batch_size: Rows a step, over all ranks together.
        **kwargs: The other arguments of :class:`DatasetActivations`.
    """

    def __init__(
        self,
        x: str | Tensor,
        features: Tensor | None = None,
        feature_directions: Tensor | None = None,
        batch_size: int = 1024,
        **kwargs: Any,
    ) -> None:
        given: dict[str, Any] = _load(Path(x)) if isinstance(x, str | Path) else {"x": x}
        beside = {"features": features, "feature_directions": feature_directions}
        given |= {name: value for name, value in beside.items() if value is not None}
        tensors = {name: _checked(name, value) for name, value in given.items()}
        self._x, self._features = tensors["x"], tensors.get("features")
        if self._features is not None and len(self._features) != len(self._x):
            raise UserError(f"data.features: expected {len(self._x)} rows, as x has, got {len(self._features)}")
        directions = tensors.get("feature_directions")
        super().__init__(TensorDataset(self._x), directions, batch_size, num_workers=None, **kwargs)

    def read(self, batches: Iterable[Tensor], ahead: bool) -> Iterator[Pair]:
        """Rows by number."""
        for rows in batches:
            yield self._x[rows].float(), None if self._features is None else self._features[rows].float()


def _load(path: Path) -> dict[str, Any]:
    """The tensors of a file."""
    if path.suffix not in (".safetensors", ".npy"):
        raise UserError(f"data.x: expected a tensor, or a .safetensors or .npy file, got {str(path)!r}")
    if not path.is_file():
        raise UserError(f"data.x: there is no file {str(path)!r}; the path is relative to {Path.cwd()}")
    try:
        if path.suffix == ".npy":
            return {"x": np.load(path, mmap_mode="c", allow_pickle=False)}
        tensors = load_file(path)
    except (ValueError, OSError, EOFError, SafetensorError) as error:
        raise UserError(f"data.x: cannot read {path}: {error}") from error
    if len(tensors) == 1:
        return {"x": next(iter(tensors.values()))}
    if "x" not in tensors:
        raise UserError(f"data.x: {path} holds {', '.join(tensors) or 'no tensor'}; name the activations 'x'")
    return {name: tensors[name] for name in ("x", "features", "feature_directions") if name in tensors}


def _checked(name: str, value: Any) -> Tensor:
    """What is given as a tensor ``[n, width]`` of finite numbers."""
    try:
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"data.{name}: expected a tensor, got {type(value).__name__} ({error})") from None
    if tensor.dim() != 2 or not tensor.shape[1] or tensor.is_complex() or tensor.dtype == torch.bool:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"data.{name}: expected numbers [rows, width], got {kind} {list(tensor.shape)}")
    for start in range(0, len(tensor), _ROWS_AT_ONCE):
        if (wrong := _row_not_finite(tensor[start : start + _ROWS_AT_ONCE])) is not None:
            raise UserError(f"data.{name}: row {start + wrong} is not finite (NaN or infinite)")
    return tensor


def _row_not_finite(rows: Tensor) -> int | None:
    """The first row that holds a NaN or an infinity; None where all are finite."""
    wrong = ~rows.isfinite().all(dim=1)
    return int(wrong.nonzero()[0, 0]) if wrong.any() else None
