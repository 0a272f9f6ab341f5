"""The contract of every DataModule: batch number i of a stage is a pure function of (config, seed, i)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import lightning as L
from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.errors import UserError
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

    def __init__(self, batch_size: int, seed: int | None = None, val_batches: int = 16, chunk_steps: int = 1) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("val_batches", val_batches), ("chunk_steps", chunk_steps)):
            if value < 1:
                raise UserError(f"data.{name}: must be at least 1, got {value}")
        self.batch_size = batch_size
        self.seed = resolve_seed(seed)
        self.val_batches = val_batches
        self.chunk_steps = chunk_steps

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

    def describe(self) -> dict[str, float]:
        """Numbers about the data that a run should show from its start."""
        return {}

    def throughput(self) -> dict[str, float]:
        """How fast the data has been made so far; asked for when training ends."""
        return {}

    def batches(self, stage: Stage, start: int, stop: int) -> Iterator[Batch]:
        """This rank's slices of global batches ``start`` … ``stop - 1``; override to prefetch."""
        for index in range(start, stop):
            yield self.slice_for_rank(self.batch(stage, index))

    def slice_for_rank(self, batch: Batch) -> Batch:
        """The rows of a global batch that belong to this rank."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if world_size == 1:
            return batch
        size = batch.x.shape[0]
        if size % world_size:
            raise UserError(f"data.batch_size: {size} cannot be split evenly over {world_size} ranks")
        rows = slice(rank * size // world_size, (rank + 1) * size // world_size)
        return Batch(batch.x[rows], *(None if part is None else part[rows] for part in batch[1:]))

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
