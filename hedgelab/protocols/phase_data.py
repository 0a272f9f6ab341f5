"""The part of a training stream that belongs to one phase, in order or reordered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule, Stage
from hedgelab.seeding import generator
from hedgelab.training.steps import StepBatches

_WINDOW_BYTES = 2**30


class PhaseData(ActivationDataModule):
    """Batches ``start`` … ``start + steps - 1`` of another DataModule's training stream; its other stages as they are.

    Members named in ``reordered`` see the same batches in another order: a permutation that depends on the data's seed
    alone. For it batches are held in memory; where a phase has more than 1 GiB of them, they are permuted within windows of
    that size.

    Args:
        data: Whose batches.
        start: Batch of its stream that is this phase's first.
        steps: Batches of the phase.
        reordered: Members of a group that see them in another order.
    """

    def __init__(self, data: ActivationDataModule, start: int, steps: int, reordered: Sequence[str] = ()) -> None:
        super().__init__(data.batch_size, data.seed, data.val_batches, data.chunk_steps)
        self.data, self.start, self.steps = data, start, steps
        self.reordered = list(reordered)
        self.window = max(1, _WINDOW_BYTES // (4 * data.batch_size * data.d_in))

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
        return self.data.batch(stage, index + self.start if stage == "train" else index)

    def batches(self, stage: Stage, start: int, stop: int) -> Iterator[Batch]:
        """The phase's batches, as :class:`~hedgelab.training.steps.StepBatches` where some members see them reordered."""
        if stage == "train" and self.reordered:
            yield from self._in_two_orders(start, stop)  # type: ignore[misc]
            return
        offset = self.start if stage == "train" else 0
        yield from self.data.batches(stage, start + offset, stop + offset)

    def order(self, number: int) -> list[int]:
        """Which batch of window ``number`` comes when for reordered members, counted from the window's first."""
        size = min(self.window, self.steps - number * self.window)
        shuffled: list[int] = torch.randperm(size, generator=generator(self.seed, "reorder", number)).tolist()
        return shuffled

    def _in_two_orders(self, start: int, stop: int) -> Iterator[StepBatches]:
        for number in range(start // self.window, -(-stop // self.window)):
            first, order = number * self.window, self.order(number)
            held = self._held(first, first + len(order))
            for index in range(max(start, first), min(stop, first + len(order))):
                other = held[order[index - first]]
                yield StepBatches(held[index - first], dict.fromkeys(self.reordered, other))

    def _held(self, start: int, stop: int) -> list[Batch]:
        """This rank's slices of the phase's batches ``start`` … ``stop - 1``, without what training does not need."""
        batches = self.data.batches("train", start + self.start, stop + self.start)
        shown = tqdm(batches, "Activations", stop - start, delay=2, unit="batch", miniters=1, mininterval=1)
        return [Batch(batch.x, None, batch.weight) for batch in shown]
