"""The contract of every DataModule: batch number i of a stage is a pure function of (config, seed, i)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.data.source import ActivationSource, Normalisation
from hedgelab.errors import UserError, whole_number
from hedgelab.kernels.codes import Codes
from hedgelab.seeding import generator, resolve_seed

Stage = Literal["train", "val", "test"]


class ActivationDataModule(L.LightningDataModule, ABC):
    """Serves global batches of activations by number, and hands each rank its slice of them.

    Training streams have no length of their own: they start at the trainer's ``global_step`` and end at ``max_steps``,
    so a resumed run sees exactly the batches that an undisturbed one would have seen. A batch is one step; only to
    hedgelab's own shell, for SAEs so tiny that Lightning costs more than they do, several travel together as a *chunk*.

    Args:
        batch_size: Examples a step, over all ranks together.
        seed: Seed of the data; None takes the run's ``seed_everything``.
        val_batches: Batches of a validation or test pass.
        chunk_steps: Most training steps a chunk; changes no number, and 1 switches chunks off.
    """

    where_and_how: ClassVar[frozenset[str]] = frozenset({"chunk_steps"})
    """Arguments that change no number (:mod:`hedgelab.identity`)."""

    def __init__(self, batch_size: int, seed: int | None = None, val_batches: int = 16, chunk_steps: int = 1) -> None:
        super().__init__()
        self.batch_size = whole_number("data.batch_size", batch_size)
        self.seed = resolve_seed(seed if seed is None else whole_number("data.seed", seed, 0))
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

    def of_member(self, name: str) -> "ActivationDataModule":
        """What the SAE of this name in a group sees: the same as all, unless a DataModule says otherwise."""
        return self

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
        """This rank's rows of a global batch; weights sum to 1 on average over ranks, rows of weight 0 even out the split."""
        count = data_rank(self.trainer)[1]
        if count == 1:
            return batch
        x, features, weight = batch
        if weight is not None:
            missing = -len(x) % count
            places = torch.arange(len(x) + missing, device=x.device).clamp_max(len(x) - 1)
            features = features.to_dense() if isinstance(features, Codes) else features  # a support is small
            x, features = x[places], None if features is None else features[places]
            weight = torch.cat([weight * count, weight.new_zeros(missing)])
        rows = self.rows_for_rank(len(x))
        if features is not None:
            features = features.part(rows) if isinstance(features, Codes) else features[rows]
        return Batch(x[rows], features, None if weight is None else weight[rows])

    def rows_for_rank(self, size: int) -> slice:
        """Which rows of a global batch of ``size`` examples belong to this rank."""
        rank, count = data_rank(self.trainer)
        if size % count:
            raise UserError(f"data.batch_size: {size} cannot be split evenly over {count} ranks")
        return slice(rank * size // count, (rank + 1) * size // count)

    def train_dataloader(self) -> "BatchStream":
        """The stream from the trainer's step to its last; with ``overfit_batches``, its first batches again and again."""
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("train_dataloader needs a trainer; ask batch('train', i) for single batches")
        overfit: int | float = getattr(trainer, "overfit_batches", 0)
        epoch = overfit or trainer.limit_train_batches
        if trainer.max_steps >= 0:
            stop = trainer.max_steps
        elif isinstance(epoch, int) and trainer.max_epochs is not None and trainer.max_epochs >= 0:
            stop = epoch * trainer.max_epochs
        else:
            raise UserError("trainer.max_steps: must be set: training streams have no end of their own")
        steps_a_batch = getattr(trainer.lightning_module, "steps_a_batch", None)
        chunk_steps = 1 if steps_a_batch is None else steps_a_batch(self.chunk_steps)
        return BatchStream(self, "train", stop, chunk_steps, int(overfit))

    def val_dataloader(self) -> "BatchStream":
        """The first ``val_batches`` batches of the validation stage."""
        return SizedBatchStream(self, "val", self.val_batches)

    def test_dataloader(self) -> "BatchStream":
        """The first ``val_batches`` batches of the test stage."""
        return SizedBatchStream(self, "test", self.val_batches)


class NormalisedActivations(ActivationDataModule):
    """Serves ``(x - mean) * scale``, as ``normalisation`` has it, measured in float64 on the first training rows."""

    normalisation: Normalisation

    @abstractmethod
    def measured_rows(self) -> Tensor:
        """The training rows on which the normalisation is measured, ``[n, d_in]``."""

    @cached_property
    def _measured(self) -> tuple[float, Tensor | None]:
        if self.normalisation == "none":
            return 1.0, None
        rows = self.measured_rows().double()
        if self.normalisation == "unit_norm":
            return float(rows.square().sum(dim=-1).mean().rsqrt()), None
        return 1.0, rows.mean(dim=0).float()

    @property
    def activation_scale(self) -> float:
        """What (centred) activations are multiplied by: 1 / root mean squared norm, or 1."""
        return self._measured[0]

    @property
    def activation_mean(self) -> Tensor | None:
        """What is subtracted from activations first, ``[d_in]``; None for nothing."""
        return self._measured[1]

    def normalised(self, x: Tensor, features: Tensor | None = None) -> Batch:
        """A batch of activations ``[rows, d_in]``, float32, and of true magnitudes, which are scaled with them."""
        scale, mean = self._measured
        x = x if mean is None else x - mean
        return Batch(x, features) if scale == 1 else Batch(x * scale, None if features is None else features * scale)

    def described(self, **facts: Any) -> ActivationSource:
        """The normalisation as measured, and further facts about the activations."""
        scale, mean = self._measured
        kept = None if mean is None else tuple(mean.tolist())
        return ActivationSource(normalisation=self.normalisation, scale=scale, mean=kept, **facts)


def held_out_split(n: int, share: float, what: str) -> dict[Stage, Tensor]:
    """Which of n rows or contexts belong to which stage: half the share each to validation and test, whatever the seed."""
    held = int(n * share / 2) if 0 < share < 1 else 0
    if not 1 <= held < n / 2:
        raise UserError(f"data.held_out: {share} of {n} {what} leaves a stage without any; change it, or give more")
    order = torch.randperm(n, generator=generator(0, "split"))
    train, val, test = torch.split(order, [n - 2 * held, held, held])
    return {"train": train, "val": val, "test": test}


def data_rank(trainer: L.Trainer | None) -> tuple[int, int]:
    """Which part of each batch this process works on, and of how many; processes that share an SAE's latents share it."""
    strategy = None if trainer is None else trainer.strategy
    split: dict[str, int] = getattr(strategy, "distributed_sampler_kwargs", None) or {}
    return split.get("rank", 0), split.get("num_replicas", 1)


@dataclass
class BatchStream:
    """The batches of a stage up to number ``stop - 1``, from the trainer's current step on where they are for training.

    With ``chunk_steps`` above 1, batches come in lists of at most so many, cut at its multiples. With ``repeated`` above 0,
    there are only the first so many batches, which each epoch goes through again.
    """

    data: ActivationDataModule
    stage: Stage
    stop: int
    chunk_steps: int = 1
    repeated: int = 0

    def __iter__(self) -> Iterator[Any]:
        trainer = self.data.trainer
        start, stop = (trainer.global_step if self.stage == "train" and trainer is not None else 0), self.stop
        if self.repeated:
            start, stop = start % self.repeated, self.repeated
        batches = self.data.batches(self.stage, start, stop)
        return batches if self.chunk_steps == 1 else _in_chunks(batches, start, stop, self.chunk_steps)


class SizedBatchStream(BatchStream):
    """A stream whose length Lightning may know; that of training is not the same at its start and where it goes on."""

    def __len__(self) -> int:
        return self.stop


def _in_chunks(batches: Iterator[Batch], start: int, stop: int, steps: int) -> Iterator[list[Batch]]:
    """Batches ``start`` … ``stop - 1`` in lists of at most ``steps``, cut at multiples of ``steps``.

    >>> list(_in_chunks(iter("cdefg"), 2, 7, 4))
    [['c', 'd'], ['e', 'f', 'g']]
    """
    while start < stop:
        cut = min(stop, (start // steps + 1) * steps)
        yield list(islice(batches, cut - start))
        start = cut
