"""Several layers of one language model from one forward pass, for the members of a group."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule, Stage
from hedgelab.data.llm.datamodule import LLMDataModule
from hedgelab.data.llm.stream import Harvester, Rows, shared_by_ranks
from hedgelab.training.steps import StepBatches

_KEPT_BLOCKS = 4  # of which some layers have not asked for theirs yet


class LayerData(ActivationDataModule):
    """The batches of DataModules that differ in nothing but ``layer``, each for the members (by name) of a group that read it.

    Every member gets what its own DataModule gives when it works alone, to the last bit, and with it outliers, order and
    normalisation of that layer. The model runs up to the last of the layers, once for each block of contexts.
    """

    def __init__(self, members: Mapping[str, LLMDataModule]) -> None:
        layers: dict[int, LLMDataModule] = {}
        for data in members.values():
            layers.setdefault(data.layer, data)
        self.layers = list(layers.values())
        first = self.layers[0]
        super().__init__(first.batch_size, first.seed, first.val_batches, first.chunk_steps)
        self.members = {name: layers[data.layer] for name, data in members.items()}
        self._harvester: Harvester | None = None

    def renamed(self, names: Mapping[str, str]) -> "LayerData":
        """The same data, of members that go by other names."""
        return LayerData({names[name]: data for name, data in self.members.items()})

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.layers[0].d_in

    def of_member(self, name: str) -> LLMDataModule:
        """The member's layer."""
        return self.members[name]

    def prepare_data(self) -> None:
        """The model's and the text's, which all layers have in common."""
        self.layers[0].prepare_data()

    def setup(self, stage: str) -> None:
        """Cut the model behind the last layer, and let all layers have a part of what it gives."""
        for data in self.layers:
            data.trainer = self.trainer
        last = max(self.layers, key=lambda data: data.block or 0)
        tokens = last.contexts.tokens
        if self._harvester is None:
            self._harvester = last.harvester_of([data.hook_path for data in self.layers])
        last.harvester = harvester = self._harvester  # which ends with that layer
        shared = shared_by_ranks(last.timed(lambda numbers, usable: harvester.rows(tokens[numbers], usable)))
        waiting: OrderedDict[bytes, dict[int, Tensor]] = OrderedDict()
        for number, data in enumerate(self.layers):
            data.background = last.background  # one thread makes the blocks of all
            data.rows = self._part(number, shared, waiting)
        for data in self.layers:
            data.setup(stage)

    def _part(self, layer: int, shared: Rows, waiting: OrderedDict[bytes, dict[int, Tensor]]) -> Rows:
        """Rows of one layer; those of the others are kept until they are asked for."""

        def rows(numbers: Tensor, usable: Tensor) -> Tensor:
            key = numbers.numpy().tobytes()
            if layer not in waiting.get(key, {}):
                found = torch.split(shared(numbers, usable), self.d_in, dim=1)
                waiting[key] = {number: part.contiguous() for number, part in enumerate(found)}
                while len(waiting) > _KEPT_BLOCKS:
                    waiting.popitem(last=False)
            mine = waiting[key].pop(layer)
            if not waiting[key]:
                del waiting[key]
            return mine

        return rows

    def batch(self, stage: Stage, index: int) -> Batch:
        """Global batch number ``index`` of the first layer; :meth:`of_member` has the others'."""
        return self.layers[0].batch(stage, index)

    def batches(self, stage: Stage, start: int, stop: int) -> Iterator[Any]:
        """This rank's slices of every layer's batches, as :class:`~hedgelab.training.steps.StepBatches`."""
        places = {name: self.layers.index(data) for name, data in self.members.items()}
        for batches in zip(*(data.batches(stage, start, stop) for data in self.layers), strict=True):
            yield StepBatches(batches[0], {name: batches[place] for name, place in places.items() if place})

    def teardown(self, stage: str) -> None:
        """End the background work, first that of the model, for which the others would wait."""
        for data in sorted(self.layers, key=lambda data: "harvester" not in vars(data)):
            data.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        """End the background work."""
        self.teardown("fit")
