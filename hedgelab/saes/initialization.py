"""How an SAE's weights start."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hedgelab.errors import UserError, positive, whole_number
from hedgelab.saes.losses import geometric_median
from hedgelab.seeding import generator, resolve_seed


@dataclass(frozen=True)
class Initialization:
    """How an SAE's weights start.

    Attributes:
        decoder_norm: Norm of each random decoder row.
        encoder: ``transpose`` copies the decoder's rows; ``random`` draws directions of its own of the same norm.
        b_dec: Decoder bias at ``zeros``, or the ``mean`` or ``geometric_median`` of the first batch.
        at_features: Start at the known features instead: encoder and decoder of latent i at feature i plus noise.
        noise: Standard deviation, per coordinate, of the noise added to the features.
        seed: Seed of the weights; None takes the run's ``seed_everything``.
        weights: Folder of an SAE (a run's ``sae/``, or what ``hedgelab import`` wrote) to go on from; nothing else counts then.
    """

    decoder_norm: float = 1.0
    encoder: Literal["transpose", "random"] = "transpose"
    b_dec: Literal["zeros", "mean", "geometric_median"] = "zeros"
    at_features: bool = False
    noise: float = 0.0
    seed: int | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.seed is not None:  # as a number of Python: streams are named by how a seed prints
            object.__setattr__(self, "seed", whole_number("model.init.seed", self.seed, -(2**63)))
        positive("model.init.decoder_norm", self.decoder_norm)
        positive("model.init.noise", self.noise, or_zero=True)
        if self.weights is not None and self.at_features:
            raise UserError("model.init.weights: are those of a trained SAE; remove model.init.at_features")
        if self.noise and not self.at_features:
            raise UserError("model.init.noise: is added to the true features, so it needs model.init.at_features: true")

    def random_weights(self, d_in: int, d_sae: int) -> tuple[Tensor, Tensor]:
        """Encoder and decoder directions, both as rows ``[d_sae, d_in]``."""
        rng = generator(resolve_seed(self.seed), "weights")
        return self._pair(lambda: random_directions(d_sae, d_in, rng) * self.decoder_norm)

    def feature_weights(self, directions: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
        """Encoder and decoder rows at the first ``d_sae`` true features plus noise, each ``[min(d_sae, n), d_in]``."""
        rng = generator(resolve_seed(self.seed), "feature noise")
        start = directions[:d_sae].cpu()
        return self._pair(lambda: start + self.noise * torch.randn(start.shape, generator=rng))

    def _pair(self, draw: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        decoder = draw()
        return decoder.clone() if self.encoder == "transpose" else draw(), decoder

    def decoder_bias(self, x: Tensor) -> Tensor:
        """Decoder bias ``[d_in]`` from the first batch ``[batch, d_in]``."""
        if self.b_dec == "geometric_median":
            return geometric_median(x)
        return x.mean(0) if self.b_dec == "mean" else torch.zeros_like(x[0])


def random_directions(count: int, d_in: int, rng: torch.Generator) -> Tensor:
    """Random unit rows, ``[count, d_in]``."""
    return torch.nn.functional.normalize(torch.randn(count, d_in, generator=rng), dim=1)
