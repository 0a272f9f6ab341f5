"""The perfect SAE of a toy, as a control: what does a measure say of latents that are the features?"""

import torch
from torch import Tensor

from hedgelab.data.toy import ToyDataModule
from hedgelab.errors import UserError
from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.accumulate import as_codes
from hedgelab.saes import InferenceSAE


class Oracle(InferenceSAE):
    """Latents that are the true features, decoder rows that are their directions; no encoder could be better.

    It looks activations up among the toy's validation batches, as many as it takes: in superposition, or under noise, no
    function of ``x`` alone gives the features. Its reconstruction is ``x`` without the noise.

    >>> from hedgelab.data.toy import IndependentFiring
    >>> toy = ToyDataModule(IndependentFiring([0.5, 0.3, 0.2, 0.1]), d_in=3, target_cosine=0.4, batch_size=8, seed=0)
    >>> batch, oracle = toy.batch("val", 1), Oracle(toy)
    >>> torch.equal(oracle.encode(batch.x).to_dense(), batch.features), torch.allclose(oracle(batch.x), batch.x, atol=1e-5)
    (True, True)

    Args:
        data: The toy.
    """

    def __init__(self, data: ToyDataModule) -> None:
        super().__init__(data.d_in, len(data.feature_directions))
        self.data = data
        self._places: dict[int, tuple[int, int]] = {}  # batch and row of each activation, by its digest
        self._features: list[Codes] = []  # of the batches seen
        self.W_enc.copy_(data.feature_directions.T)
        self.W_dec.copy_(data.feature_directions)
        self.b_dec.copy_(data.bias)

    control = "oracle"

    def encode(self, x: Tensor) -> Codes:
        """The features of validation activations ``x [n, d_in]``."""
        rows = ops.as_rows(x, self.b_dec).detach().float().cpu()
        found = [self._place(hash(row.numpy().tobytes())) for row in rows]
        dense = torch.stack([self._features[number].part(slice(row, row + 1)).to_dense()[0] for number, row in found])
        return Codes.from_dense(dense.to(self.W_dec))

    def _place(self, digest: int) -> tuple[int, int]:
        """Where an activation is among the validation batches."""
        while digest not in self._places:
            number = len(self._features)
            if number > 0 and number >= 4 * max(64, self.data.val_batches):
                raise UserError("oracle: knows the features of validation batches only")
            batch = self.data.batch("val", number)
            assert batch.features is not None
            self._features.append(as_codes(batch.features))
            for row, values in enumerate(batch.x.float().cpu()):
                self._places.setdefault(hash(values.numpy().tobytes()), (number, row))
        return self._places[digest]
