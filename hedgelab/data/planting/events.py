"""Events that planted features may be tied to: a latent of another SAE, a class of tokens, or parents planted as well."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.data.toy.firing import check_probability
from hedgelab.errors import UserError, positive
from hedgelab.saes import SAE, load_sae

Tokens = Callable[[], Sequence[str]]


class Events(ABC):
    """``n`` things that happen, or not, at an example; those with directions are features: parents of what is tied to them."""

    n: int
    planted = False
    """Whether their activations are added to the data, in units of its median norm, instead of being read off it."""

    @abstractmethod
    def activations(self, x: Tensor, tokens: Tokens, draws: Tensor) -> Tensor:
        """How strongly each event is on, 0 where it is not, ``[batch, n]``, at activations ``x [batch, d_in]``.

        ``tokens()`` are those that these are of, ``draws [batch, n]`` uniform random numbers, for what is drawn.
        """

    def directions(self, d_in: int) -> Tensor | None:
        """Unit directions of the events, ``[n, d_in]``; None where they have none, or are to be given some (planted)."""
        return None


class LatentEvents(Events):
    """Firings of latents of an SAE of these activations: natural features, as far as it knows them.

    Args:
        sae: Folder that the SAE was saved to; or the SAE.
        latents: Which latents.
    """

    def __init__(self, sae: str | SAE, latents: list[int]) -> None:
        self._source, self.latents, self.n = sae, latents, len(latents)
        if not latents:
            raise UserError("data.events.latents: needs at least one latent")

    @cached_property
    def sae(self) -> SAE:
        """The SAE, on the CPU."""
        made = (load_sae(self._source) if isinstance(self._source, str) else self._source).cpu().eval()
        if wrong := [latent for latent in self.latents if not 0 <= latent < made.d_sae]:
            raise UserError(f"data.events.latents: must be from 0 to d_sae - 1 = {made.d_sae - 1}, got {wrong[0]}")
        return made

    @torch.no_grad()
    def activations(self, x: Tensor, tokens: Tokens, draws: Tensor) -> Tensor:
        """Activations of the latents, in units of unit decoder rows."""
        if x.shape[1] != self.sae.d_in:
            raise UserError(f"data.events.sae: has d_in = {self.sae.d_in}, the activations have {x.shape[1]}")
        scale = self.sae.W_dec[self.latents].norm(dim=1)
        scaled: Tensor = self.sae.encode(x.cpu()).to_dense()[:, self.latents] * scale
        return scaled

    def directions(self, d_in: int) -> Tensor:
        """Their decoder rows."""
        return normalize(self.sae.W_dec[self.latents].detach().double(), dim=1)


class TokenEvents(Events):
    """Tokens of a class: those whose text matches a pattern.

    Args:
        patterns: A regular expression a class, which its tokens match in full; a leading space is a part of a token.
    """

    def __init__(self, patterns: list[str]) -> None:
        self.n = len(patterns)
        try:
            self._patterns = [re.compile(pattern) for pattern in patterns]
        except re.error as error:
            raise UserError(f"data.events.patterns: {error.pattern!r} is no regular expression ({error})") from error
        if not patterns:
            raise UserError("data.events.patterns: needs at least one pattern")

    def activations(self, x: Tensor, tokens: Tokens, draws: Tensor) -> Tensor:
        """1 where a token is of the class."""
        texts = tokens()
        known = {text: [bool(pattern.fullmatch(text)) for pattern in self._patterns] for text in set(texts)}
        return torch.tensor([known[text] for text in texts]).float()


class PlantedParents(Events):
    """Parents that are planted themselves, each by itself.

    Args:
        rates: Probability that each fires.
        magnitude: Their magnitude, in units of the activations' median norm.
    """

    planted = True

    def __init__(self, rates: list[float], magnitude: float = 0.5) -> None:
        for i, rate in enumerate(rates):
            check_probability(f"data.events.rates[{i}]", rate)
        if not rates:
            raise UserError("data.events.rates: needs at least one parent")
        self.n, self._rates = len(rates), torch.tensor(rates)
        self._magnitude = positive("data.events.magnitude", magnitude)

    def activations(self, x: Tensor, tokens: Tokens, draws: Tensor) -> Tensor:
        """The magnitude where a parent fires."""
        return torch.where(draws < self._rates, self._magnitude, 0.0)
