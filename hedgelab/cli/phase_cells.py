"""From one config to the toy and the SAEs at every point of a phase diagram."""

from __future__ import annotations

from typing import Any, cast

import torch
from jsonargparse import ArgumentParser, Namespace

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import ToyDataModule
from hedgelab.errors import UserError
from hedgelab.protocols.phase import Axis, Cell
from hedgelab.saes import SAE

Values = tuple[tuple[str, float], ...]
"""Config keys with the values that they take at a point."""


class CellMaker:
    """Makes the points of a diagram; what several points have in common is made once.

    Args:
        config: The parsed config, with ``data``, ``model``, ``seeds`` and ``seed_everything``.
    """

    def __init__(self, config: Namespace) -> None:
        self.config = config
        self._parser = ArgumentParser(exit_on_error=False)
        self._parser.add_subclass_arguments(ActivationDataModule, "data", required=False)
        self._parser.add_subclass_arguments(SAE, "model", required=False, skip={"d_in"})
        self._data: dict[Values, ToyDataModule] = {}
        self._saes: dict[Any, SAE] = {}

    def cells(self, x: Axis, y: Axis) -> list[Cell]:
        """All points, row by row: y rises slowly, x fast."""
        return [self._cell(_assign("x", x, a) + _assign("y", y, b)) for b in y.values() for a in x.values()]

    def _cell(self, values: Values) -> Cell:
        data = self._make_data(_of("data", values))
        members = [self._make_sae(_of("model", values), seed, data) for seed in range(self.config.seeds)]
        return Cell(data, members)

    def _make_data(self, values: Values) -> ToyDataModule:
        if values not in self._data:
            section = _with(self.config.data, values)
            data = self._parser.instantiate(Namespace(data=section)).data  # type: ignore[no-untyped-call]
            if not isinstance(data, ToyDataModule) or data.batch("train", 0).weight is None:
                raise UserError("data: phase diagrams need a ToyDataModule with sampling: population")
            self._data[values] = data
        return self._data[values]

    def _make_sae(self, values: Values, seed: int, data: ToyDataModule) -> SAE:
        """An SAE, initialised; the same for all points that do not differ in it."""
        section = _with(self.config.model, values)
        arguments = section.init_args
        arguments.d_in = data.d_in
        init = (arguments.inner.init_args if "inner" in arguments else arguments).init
        init.seed = self.config.seed_everything + seed
        depends_on_data = id(data) if init.b_dec != "zeros" else None
        key = (values, seed, data.feature_directions.numpy().tobytes(), depends_on_data)
        if key not in self._saes:
            sae = cast(SAE, self._parser.instantiate(Namespace(model=section)).model)  # type: ignore[no-untyped-call]
            first = data.batch("train", 0)
            if first.x.dtype == torch.float64:
                sae = sae.double()
            sae.initialize(first, data.feature_directions)
            self._saes[key] = sae
        return self._saes[key]


def _assign(axis_name: str, axis: Axis, value: float) -> Values:
    keys = [axis.key] if isinstance(axis.key, str) else axis.key
    for key in keys:
        if key.partition(".")[0] not in ("data", "model"):
            raise UserError(f"{axis_name}.key: must start with 'data.' or 'model.', got '{key}'")
    return tuple((key, int(value) if axis.whole else float(value)) for key in keys)


def _of(section: str, values: Values) -> Values:
    """The keys of a section, without its name."""
    return tuple((key.partition(".")[2], value) for key, value in values if key.partition(".")[0] == section)


def _with(section: Namespace, values: Values) -> Namespace:
    """A copy of a section of the config with values put in.

    Raises:
        UserError: There is no such key.
    """
    copied: Namespace = section.clone()
    for path, value in values:
        node: Any = copied
        *parents, last = path.split(".")
        for part in [*parents, last]:
            if not _has(node, part):
                raise UserError(
                    f"axis key '{path}': the config has no '{part}' there; keys are written in full, with init_args"
                )
            if part is not last:
                node = node[int(part)] if isinstance(node, list) else node[part]
        node[int(last) if isinstance(node, list) else last] = value
    return copied


def _has(node: Any, part: str) -> bool:
    if isinstance(node, list):
        return part.isdigit() and int(part) < len(node)
    return isinstance(node, (dict, Namespace)) and part in node
