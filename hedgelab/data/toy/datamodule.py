"""Toy activations: features fire, each along its own direction, and everything about them is known."""

import math
import statistics
import timeit
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule, Stage
from hedgelab.data.toy.dictionary import Dictionary, make_dictionary, orthonormal_features
from hedgelab.data.toy.firing import Firing, Magnitudes
from hedgelab.data.toy.gaussian import GaussianFiring
from hedgelab.data.toy.laws import Law, per_feature
from hedgelab.errors import UserError, whole_number
from hedgelab.kernels.codes import Codes
from hedgelab.seeding import generator, resolve_seed

_BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 32 * 2**20}  # a GPU draws a large block about as fast as a small one
_MAX_BLOCK_BATCHES = 64
_KEPT_BLOCKS = 3  # of training in order and reordered, and of validation
_CHUNK_BYTES = 64 * 2**20
_MAX_CHUNK_STEPS = 100


class ToyDataModule(ActivationDataModule):
    """Activations ``x = sum_i z_i m_i f_i + bias`` with known firing z, magnitudes m and unit directions f, and noise if asked.

    Batches are drawn in blocks, each from a generator of its own, so that one costs microseconds in sequence and can
    still be had in any order. A block's size, and with it the data, depends on the config alone.

    Args:
        firing: Which features fire together.
        d_in: Width of the activations.
        batch_size: Examples a step; the whole support in population mode, whatever this says.
        target_cosine: Cosine between the feature directions; at 0 they are orthonormal where ``n <= d_in``.
        magnitude_mean: Mean magnitude of a firing feature, a number, one a feature, or a law. None: the firing's own
            (a tree), else 1.
        magnitude_std: Standard deviation of the magnitude before the ReLU, likewise. None: the firing's own (a tree), else 0.
        bias: Offset of all activations: its norm (in a random direction), or the vector ``[d_in]`` itself.
        dictionary: How directions are chosen; None: by ``target_cosine``.
        noise: Norm of dense Gaussian noise in units of the norm of the activation that it is added to, as language models' go
            with theirs; the features know nothing of it.
        sampling: ``samples`` draws batches; ``population`` makes each the whole support weighted by probability: exact means.
        dtype: Precision of the activations.
        device: Where batches are drawn. ``cuda`` is for thousands of features (CopulaFiring); its numbers are not the CPU's.
        seed: Seed of dictionary, bias and samples; None takes the run's ``seed_everything``.
        val_batches: Batches of a validation or test pass.
        chunk_steps: Most training steps a chunk; None: as many as fit in 64 MiB, at most 100.
    """

    d_in = 0  # until it is made

    def __init__(
        self,
        firing: Firing,
        d_in: int = 50,
        batch_size: int = 500,
        target_cosine: float = 0.0,
        magnitude_mean: float | list[float] | Law | None = None,
        magnitude_std: float | list[float] | Law | None = None,
        bias: float | list[float] | None = None,
        dictionary: Dictionary | None = None,
        noise: float = 0.0,
        sampling: Literal["samples", "population"] = "samples",
        dtype: Literal["float32", "float64"] = "float32",
        device: Literal["cpu", "cuda"] = "cpu",
        seed: int | None = None,
        val_batches: int = 16,
        chunk_steps: int | None = None,
    ) -> None:
        whole_number("data.d_in", d_in)
        whole_number("data.batch_size", batch_size)
        seed = resolve_seed(seed)
        self._dtype: torch.dtype = getattr(torch, dtype)
        batch_bytes = int(batch_size * (d_in + firing.stored_per_example) * self._dtype.itemsize)
        default_chunk = min(_MAX_CHUNK_STEPS, max(1, _CHUNK_BYTES // batch_bytes))
        super().__init__(batch_size, seed, val_batches, default_chunk if chunk_steps is None else chunk_steps)
        if device == "cuda" and (sampling != "samples" or not isinstance(firing, GaussianFiring)):
            raise UserError("data.device: cuda draws samples of CopulaFiring alone, set it to cpu")
        if noise < 0 or not math.isfinite(noise):
            raise UserError(f"data.noise: must be at least 0 and finite, got {noise}")
        if noise and sampling == "population":
            raise UserError("data.noise: must be 0 with sampling: population, whose support must be finite")
        self.firing, self._device, self._noise = firing, device, noise
        self.block_batches: int = min(_MAX_BLOCK_BATCHES, max(1, _BLOCK_BYTES[device] // batch_bytes))
        own_mean, own_std = firing.magnitudes(), firing.magnitude_spreads()
        if magnitude_mean is None:
            magnitude_mean = 1.0 if own_mean is None else own_mean.tolist()
        if magnitude_std is None:
            magnitude_std = 0.0 if own_std is None else own_std.tolist()
        mean = per_feature("data.magnitude_mean", magnitude_mean, firing.n, self._dtype)
        std = per_feature("data.magnitude_std", magnitude_std, firing.n, self._dtype, or_zero=True)
        self._magnitudes = Magnitudes(mean, std)
        self.d_in, self._dictionary = d_in, dictionary
        if dictionary is None:
            directions = make_dictionary(firing.n, d_in, target_cosine, generator(seed, "dictionary"))
            self.feature_directions = directions.to(self._dtype)
        elif target_cosine:
            raise UserError("data.dictionary: give it or target_cosine, not both")
        self.bias = _make_bias(bias, d_in, seed).to(self._dtype)
        self._population = self._enumerate() if sampling == "population" else None
        self._block = lru_cache(_KEPT_BLOCKS)(self._draw_block)

    @cached_property
    def feature_directions(self) -> Tensor:
        """True unit directions of the features, ``[n, d_in]``; a config's dictionary, slow perhaps, makes them when asked."""
        assert self._dictionary is not None
        rng = generator(self.seed, "dictionary")
        return self._dictionary.directions(self.firing.n, self.d_in, rng).to(self._dtype)

    @property
    def _here(self) -> torch.device:
        """The device on which batches are drawn."""
        if self._device == "cpu":
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise UserError("data.device: there is no CUDA device, set it to cpu")
        return torch.device("cuda", torch.cuda.current_device())

    @cached_property
    def _truth(self) -> tuple[Magnitudes, Tensor, Tensor]:
        """Magnitudes, directions and bias on that device."""
        mean, std = self._magnitudes.mean.to(self._here), self._magnitudes.std.to(self._here)
        return Magnitudes(mean, std), self.feature_directions.to(self._here), self.bias.to(self._here)

    @property
    def parents(self) -> Tensor | None:
        """Parent of each feature, int64 ``[n]``, -1 for features without one; None without a hierarchy."""
        return self.firing.parents

    def batch(self, stage: Stage, index: int) -> Batch:
        """Batch number ``index`` of a stage, or the population; ``features`` are the true magnitudes, sparse above 128."""
        if self._population is not None:
            return self._population
        number, place = divmod(index, self.block_batches)
        return self._block(stage, number)[place]

    def batches_per_block(self, stage: Stage) -> int:
        """How many consecutive batches are drawn together."""
        return self.block_batches

    def describe(self) -> dict[str, float]:
        """Median cost of generating one training batch in sequence, in seconds; the stream stays as it is."""
        if self._population is not None:
            return {"data/seconds_per_batch": 0.0}
        costs = timeit.repeat(partial(self._draw_block, "train", 0), number=1, repeat=5)
        return {"data/seconds_per_batch": statistics.median(costs) / self.block_batches}

    def _draw_block(self, stage: Stage, number: int) -> list[Batch]:
        """The batches of a block, as views of tensors drawn at once."""
        source = generator(self.seed, "toy", stage, number, device=self._here)
        size, count = self.batch_size, self.batch_size * self.block_batches
        features = self.firing.activations(count, source, self._truth[0])
        x = self._embed(features)
        if self._noise:
            drawn = torch.randn(x.shape, generator=source, dtype=x.dtype, device=x.device)
            x = x + drawn * (self._noise / math.sqrt(self.d_in) * x.norm(dim=1, keepdim=True))
        own: Any = features.split(size) if isinstance(features, Codes) else torch.split(features, size)
        return [Batch(*both) for both in zip(torch.split(x, size), own, strict=True)]

    def _embed(self, features: Tensor | Codes) -> Tensor:
        """Activations ``[count, d_in]`` of magnitudes ``[count, n]``."""
        _, directions, bias = self._truth
        if isinstance(features, Codes):
            crow, feature, values = features.csr()
            x = embedding_bag(feature, directions, crow[:-1], mode="sum", per_sample_weights=values)
            return x.add_(bias)
        x = features @ directions
        return x.add_(bias) if bool(bias.any()) else x

    def _enumerate(self) -> Batch:
        """The whole support as one weighted batch."""
        if self._magnitudes.noisy:
            raise UserError("data.magnitude_std: must be 0 with sampling: population, whose support must be finite")
        states, probabilities = self.firing.enumerate()
        features = torch.where(states, self._magnitudes.mean, 0.0)
        return Batch(self._embed(features), features, probabilities.to(self._dtype))


def _make_bias(bias: float | list[float] | None, d_in: int, seed: int) -> Tensor:
    """The offset ``[d_in]`` float64: given, of a given norm in a random direction, or zero."""
    if isinstance(bias, list):
        if len(bias) != d_in or not all(map(math.isfinite, bias)):
            raise UserError(f"data.bias: expected a norm or a list of d_in = {d_in} finite numbers, got {len(bias)}")
        return torch.tensor(bias, dtype=torch.float64)
    norm = 0.0 if bias is None else bias
    if not 0 <= norm < math.inf:
        raise UserError(f"data.bias: a norm must be at least 0 and finite, got {norm}")
    return norm * orthonormal_features(1, d_in, generator(seed, "bias"))[0]
