"""The TopK SAE: the k largest latents of each example."""

from __future__ import annotations

from hedgelab.kernels.values import TopK
from hedgelab.saes.k_sparse import KSparseSAE


class TopKSAE(KSparseSAE):
    """Keep the k largest pre-activations of each example, then ReLU (Gao et al. 2024; SPEC section 2)."""

    def selection(self) -> TopK:
        """The k largest of each example."""
        return TopK(self.k)
