"""SAEs that keep k latents an example: what they share, and TopK."""

from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.errors import UserError, positive, whole_number
from hedgelab.kernels import ops, reference
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.selection import LARGEST_FIXED_SELECTION
from hedgelab.kernels.values import Decoder, Encoder, Selection, Target, TopK
from hedgelab.saes.dead import DeadCandidates
from hedgelab.saes.flat import FlatSAE
from hedgelab.saes.losses import LossTerms, warmed_up
from hedgelab.training.sharding import is_split


class KSparseSAE(FlatSAE):
    """An SAE that keeps k latents an example (SPEC section 2); dead ones are revived by an auxiliary loss.

    Args:
        d_in: Width of the activations (linked from the data).
        d_sae: Number of latents.
        k: Latents kept an example (BatchTopK: on average).
        norm_aware_selection: Select by pre-activation times decoder norm.
        dead_after_steps: A latent that fired on no example in this many steps is dead.
        auxiliary_coefficient: Weight of the auxiliary loss; 0 switches it off.
        k_start: What k is at the first step of training, to go from there to ``k`` linearly; BatchTopK takes fractions of
            latents, others round. Inference uses ``k``, and a BatchTopK SAE the threshold that training has led to.
        k_steps: Steps over which it does.
        **kwargs: Arguments of :class:`~hedgelab.saes.flat.FlatSAE`.
    """

    signed: ClassVar[bool] = False
    """Whether latents are selected by their size and keep their sign."""

    steps_since_fired: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        norm_aware_selection: bool = False,
        dead_after_steps: int = 1000,
        auxiliary_coefficient: float = 1.0,
        k_start: float | None = None,
        k_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        self.k = whole_number("model.k", k)
        if k > self.d_sae:
            raise UserError(f"model.k: must lie between 1 and d_sae = {d_sae}, got {k}")
        self.norm_aware_selection = norm_aware_selection
        self.dead_after_steps = whole_number("model.dead_after_steps", dead_after_steps)
        self.auxiliary_coefficient = positive("model.auxiliary_coefficient", auxiliary_coefficient, or_zero=True)
        if (k_start is None) != (k_steps is None):
            raise UserError("model.k_start: k goes from there to model.k in model.k_steps steps; give both or neither")
        if k_start is not None and not 1 <= k_start <= self.d_sae:
            raise UserError(f"model.k_start: must lie between 1 and d_sae = {d_sae}, got {k_start}")
        self.k_start = k_start
        self.k_steps = None if k_steps is None else whole_number("model.k_steps", k_steps)
        self.register_buffer("steps_since_fired", torch.zeros(d_sae, dtype=torch.int64))
        self.candidates = DeadCandidates()

    @property
    def dead_latents(self) -> Tensor:
        """Which latents fired on no example in the last ``dead_after_steps`` steps, ``[d_sae]`` bool."""
        return self.steps_since_fired >= self.dead_after_steps

    def current_k(self) -> float:
        """Latents kept an example in this step of training: ``k``, or on the way there from ``k_start``.

        >>> sae = TopKSAE(4, 16, k=2, k_start=10, k_steps=4)
        >>> sae.steps_done = 1
        >>> sae.current_k()
        8.0
        """
        if self.k_start is None or self.k_steps is None:
            return self.k
        return warmed_up(self.k, self.steps_done, self.k_steps, self.k_start)

    def selection(self) -> Selection:
        """The k largest of each example, by size where latents are signed."""
        return TopK(self.k, signed=self.signed)

    def training_selection(self, batch: Batch) -> Selection:
        """The same, k as of now."""
        return TopK(round(self.current_k()), signed=self.signed)

    def training_numbers(self) -> dict[str, float]:
        """With a schedule the current k."""
        scheduled = {} if self.k_start is None else {"current_k": float(self.current_k())}
        return {**super().training_numbers(), **scheduled}

    def selection_scale(self) -> Tensor | None:
        """What pre-activations are multiplied by for the selection, ``[d_sae]``; None for nothing."""
        return self.W_dec.detach().norm(dim=1) if self.norm_aware_selection else None

    def encoder(self) -> Encoder:
        """The encoder's weights, and what ranks latents."""
        return super().encoder()._replace(scale=self.selection_scale())

    def auxiliary_loss(self, batch: Batch, error: Tensor, among: slice | Tensor | None = None) -> Tensor | None:
        """The top ``d_in // 2`` dead latents predict the residual (Gao et al. 2024, appendix A.2; scaled as in SPEC §2).

        ``min(1, n_dead / k_aux) · mean_b ‖e_hat_b - (x_b - x_hat_b)‖²``: they reconstruct ``e_hat``, and the loss moves them
        only, as the residual and ``b_dec`` are detached. ``among`` are a level's latents, a slice or their numbers.
        """
        if not self.auxiliary_coefficient:
            return None
        if self.W_dec.is_cuda and self.ranks.size == 1 and not is_split(self.W_dec):
            return self._auxiliary_loss_without_waiting(batch, error, among)
        dead = self.dead_latents
        latents = torch.arange(self.d_sae, device=dead.device)[slice(None) if among is None else among]
        if not len(columns := latents[dead[latents]]):
            return None
        k_aux = max(1, self.d_in // 2)
        encoder = Encoder(self.W_enc, self.b_enc, self.b_dec.detach())
        codes = ops.encode(batch.x, encoder, TopK(min(k_aux, len(columns)), columns, self.signed))
        decoder = self.decoder()._replace(b_dec=torch.zeros_like(self.b_dec))
        (missed,), _ = ops.level_errors(codes, decoder, Target(-error, (self.d_sae,), weight=batch.weight))
        return self.auxiliary_coefficient * min(1.0, len(columns) / k_aux) * missed

    def _auxiliary_loss_without_waiting(self, batch: Batch, error: Tensor, among: slice | Tensor | None) -> Tensor | None:
        """The same of all latents that may be dead by now, those that are not masked: no shape depends on which ones are."""
        part = among if isinstance(among, slice) else slice(None)
        self.candidates.look(self.steps_done, self.steps_since_fired, self.dead_after_steps)
        latents, valid = self.candidates.part(*part.indices(self.d_sae)[:2])
        if not len(latents):
            return None
        valid = valid & self.dead_latents[latents]
        if isinstance(among, Tensor):
            valid = valid & torch.zeros_like(self.dead_latents).index_fill_(0, among, True)[latents]
        k_aux, way = max(1, self.d_in // 2), TopK(1, None, self.signed)
        pre = reference.pre_activations(batch.x, Encoder(self.W_enc, self.b_enc, self.b_dec.detach()).columns(latents))
        kept = valid.expand_as(pre)
        if len(latents) > k_aux:
            largest = torch.where(valid, way.ranked(pre.detach()), -torch.inf).topk(k_aux, dim=1, sorted=False).indices
            kept = kept & torch.zeros_like(kept).scatter_(1, largest, True)
        codes = Codes.from_dense(torch.where(kept, way.activations(pre), 0.0))
        decoder = Decoder(self.decoder().W_dec.index_select(0, latents), torch.zeros_like(self.b_dec))
        (missed,), _ = ops.level_errors(codes, decoder, Target(-error, (len(latents),), weight=batch.weight))
        return self.auxiliary_coefficient * (valid.sum() / k_aux).clamp(max=1) * missed

    def step_key(self, rows: int) -> tuple[Hashable, ...] | None:
        """The current k, and for how many latents there is room in the auxiliary loss; None for a large selection."""
        if rows * self.d_sae > LARGEST_FIXED_SELECTION or (key := super().step_key(rows)) is None:
            return None
        self.candidates.look(self.steps_done, self.steps_since_fired, self.dead_after_steps)
        return *key, self.current_k(), self.candidates.version

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)
        self.candidates.forget()

    @torch.no_grad()
    def after_step(self, result: LossTerms) -> None:
        """Advance the dead-latent clock: a latent that fired on any rank is alive."""
        super().after_step(result)
        self.steps_since_fired.add_(1).masked_fill_(self.ranks.any(result.codes.fired()), 0)


class TopKSAE(KSparseSAE):
    """Keep the k largest pre-activations of each example, then ReLU (Gao et al. 2024; SPEC section 2)."""
