"""Which latents may be dead in the steps to come, so that the auxiliary loss on a GPU need not wait to learn which are."""

import torch
from torch import Tensor

AHEAD = 100  # steps for which a look is good, or more where no latent can die sooner
LEAST_ROOM = 64


class DeadCandidates:
    """Latents that will have been silent for the dead-latent window within some steps unless they fire.

    A look at the clocks waits for the device, but holds for :data:`AHEAD` steps: only latents that have been silent for that
    much less than the window can die in them. Room for them doubles as they become more, so that shapes seldom change;
    ``version`` changes with the size of any part's room.
    """

    def __init__(self) -> None:
        self.version = 0
        self._parts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.forget()

    def forget(self) -> None:
        """Look again at the next step, whichever it is."""
        self._latest, self._last = 0, -1
        self._latents = torch.empty(0, dtype=torch.long)

    def look(self, step: int, clock: Tensor, window: int) -> None:
        """See that the candidates hold for a step; ``clock [d_sae]`` is how long each latent has been silent before it."""
        if self._latest <= step <= self._last:  # steps that begin again are those of another fit
            self._latest = step
            return
        silent = clock.cpu()
        ahead = max(min(AHEAD, window), window - 1 - int(silent.max()))
        self._latest, self._last, self._device = step, step + ahead, clock.device
        self._latents = (silent >= window - ahead).nonzero().squeeze(1)
        for part in self._parts:
            self._fill(*part)

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Candidates among latents ``start`` … ``stop - 1``, padded, and which places hold one.

        The same two tensors until :attr:`version` changes.
        """
        if (start, stop) not in self._parts:
            self._fill(start, stop)
        return self._parts[start, stop]

    def _fill(self, start: int, stop: int) -> None:
        found = self._latents[(self._latents >= start) & (self._latents < stop)]
        room = LEAST_ROOM
        while room < len(found):
            room *= 2
        room = min(room, stop - start) if len(found) else 0
        before = self._parts.get((start, stop))
        if before is None or len(before[0]) != room or before[0].device != self._device:
            self.version += 1
            made = torch.empty(room, dtype=torch.long, device=self._device)
            self._parts[start, stop] = made, torch.empty_like(made, dtype=torch.bool)
        latents, valid = self._parts[start, stop]
        latents.copy_(torch.cat([found, torch.full((room - len(found),), start)]))
        valid.copy_(torch.arange(room) < len(found))
