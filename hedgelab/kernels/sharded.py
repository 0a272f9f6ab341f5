"""Kernels for SAEs whose latents are split over processes: encoder by columns, decoder by rows (DTensors).

Every process sees all rows of its batch and runs the ordinary kernels on its own latents; exchanged is where a selection over
all latents ends, and the sum of the parts' reconstructions. Importing this module plugs it into :mod:`hedgelab.kernels.ops`;
results and gradients are those of one process. All processes must call each kernel.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from hedgelab.errors import UserError
from hedgelab.kernels import ops, reference, sparse
from hedgelab.kernels.codes import Codes, row_pointers
from hedgelab.kernels.ranks import Ranks, Share
from hedgelab.kernels.values import BatchTopK, Decoder, Encoder, Errors, Selection, Target, TopK


@dataclass(frozen=True, kw_only=True)
class ShardedCodes(Codes):
    """Codes of this process's latents, numbered from its first; what is asked about latents is answered for all of them."""

    mesh: DeviceMesh

    @property
    def ranks(self) -> Ranks:
        """The processes that share the latents."""
        return Ranks.of(self.mesh.get_group())

    def fired(self) -> Tensor:
        """Whether each latent of any process fires on any example, ``[d_sae]`` bool."""
        return self.ranks.stack(super().fired().to(torch.uint8)).flatten().bool()

    def active_per_example(self) -> Tensor:
        """L0 of each example over all processes, ``[...]`` int64."""
        return self.ranks.sum(super().active_per_example())

    def smallest_positive(self) -> Tensor:
        """The smallest activation above 0 of any process; infinite without one."""
        return self.ranks.min(super().smallest_positive())

    def scale(self, factor: Tensor) -> Self:
        """Codes with latent i multiplied by ``factor[i]``, a DTensor ``[d_sae]`` or this process's part of one."""
        return super().scale(_own(factor))

    def relabelled(self, place: Tensor) -> Self:
        """Not here: a latent cannot move to another process."""
        raise UserError("trainer.strategy: latents cannot be sorted where they are split over processes, use auto or ddp")

    def sum_per_latent(self, weight: Tensor | None = None) -> Tensor:
        """Sum of each latent's activations over the batch, a DTensor ``[d_sae]``."""
        return _of_all(super().sum_per_latent(weight), self.mesh)

    def gathered(self) -> Codes:
        """Codes of all latents, the same on every process, without a gradient."""
        ranks = self.ranks
        if not ranks.any(torch.tensor(self.layout is not None, device=self.values.device)):
            return Codes(ranks.stack(self.values.detach()).transpose(0, 1).flatten(1), leading=self.leading)
        _, own, values = self.csr()  # each process chose its layout by how many of its own latents fire
        rows, latents = ranks.cat(self.rows()), ranks.cat(own + ranks.rank * self.d_sae)
        order = rows.argsort(stable=True)
        crow, values = row_pointers(rows, self.batch_size), ranks.cat(values.detach())
        whole = Codes.from_csr(crow, latents[order], values[order], self.d_sae * ranks.size)
        return replace(whole, leading=self.leading)


def encode(x: Tensor, encoder: Encoder, selection: Selection) -> Codes:
    """As :func:`ops.encode`, of rows ``[batch, d_in]``; latents ``among`` which TopK selects are numbers among all."""
    assert isinstance(encoder.W_enc, DTensor)
    mesh, ranks = encoder.W_enc.device_mesh, _ranks(encoder.W_enc)
    b_dec: Tensor = _Summed.apply(_own(encoder.b_dec), ranks, False)  # type: ignore[no-untyped-call]
    W_enc, scale = _own(encoder.W_enc), None if encoder.scale is None else _own(encoder.scale)
    width, first = W_enc.shape[1], ranks.rank * W_enc.shape[1]
    share = Share(ranks, len(x), width * ranks.size, first_latent=first)
    if isinstance(selection, BatchTopK) and (rows := selection.ranks).size > 1:
        share = share._replace(ranks=Ranks.of(None), rows=len(x) * rows.size, first_row=len(x) * rows.rank)
    part = Encoder(W_enc, _own(encoder.b_enc), b_dec, scale, share)
    if not isinstance(selection, TopK):
        fields: Any = map(_own, cast(Any, selection))
        codes = ops.encode_part(x, part, type(selection)(*fields))
        rates = None if codes.rates is None else _of_all(codes.rates, mesh)
        return ShardedCodes(codes.values, codes.layout, rates, mesh=mesh)
    k, among, signed = selection
    own = None if among is None else among[(among >= first) & (among < first + width)] - first
    if own is None or len(own):
        codes = ops.encode_part(x, part, TopK(min(k, width if own is None else len(own)), own, signed))
    else:  # the empty values depend on b_dec, so this process takes part when the gradients of b_dec are summed
        codes = Codes.from_csr(own.new_zeros(len(x) + 1), own, b_dec[:0], width)
    codes = _largest_of_rows(codes, selection, scale if among is None else None, ranks)
    return ShardedCodes(codes.values, codes.layout, mesh=mesh)


def decode(codes: Codes, decoder: Decoder) -> Tensor:
    """As :func:`ops.decode`, of rows."""
    own = _own(decoder.W_dec)
    partial = ops.decode(Codes(codes.values, codes.layout), Decoder(own, own.new_zeros(own.shape[1])))
    return _sum(partial, _ranks(decoder.W_dec)) + _own(decoder.b_dec)


def level_errors(codes: Codes, decoder: Decoder, target: Target) -> Errors:
    """As :func:`ops.level_errors`; what each level adds is summed over processes, and accumulated as one process does."""
    own, ranks = Decoder(_own(decoder.W_dec), _own(decoder.b_dec)), _ranks(decoder.W_dec)
    part, width = Codes(codes.values, codes.layout), len(own.W_dec)
    target = target._replace(levels=_own_levels(target.levels, width, ranks))
    if ops.decoder_path(part, own.W_dec) is sparse:
        return sparse.level_errors(part, own, target, ranks)
    return reference.level_errors(part, own, target, lambda added: _sum(added, ranks))


def decoder_gradient(codes: ShardedCodes, upstream: Tensor, levels: Sequence[int]) -> Tensor:
    """As :func:`ops.decoder_gradient`, a DTensor as the gradient of ``W_dec`` is."""
    own = _own_levels(levels, codes.d_sae, codes.ranks)
    return _of_all(ops.decoder_gradient(Codes(codes.values, codes.layout), upstream, own), codes.mesh)


def total(values: Tensor, latents: slice) -> Tensor:
    """As :func:`ops.total`."""
    own, ranks = _own(values), _ranks(values)
    first = ranks.rank * own.shape[0]
    start, stop, _ = latents.indices(own.shape[0] * ranks.size)
    return _sum(own[max(start - first, 0) : max(stop - first, 0)].sum(), ranks)


def _own_levels(levels: Sequence[int], width: int, ranks: Ranks) -> list[int]:
    """Where levels end among this process's latents."""
    return [min(max(level - ranks.rank * width, 0), width) for level in levels]


def _largest_of_rows(codes: Codes, selection: TopK, scale: Tensor | None, ranks: Ranks) -> Codes:
    """Of each row's activations those among the k largest (times ``scale``) of all processes; the first of equals."""
    k = selection.k
    ranked = selection.ranked((codes if scale is None else codes.scale(scale)).values.detach())
    if codes.layout is not None:
        ranked = ranked.view(codes.batch_size, len(ranked) // max(1, codes.batch_size))  # every row stores as many
    best = ranked.topk(min(k, ranked.shape[1]), dim=1).values
    of_all = ranks.stack(torch.nn.functional.pad(best, (0, k - best.shape[1])))  # [processes, batch, k]
    edge = of_all.transpose(0, 1).flatten(1).topk(k, dim=1).values[:, -1:]
    ties_before = (of_all[: ranks.rank] == edge).sum((0, 2)).unsqueeze(1)
    places = k - (of_all > edge).sum((0, 2)).unsqueeze(1) - ties_before
    tied = ranked == edge
    kept = (ranked > edge) | (tied & (tied.cumsum(1) <= places))
    if codes.layout is None:
        return Codes(torch.where(kept, codes.values, 0.0))
    return codes.stored(kept.flatten().nonzero().squeeze(1))


def _of_all(own: Tensor, mesh: DeviceMesh) -> Tensor:
    """Values ``[d_sae]`` of all latents, of which each process has its own."""
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False)


def _own(value: Tensor) -> Tensor:
    """This process's part of a DTensor, with its gradient; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def _ranks(weight: Tensor) -> Ranks:
    """The processes that share the latents of a weight."""
    assert isinstance(weight, DTensor)
    return Ranks.of(weight.device_mesh.get_group())


def _sum(partial: Tensor, ranks: Ranks) -> Tensor:
    """Sum of all processes' values; each process computes the same from it, so each has the full gradient already."""
    summed: Tensor = _Summed.apply(partial, ranks, True)  # type: ignore[no-untyped-call]
    return summed


class _Summed(Function):
    """Sums values over the ranks; or else gradients, of a value that each process uses for its own latents."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks, of_values: bool) -> Tensor:
        ctx.ranks, ctx.of_values = ranks, of_values
        return ranks.sum(value) if of_values else value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad if ctx.of_values else ctx.ranks.sum(grad), None, None


ops.PLUGGED_IN |= dict.fromkeys((DTensor, ShardedCodes), sys.modules[__name__])
