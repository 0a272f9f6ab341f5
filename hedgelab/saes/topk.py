"""The TopK SAE: the k largest latents of each example."""

from __future__ import annotations

from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes
from hedgelab.saes.base import Activation
from hedgelab.saes.k_sparse import KSparseSAE


class TopKSAE(KSparseSAE):
    """Keep the k largest pre-activations of each example, then ReLU (Gao et al. 2024; SPEC section 2)."""

    def encode(self, x: Tensor) -> Codes:
        """The k largest latents of each example."""
        return ops.encode_topk(x, self.W_enc, self.b_enc, self.b_dec, self.k, self.selection_scale())

    def activate(self, batch: Batch) -> Activation:
        """The same selection as for inference; activity costs nothing."""
        return Activation(self.encode(batch.x))
