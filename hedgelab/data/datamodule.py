"""The contract of every DataModule: batch number i of a stage is a pure function of (config, seed, i)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import lightning as L
import torch
from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError, whole_number
from hedgelab.seeding import resolve_seed

Stage = Literal["train", "val", "test"]


class ActivationDataModule(L.LightningDataModule, ABC):
    """Serves global batches of activations by number, and hands each rank its slice of them.

    Training streams have no length of their own: they start at the trainer's ``global_step`` and end at ``max_steps``,
    so a resumed run sees exactly the batches that an undisturbed one would have seen. Several batches travel together
    as one *chunk*, so that what a trainer costs per call is paid once a chunk, not once a step.

    Args:
        batch_size: Examples a step, over all ranks together.
        seed: Seed of the data; None takes the run's ``seed_everything``.
        val_batches: Batches of a validation or test pass.
        chunk_steps: Most training steps a chunk; lowered so that logging, checkpoint and end steps fall between chunks.
    """

    where_and_how: ClassVar[frozenset[str]] = frozenset({"chunk_steps"})
    """Arguments that change no number (:mod:`hedgelab.identity`)."""

    def __init__(self, batch_size: int, seed: int | None = None, val_batches: int = 16, chunk_steps: int = 1) -> None:
        super().__init__()
        self.batch_size = whole_number("data.batch_size", batch_size)
        self.seed = resolve_seed(seed)
        self.val_batches = whole_number("data.val_batches", val_batches)
        self.chunk_steps = whole_number("data.chunk_steps", chunk_steps)

    @property
    @abstractmethod
    def d_in(self) -> int:
        """Width of the activations."""

    @property
    def feature_directions(self) -> Tensor | None:
        """True unit directions of the known features, ``[n, d_in]``; None where they are unknown."""
        return None

    @abstractmethod
    def batch(self, stage: Stage, index: int) -> Batch:
        """Global batch number ``index`` of a stage, ``[batch_size, d_in]``; the same whenever and wherever asked for."""

    def source(self) -> ActivationSource | None:
        """Where the activations come from and how they are normalised, to travel with the SAE; None for toys."""
        return None

    def describe(self) -> dict[str, float]:
        """Numbers about the data that a run should show from its start."""
        return {}

    def throughput(self) -> dict[str, float]:
        """How fast the data has been made so far; asked for when training ends."""
        return {}

    def plain(self, steps: int, stage: Stage = "train") -> Iterator[Batch]:
        """Global batches 0 … ``steps - 1`` of a stage, for a training loop of one's own: no trainer, no ranks."""
        self.prepare_data()
        self.setup("fit")
        for index in range(whole_number("steps", steps)):
            yield self.batch(stage, index)

    def batches(self, stage: Stage, start: int, stop: int) -> Iterator[Batch]:
        """This rank's slices of global batches ``start`` … ``stop - 1``."""
        yield from self.batches_at(stage, range(start, stop))

    def batches_at(self, stage: Stage, numbers: Sequence[int]) -> Iterator[Batch]:
        """This rank's slices of the global batches with these numbers, in this order; override to read ahead.

        Batches of one block (see :meth:`batches_per_block`) that follow each other must not cost more than one block.
        """
        for number in numbers:
            yield self.slice_for_rank(self.batch(stage, number))

    def batches_per_block(self, stage: Stage) -> int:
        """How many consecutive batches, counted from batch 0, are made together; 1 where each is made by itself."""
        return 1

    def slice_for_rank(self, batch: Batch) -> Batch:
        """The rows of a global batch that belong to this rank; weights sum to 1 on average over the ranks.

        Raises:
            UserError: The batch cannot be split evenly. A weighted one always can: rows of weight 0 are added.
        """
        count = self._rank()[1]
        if count == 1:
            return batch
        if batch.weight is not None:
            batch = _padded(batch, -len(batch.x) % count)
        rows = self.rows_for_rank(len(batch.x))
        x, features, weight = (None if part is None else part[rows] for part in batch)
        assert x is not None
        return Batch(x, features, None if weight is None else weight * count)

    def rows_for_rank(self, size: int) -> slice:
        """Which rows of a global batch of ``size`` examples belong to this rank.

        Raises:
            UserError: They cannot be split evenly.
        """
        rank, count = self._rank()
        if size % count:
            raise UserError(f"data.batch_size: {size} cannot be split evenly over {count} ranks")
        return slice(rank * size // count, (rank + 1) * size // count)

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else data_rank(self.trainer)

    def train_dataloader(self) -> ChunkedStream:
        """The stream from the trainer's current step to its last."""
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("train_dataloader needs a trainer; ask batch('train', i) for single batches")
        if trainer.max_steps < 0:
            raise UserError("trainer.max_steps: must be set: training streams have no end of their own")
        return ChunkedStream(self, "train", trainer.global_step, trainer.max_steps, self.aligned_chunk_steps())

    def val_dataloader(self) -> ChunkedStream:
        """The first ``val_batches`` batches of the validation stage."""
        return ChunkedStream(self, "val", 0, self.val_batches, 1)

    def test_dataloader(self) -> ChunkedStream:
        """The first ``val_batches`` batches of the test stage."""
        return ChunkedStream(self, "test", 0, self.val_batches, 1)

    def aligned_chunk_steps(self) -> int:
        """The largest chunk that divides every interval at which the trainer looks up between steps."""
        assert self.trainer is not None
        intervals = [getattr(self.trainer, "log_every_n_steps", 0)]
        if isinstance(self.trainer.val_check_interval, int):
            intervals.append(self.trainer.val_check_interval)
        intervals += [getattr(callback, "_every_n_train_steps", 0) for callback in self.trainer.checkpoint_callbacks]
        return max(d for d in range(1, self.chunk_steps + 1) if math.gcd(*intervals) % d == 0)


def data_rank(trainer: L.Trainer) -> tuple[int, int]:
    """Which part of each batch this process works on, and of how many; processes that share an SAE's latents share it."""
    split: dict[str, int] = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return split.get("rank", 0), split.get("num_replicas", 1)


def _padded(batch: Batch, count: int) -> Batch:
    """The batch with its last row ``count`` times more, at weight 0."""
    x, features, weight = (
        None if part is None else torch.cat([part, part[-1:].expand(count, *part.shape[1:])]) for part in batch
    )
    assert x is not None
    if weight is not None and count:
        weight[-count:] = 0
    return Batch(x, features, weight)


class ChunkedStream:
    """Batches ``start`` … ``stop - 1`` of a stage, in lists of at most ``chunk_steps``, cut at its multiples."""

    def __init__(self, data: ActivationDataModule, stage: Stage, start: int, stop: int, chunk_steps: int) -> None:
        self.data, self.stage, self.start, self.stop, self.chunk_steps = data, stage, start, stop, chunk_steps

    def __iter__(self) -> Iterator[list[Batch]]:
        chunk: list[Batch] = []
        for index, batch in enumerate(self.data.batches(self.stage, self.start, self.stop), start=self.start + 1):
            chunk.append(batch)
            if index % self.chunk_steps == 0 or index == self.stop:
                yield chunk
                chunk = []
