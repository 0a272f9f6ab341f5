"""Known features inside activations that one has: ``x' = x + Σ_j z_j m_j f_j`` (planted truth)."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule, Stage, data_rank
from hedgelab.data.llm import LLMDataModule
from hedgelab.data.planting.directions import Directions, RandomDirections
from hedgelab.data.planting.events import Events
from hedgelab.data.source import ActivationSource
from hedgelab.data.toy.firing import Firing, Magnitudes, check_probability
from hedgelab.data.toy.laws import Law, per_feature
from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes
from hedgelab.seeding import generator, resolve_seed

_NULL = 256
_MEASURED_ROWS = 8192  # of the activations, on which their norm and covariance are measured


class PlantedActivations(ActivationDataModule):
    """Activations of another DataModule with features of known firing, magnitude and direction added to them.

    An SAE trained on them has known truth on real activations: which latent tracks a planted feature, and how much of the
    others its decoder row holds. Features are, in this order: the ``events`` that have directions (parents; natural ones are
    as they are in the activations), one *child* tied to each event, and those of ``firing``, by themselves. Batches stay a
    pure function of config, seed and number.

    Args:
        base: The DataModule whose activations these are: batch size, stages and normalisation are its own.
        events: What children are tied to: latents of an SAE, classes of tokens, or parents that are planted too.
        dose: Probability that a child fires where its event is on, one number or one an event.
        elsewhere: Probability that it fires where its event is off, likewise.
        firing: Further features, as in toys; None for no more.
        magnitude_mean: Mean magnitude of a child or further feature in units of the activations' median norm; a number, one a
            feature, or a law.
        magnitude_std: Standard deviation of the magnitude before the ReLU, likewise.
        directions: How directions are chosen.
        seed: Seed of directions and firing; None takes the run's.
    """

    def __init__(
        self,
        base: ActivationDataModule,
        events: Events | None = None,
        dose: float | list[float] = 0.3,
        elsewhere: float | list[float] = 0.0,
        firing: Firing | None = None,
        magnitude_mean: float | list[float] | Law = 0.5,
        magnitude_std: float | list[float] | Law = 0.0,
        directions: Directions | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(base.batch_size, resolve_seed(seed), base.val_batches, base.chunk_steps)
        if events is None and firing is None:
            raise UserError("data.firing: missing: give features to plant, as data.events or data.firing")
        if base.feature_directions is not None:
            raise UserError("data.base: its features are known already; plant in activations whose features are not")
        self.base, self.events, self.firing = base, events, firing
        self.children = 0 if events is None else events.n
        self._planted_parents = self.children if events is not None and events.planted else 0
        self._dose = per_feature("data.dose", dose, self.children, torch.float32, or_zero=True)
        self._elsewhere = per_feature("data.elsewhere", elsewhere, self.children, torch.float32, or_zero=True)
        for key, values in (("dose", self._dose), ("elsewhere", self._elsewhere)):
            for value in values.tolist():
                check_probability(f"data.{key}", value)
        n = self.children + (0 if firing is None else firing.n)
        self._mean = per_feature("data.magnitude_mean", magnitude_mean, n, torch.float32, or_zero=True)
        self._std = per_feature("data.magnitude_std", magnitude_std, n, torch.float32, or_zero=True)
        self._chosen = directions or RandomDirections()

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.base.d_in

    @property
    def feature_directions(self) -> Tensor:
        """Unit directions of events that have some, children, and further features, ``[n, d_in]``."""
        return self._truth[0]

    @cached_property
    def parents(self) -> Tensor:
        """Parent of each feature, int64 ``[n]``, -1 for features without one."""
        known = self.known_events
        children = torch.arange(self.children) if known else torch.full((self.children,), -1)
        further = None if self.firing is None else self.firing.parents
        if further is None:
            further = torch.full((len(self._mean) - self.children,), -1)
        shifted = torch.where(further < 0, further, further + known + self.children)
        return torch.cat([torch.full((known,), -1), children, shifted])

    @cached_property
    def null_directions(self) -> Tensor:
        """Directions drawn like those of planted features, along which nothing is planted, ``[256 or d_in, d_in]``."""
        rng = generator(self.seed, "null directions")
        return self._chosen.choose(min(_NULL, self.d_in), self.rows, rng).float()

    @cached_property
    def known_events(self) -> int:
        """How many of the features are events."""
        has_directions = self.events is not None and self.events.directions(self.d_in) is not None
        return self.children if has_directions else self._planted_parents

    @cached_property
    def rows(self) -> Tensor:
        """The first training activations of the base, whose norm and covariance are measured, on the CPU ``[rows, d_in]``."""
        count = -(-_MEASURED_ROWS // self.batch_size)
        return torch.cat([self.base.batch("train", index).x.cpu() for index in range(count)])

    @cached_property
    def unit(self) -> float:
        """What a magnitude of 1 is: the activations' median norm."""
        return float(self.rows.norm(dim=1).median())

    @cached_property
    def _truth(self) -> tuple[Tensor, Tensor]:
        """Directions of all features ``[n, d_in]``, and of those that are planted, times their unit."""
        rng = generator(self.seed, "planted directions")
        planted = self._chosen.choose(self._planted_parents + len(self._mean), self.rows, rng).float()
        natural = None if self.events is None else self.events.directions(self.d_in)
        known = planted if natural is None else torch.cat([natural.float(), planted])
        return known, planted * self.unit

    def features(self, x: Tensor, stage: Stage, index: int, rows: slice, count: int) -> tuple[Tensor, Tensor]:
        """Activations ``[batch, n]`` of all features at rows of a batch of ``count``; of planted ones in units of ``unit``."""
        rng = generator(self.seed, "planted", stage, index)
        all_on, planted = [], []
        if self.events is not None:
            draws = torch.rand(count, 2 * self.children, generator=rng)[rows]
            on = self.events.activations(x, lambda: self._tokens(stage, index)[rows], draws[:, : self.children])
            fires = draws[:, self.children :] < torch.where(on > 0, self._dose, self._elsewhere)
            if self.events.planted:
                planted.append(on)
                all_on.append(on * self.unit)
            elif self.known_events:
                all_on.append(on)
            noise = torch.randn(count, self.children, generator=rng)[rows]
            mean, std = self._mean[: self.children], self._std[: self.children]
            planted.append(torch.where(fires, (mean + std * noise).relu(), 0.0))
        if self.firing is not None:
            magnitudes = Magnitudes(self._mean[self.children :], self._std[self.children :])
            drawn = self.firing.activations(count, rng, magnitudes)
            planted.append((drawn.to_dense() if isinstance(drawn, Codes) else drawn)[rows])
        own = torch.cat(planted, dim=1)
        return torch.cat([*all_on, own[:, self._planted_parents :] * self.unit], dim=1), own

    def _tokens(self, stage: Stage, index: int) -> list[str]:
        if not isinstance(self.base, LLMDataModule):
            raise UserError("data.events: TokenEvents need activations of a language model (LLMDataModule)")
        return self.base.tokens(stage, index)

    def plant(self, x: Tensor, stage: Stage, index: int, rows: slice, count: int) -> Batch:
        """Some rows of a global batch of ``count`` activations, with what is planted in them."""
        features, own = self.features(x, stage, index, rows, count)
        return Batch(x + (own @ self._truth[1]).to(x.device), features.to(x.device))

    def batch(self, stage: Stage, index: int) -> Batch:
        """Global batch number ``index`` of a stage, ``[batch_size, d_in]``, with the activations of all known features."""
        x = self.base.batch(stage, index).x
        return self.plant(x, stage, index, slice(0, len(x)), len(x))

    def batches_at(self, stage: Stage, numbers: Sequence[int]) -> Iterator[Batch]:
        """This rank's slices of the batches with these numbers, read ahead where the base does."""
        rank, ranks = data_rank(self.trainer)
        for number, batch in zip(numbers, self.base.batches_at(stage, numbers), strict=True):
            size = len(batch.x)
            yield self.plant(batch.x, stage, number, slice(rank * size, (rank + 1) * size), ranks * size)

    def batches_per_block(self, stage: Stage) -> int:
        """How many consecutive batches the base makes together."""
        return self.base.batches_per_block(stage)

    def source(self) -> ActivationSource | None:
        """Where the activations come from; what is planted is not said: the SAE reads natural activations as well."""
        return self.base.source()

    def describe(self) -> dict[str, float]:
        """What the base says, and the unit of magnitudes."""
        return self.base.describe() | {"data/planted_unit": self.unit}

    def throughput(self) -> dict[str, float]:
        """What the base says."""
        return self.base.throughput()

    def prepare_data(self) -> None:
        """The base's."""
        self.base.prepare_data()

    def setup(self, stage: str) -> None:
        """The base's; and what is planted, so that whatever is wrong shows before training starts."""
        self.base.trainer = self.trainer
        self.base.setup(stage)
        _ = self._truth

    def teardown(self, stage: str) -> None:
        """The base's."""
        self.base.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        """The base's."""
        self.base.on_exception(exception)
