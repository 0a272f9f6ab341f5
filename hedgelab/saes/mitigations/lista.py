"""LISTA: an encoder that looks again at what its latents leave unexplained."""

from typing import Any

import torch
from torch import Tensor

from hedgelab.errors import positive, whole_number
from hedgelab.kernels import ops
from hedgelab.kernels.values import BatchTopK, Selection, Threshold
from hedgelab.saes.losses import LossTerms, followed
from hedgelab.saes.mitigations.base import Mitigation


class LISTA(Mitigation):
    """Encode, decode, and encode again with the error: ``pre ← pre + η (x - x_hat) W_enc``, then select anew.

    A latent whose feature overlaps others is excited by them in a single pass, and corrected by the next: Gregor & LeCun 2010
    (Learning fast approximations of sparse coding); for SAEs in LISTA-Matryoshka (chanind/claude-auto-research-synthsaebench,
    2026). Since pre-activations are affine in x, a pass encodes ``x_(t+1) = x_t + η (x - x_hat(x_t))``, ``x_0 = x``. Gradients
    flow through all passes. The auxiliary loss encodes x itself. A pass costs as much as encoding and decoding.

    BatchTopK's inference has a threshold of its own for each pass: ``thresholds [steps]`` follow the smallest kept activation
    of all passes but the last as the SAE's ``threshold`` does that of the last; NaN before the first step.

    Args:
        eta: Step size η, above 0; small against 1 / (largest eigenvalue of ``W_dec W_enc``), or passes overshoot.
        steps: Passes after the first.

    >>> import torch
    >>> from hedgelab.saes import VanillaSAE
    >>> sae = VanillaSAE(1, 1, l1_coefficient=0.0, mitigations=[LISTA(eta=0.5)])
    >>> sae.W_enc, sae.W_dec.data = torch.ones(1, 1), torch.full((1, 1), 0.5)
    >>> sae.encode(torch.ones(1, 1)).to_dense()  # 1 + .5 (1 - .5)
    tensor([[1.2500]], grad_fn=<ViewBackward0>)
    """

    thresholds: Tensor

    def __init__(self, eta: float = 0.3, steps: int = 1) -> None:
        super().__init__()
        self.eta = positive("model.mitigations.eta", eta)
        self.steps = whole_number("model.mitigations.steps", steps)
        self.register_buffer("thresholds", torch.full((self.steps,), torch.nan))
        self._smallest: list[Tensor] = []  # kept activation of each pass, of the step under way

    def encoded(self, sae: Any, x: Tensor, selection: Selection) -> Tensor:
        """``x`` and η times what each pass leaves of it."""
        encoder, decoder = sae.encoder(), sae.decoder()
        refined, scale = x, encoder.scale
        self._smallest = []
        for threshold in self.thresholds:
            if isinstance(selection, Threshold):  # of a BatchTopK SAE where passes have theirs, else of the SAE alone
                own = threshold if scale is None else threshold / scale.clamp_min(1e-30)
                given = torch.where(threshold.isnan(), selection.threshold, own)
                codes = ops.encode(refined, encoder, Threshold(given))
            else:
                codes = ops.encode(refined, encoder, selection)
            if isinstance(selection, BatchTopK):  # in training
                kept = codes.detach() if scale is None else codes.detach().scale(scale)
                self._smallest.append(kept.smallest_positive())
            refined = refined + self.eta * (x - ops.decode(codes, decoder))
        return refined

    def after_step(self, sae: Any, result: LossTerms) -> None:
        """Move each pass's threshold toward its smallest kept activation."""
        if self._smallest:
            smallest = sae.ranks.min(torch.stack(self._smallest).to(self.thresholds))
            self.thresholds.copy_(followed(self.thresholds, smallest))
            self._smallest = []
