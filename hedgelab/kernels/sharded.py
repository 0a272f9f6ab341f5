"""Kernels for SAEs whose latents are split over processes: encoder by columns, decoder by rows (DTensors).

Every process sees all rows of its batch and runs the ordinary kernels on its own latents; what must be known of the others'
is exchanged: where a selection over all latents ends, the sum of the parts' reconstructions. Nothing of size
``[batch, d_sae]`` travels. Signatures and results are those of :mod:`hedgelab.kernels.ops`, the weights being DTensors, and
the gradients are those that one process would compute. All processes must call each kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from hedgelab.kernels import ops, sparse
from hedgelab.kernels.agreement import Share
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.errors import LevelErrors, squared_error
from hedgelab.kernels.layout import row_pointers
from hedgelab.kernels.ranks import ALONE, Ranks


@dataclass(frozen=True)
class ShardedCodes(Codes):
    """Codes of this process's latents, numbered from its first; what is asked about latents is answered for all of them.

    Attributes:
        mesh: The processes that share the latents.
    """

    mesh: DeviceMesh | None = None

    @classmethod
    def wrap(cls, codes: Codes, mesh: DeviceMesh) -> ShardedCodes:
        """Codes of one process's latents."""
        return cls(codes.d_sae, codes.values, codes.latents, codes.crow, codes.layout, mesh)

    @property
    def ranks(self) -> Ranks:
        """The processes that share the latents."""
        assert self.mesh is not None
        return Ranks.of(self.mesh.get_group())

    def fired(self) -> Tensor:
        """Whether each latent of any process fires on any example, ``[d_sae]`` bool."""
        return self.ranks.stack(super().fired().to(torch.uint8)).flatten().bool()

    def smallest_positive(self) -> Tensor:
        """The smallest activation above 0 of any process; infinite without one."""
        return self.ranks.min(super().smallest_positive())

    def scale(self, factor: Tensor) -> ShardedCodes:
        """Codes with latent i multiplied by ``factor[i]``, a DTensor ``[d_sae]`` or this process's part of one."""
        assert self.mesh is not None
        return self.wrap(super().scale(_own(factor)), self.mesh)

    def sum_per_latent(self, weight: Tensor | None = None) -> Tensor:
        """Sum of each latent's activations over the batch, a DTensor ``[d_sae]``."""
        assert self.mesh is not None
        return DTensor.from_local(super().sum_per_latent(weight), self.mesh, [Shard(0)], run_check=False)

    def gathered(self) -> Codes:
        """Codes of all latents, the same on every process, without a gradient."""
        ranks = self.ranks
        if not ranks.any(torch.tensor(self.layout is not None, device=self.values.device)):
            return Codes.from_dense(ranks.stack(self.values.detach()).transpose(0, 1).flatten(1))
        _, own, values = self.csr()  # each process chose its layout by how many of its own latents fire
        rows, latents = ranks.cat(self.rows()), ranks.cat(own + ranks.rank * self.d_sae)
        values = ranks.cat(values.detach())
        order = rows.argsort(stable=True)
        crow = row_pointers(rows, self.batch_size)
        return Codes.from_csr(crow, latents[order], values[order], self.d_sae * ranks.size)


def encode_relu(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Codes:
    """As :func:`ops.encode_relu`."""
    part = _Part.of(W_enc, b_enc, b_dec)
    return part.wrap(ops.encode_relu(x, *part.weights, part.share(x)))


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, selection_scale: Tensor | None = None
) -> Codes:
    """As :func:`ops.encode_topk`: the largest of every process's k largest."""
    part = _Part.of(W_enc, b_enc, b_dec)
    scale = None if selection_scale is None else _own(selection_scale)
    codes = ops.encode_topk(x, *part.weights, min(k, part.width), scale, part.share(x))
    return part.wrap(_largest_of_rows(codes, k, scale, part.ranks))


def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    selection_scale: Tensor | None = None,
    weight: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Codes:
    """As :func:`ops.encode_batch_topk`; ``ranks`` are those among whom rows are split, as ever."""
    part = _Part.of(W_enc, b_enc, b_dec)
    scale = None if selection_scale is None else _own(selection_scale)
    share = part.share(x)
    if ranks.size > 1:
        rows = x.shape[0]
        share = share._replace(ranks=Ranks.of(None), rows=rows * ranks.size, first_row=rows * ranks.rank)
    return part.wrap(ops.encode_share_of_batch_topk(x, *part.weights, k, scale, weight, share))


def encode_columns(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, columns: Tensor, k: int) -> Codes:
    """As :func:`ops.encode_columns`; ``columns`` are numbers among all latents."""
    part = _Part.of(W_enc, b_enc, b_dec)
    own = columns[(columns >= part.first) & (columns < part.first + part.width)] - part.first
    if len(own):
        codes = ops.encode_columns(x, *part.weights, own, min(k, len(own)), part.share(x))
    else:
        nothing = part.weights[2][:0]  # of b_dec, so that its gradients are summed here too: the others wait for it
        codes = Codes.from_csr(columns.new_zeros(len(x) + 1), columns[:0], nothing, part.width)
    return part.wrap(_largest_of_rows(codes, k, None, part.ranks))


def encode_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, threshold: Tensor) -> Codes:
    """As :func:`ops.encode_threshold`."""
    part = _Part.of(W_enc, b_enc, b_dec)
    return part.wrap(ops.encode_threshold(x, *part.weights, _own(threshold), part.share(x)))


def encode_jumprelu(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    log_threshold: Tensor,
    bandwidth: float,
    weight: Tensor | None = None,
) -> tuple[Codes, Tensor]:
    """As :func:`ops.encode_jumprelu`; the rates are a DTensor ``[d_sae]``."""
    part = _Part.of(W_enc, b_enc, b_dec)
    codes, rates = ops.encode_jumprelu(x, *part.weights, _own(log_threshold), bandwidth, weight, part.share(x))
    return part.wrap(codes), DTensor.from_local(rates, part.mesh, [Shard(0)], run_check=False)


def decode(codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """As :func:`ops.decode`."""
    own = _own(W_dec)
    partial = ops.decode(_plain(codes), own, own.new_zeros(own.shape[1]))
    return _sum(partial, _mesh(W_dec)) + _own(b_dec)


def level_errors(
    codes: Codes,
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    levels: Sequence[int],
    detach: bool = False,
    weight: Tensor | None = None,
) -> LevelErrors:
    """As :func:`ops.level_errors`; one exchange for all levels.

    Exchanged is what each level adds. The sums are accumulated as one process does, so that a row with a single latent has the
    rounding errors of one process: where such a latent reconstructs as well as it can, they are all of its gradient.
    """
    own, bias, mesh = _own(W_dec), _own(b_dec), _mesh(W_dec)
    ranks = Ranks.of(mesh.get_group())
    first, width = ranks.rank * own.shape[0], own.shape[0]
    own_levels = [min(max(level - first, 0), width) for level in levels]
    part = _plain(codes)
    if part.layout is not None and own_levels[-1] < width:
        part = part.prefix(own_levels[-1])
    if ops.decoder_path(part, own) is sparse:
        return sparse.level_errors(part, x, own, bias, own_levels, detach, weight, ranks)
    added = _sum(_added_by_levels(part, own, own_levels), mesh)
    losses, errors, running = [], [], bias.expand_as(x)
    for level, delta in enumerate(added.unbind()):
        running = (running.detach() if detach and level else running) + delta
        loss, error = squared_error(running, x, weight)
        losses.append(loss)
        errors.append(error)
    return LevelErrors(losses, errors)


def _added_by_levels(codes: Codes, W_dec: Tensor, levels: Sequence[int]) -> Tensor:
    """What the latents of each level alone reconstruct, ``[levels, batch, d_in]``."""
    no_bias = W_dec.new_zeros(W_dec.shape[1])
    if len(levels) == 1:
        return ops.decode(codes, W_dec, no_bias).unsqueeze(0)
    if codes.layout is None:
        bounds = list(pairwise([0, *levels]))
        return torch.stack([codes.values[:, start:stop] @ W_dec[start:stop] for start, stop in bounds])
    split = codes.layout.by_level(levels)
    rows = Codes.from_csr(split.crow, split.latents, codes.values[split.order], codes.d_sae)
    return ops.decode(rows, W_dec, no_bias).view(len(levels), codes.batch_size, W_dec.shape[1])


def total(values: Tensor, latents: slice = slice(None)) -> Tensor:
    """As :func:`ops.total`."""
    own, ranks = _own(values), Ranks.of(_mesh(values).get_group())
    first = ranks.rank * own.shape[0]
    start, stop, _ = latents.indices(own.shape[0] * ranks.size)
    return _sum(own[max(start - first, 0) : max(stop - first, 0)].sum(), _mesh(values))


class _Part(NamedTuple):
    """This process's part of an encoder."""

    weights: tuple[Tensor, Tensor, Tensor]  # W_enc, b_enc, b_dec
    mesh: DeviceMesh
    ranks: Ranks

    @classmethod
    def of(cls, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> _Part:
        mesh = _mesh(W_enc)
        bias: Tensor = SummedGradient.apply(_own(b_dec), mesh.get_group())  # type: ignore[no-untyped-call]
        return cls((_own(W_enc), _own(b_enc), bias), mesh, Ranks.of(mesh.get_group()))

    @property
    def width(self) -> int:
        return self.weights[0].shape[1]

    @property
    def first(self) -> int:
        return self.ranks.rank * self.width

    def share(self, x: Tensor) -> Share:
        """What it makes of a batch: all rows, some latents."""
        return Share(self.ranks, x.shape[0], self.width * self.ranks.size, first_latent=self.first)

    def wrap(self, codes: Codes) -> ShardedCodes:
        return ShardedCodes.wrap(codes, self.mesh)


def _largest_of_rows(codes: Codes, k: int, scale: Tensor | None, ranks: Ranks) -> Codes:
    """Of each row's activations those among the k largest (times ``scale``) of all processes; the first of equals."""
    ranked = (codes if scale is None else codes.scale(scale)).values.detach()
    if codes.layout is not None:
        ranked = ranked.view(codes.batch_size, len(ranked) // max(1, codes.batch_size))  # every row stores as many
    best = ranked.topk(min(k, ranked.shape[1]), dim=1).values
    whole = ranks.stack(torch.nn.functional.pad(best, (0, k - best.shape[1])))  # [processes, batch, k]
    edge = whole.transpose(0, 1).flatten(1).topk(k, dim=1).values[:, -1:]
    ties_below = (whole[: ranks.rank] == edge).sum((0, 2)).unsqueeze(1)
    places = k - (whole > edge).sum((0, 2)).unsqueeze(1) - ties_below
    tied = ranked == edge
    kept = (ranked > edge) | (tied & (tied.cumsum(1) <= places))
    if codes.layout is None:
        return Codes.from_dense(torch.where(kept, codes.values, 0.0))
    stored = kept.flatten().nonzero().squeeze(1)
    crow = row_pointers(codes.layout.rows[stored], codes.batch_size)
    return Codes.from_csr(crow, codes.layout.latents[stored], codes.values[stored], codes.d_sae)


def _mesh(weight: Tensor) -> DeviceMesh:
    assert isinstance(weight, DTensor)
    return weight.device_mesh


def _own(value: Tensor) -> Tensor:
    """This process's part of a DTensor, with its gradient; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def _plain(codes: Codes) -> Codes:
    """The same codes as of an SAE of this process's latents alone."""
    return Codes(codes.d_sae, codes.values, codes.latents, codes.crow, codes.layout)


def _sum(partial: Tensor, mesh: DeviceMesh) -> Tensor:
    whole: Tensor = SummedValue.apply(partial, mesh.get_group())  # type: ignore[no-untyped-call]
    return whole


class SummedValue(Function):
    """Sum of all processes' values; each process computes the same from it, so each has the whole gradient already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: D102
        return Ranks.of(group).sum(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        return grad, None


class SummedGradient(Function):
    """The same value; each process uses it for its own latents, so the gradients are summed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: D102
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        return Ranks.of(ctx.group).sum(grad), None
