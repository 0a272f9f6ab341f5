"""The part of a training stream that belongs to one phase, in order or reordered."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule, Stage
from hedgelab.seeding import generator
from hedgelab.training.steps import StepBatches

_HELD_BYTES = 2**30


class PhaseData(ActivationDataModule):
    """Batches ``start`` … ``start + steps - 1`` of another DataModule's training stream; its other stages as they are.

    The ``reordered`` members of a group see the same batches in another order (``[""]``: the SAE that is trained alone), at
    every scale the same kind of order: the blocks in which the data is made are permuted over the whole phase, and the batches
    within each block, so that a batch moves about a third of the phase on average. The order depends on the data's seed alone.
    A phase of up to 1 GiB is held in memory; of a larger one the data is made twice, once in each order, for which a language
    model runs twice.
    """

    def __init__(self, data: ActivationDataModule, start: int, steps: int, reordered: Sequence[str] = ()) -> None:
        super().__init__(data.batch_size, data.seed, data.val_batches, data.chunk_steps)
        self.data, self.start, self.steps, self.reordered = data, start, steps, list(reordered)

    def renamed(self, names: Mapping[str, str]) -> "PhaseData":
        """The phase for some members, which go by other names; ``""`` where there is one alone."""
        return PhaseData(self.data, self.start, self.steps, [names[name] for name in self.reordered if name in names])

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.data.d_in

    @property
    def feature_directions(self) -> Tensor | None:
        """True unit directions of the known features, ``[n, d_in]``; None where they are unknown."""
        return self.data.feature_directions

    def prepare_data(self) -> None:
        """The data's."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """The data's, which from here on serves the same rank."""
        self.data.trainer = self.trainer
        self.data.setup(stage)

    def on_exception(self, exception: BaseException) -> None:
        """The data's."""
        self.data.on_exception(exception)

    def batch(self, stage: Stage, index: int) -> Batch:
        """Global batch number ``index`` of the phase, or of another stage."""
        return self.data.batch(stage, self._number(index) if stage == "train" else index)

    def batches(self, stage: Stage, start: int, stop: int) -> Iterator[Batch]:
        """This rank's slices of the phase's batches; as :class:`~hedgelab.training.steps.StepBatches` where orders differ."""
        if stage != "train":
            return self.data.batches(stage, start, stop)
        if self.reordered == [""]:
            return self.data.batches_at("train", [self._number(index) for index in range(start, stop)])
        if self.reordered:
            return self._in_two_orders(start, stop)  # type: ignore[return-value]
        return self.data.batches("train", self.start + start, self.start + stop)

    @cached_property
    def order(self) -> list[int]:
        """Which batch of the phase comes when for reordered members."""
        size, rng = self.data.batches_per_block("train"), generator(self.seed, "reorder")
        cuts = range((self.start // size + 1) * size, self.start + self.steps, size)  # where blocks of the stream begin
        bounds = [0, *(cut - self.start for cut in cuts), self.steps]
        blocks = [low + torch.randperm(high - low, generator=rng) for low, high in pairwise(bounds)]
        chosen: list[int] = torch.cat([blocks[i] for i in torch.randperm(len(blocks), generator=rng)]).tolist()
        return chosen

    def _number(self, index: int) -> int:
        """Which batch of the data's stream is number ``index`` here."""
        return self.start + (self.order[index] if self.reordered == [""] else index)

    def _in_two_orders(self, start: int, stop: int) -> Iterator[StepBatches]:
        if 4 * self.batch_size * self.d_in * self.steps <= _HELD_BYTES:
            batches = self.data.batches("train", self.start, self.start + self.steps)
            shown = tqdm(batches, "Activations", self.steps, delay=2, unit="batch", miniters=1, mininterval=1)
            held = [Batch(batch.x, None, batch.weight) for batch in shown]
            pairs: Iterator[tuple[Batch, Batch]] = ((held[i], held[self.order[i]]) for i in range(start, stop))
        else:
            shared = self.data.batches("train", start + self.start, stop + self.start)
            own = self.data.batches_at("train", [self.start + number for number in self.order[start:stop]])
            pairs = zip(shared, own, strict=True)
        for one, other in pairs:
            yield StepBatches(one, dict.fromkeys(self.reordered, other))
