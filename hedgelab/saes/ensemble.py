"""Many SAEs trained at once: their weights stacked, their common code mapped over members by ``torch.func``."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import pad

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes
from hedgelab.saes.base import SAE, FoldedWeights, fold
from hedgelab.saes.jumprelu import JumpReLUSAE
from hedgelab.saes.losses import LossTerms
from hedgelab.saes.matryoshka import MatryoshkaSAE
from hedgelab.saes.widen import flat_part
from hedgelab.training.optimizers import lr_factors, make_optimizer


class EnsembleSAE:
    """Initialised SAEs of one architecture, the members, whose copies train side by side, each as if alone.

    Members may differ in weights (seeds), in the numbers that their class names in ``per_member`` (λ, level weights and thus
    β), in the batches that they see, and flat SAEs in width: narrower ones are padded with latents that never fire. All
    else must agree. Each step runs the members' own ``loss`` once, mapped over the stacked weights, and one (fused) optimiser
    step; optimisers that treat every entry by itself, as Adam does, then leave each member where training alone would.
    Parameters that do not require a gradient stay as they are.
    """

    def __init__(self, members: Sequence[SAE]) -> None:
        if not members:
            raise UserError("ensemble: needs at least one member")
        self.members = list(members)
        for member in {id(member): member for member in members}.values():
            if (own := _architecture(member)) != (wanted := _architecture(members[0])):
                free = ", ".join(_per_member_names(members[0]))
                raise UserError(f"ensemble: members must agree in all but {free} and flat SAEs' width, got {wanted} and {own}")
            for name in ("gradient_clip_norm", "normalize_decoder", "auxiliary_coefficient", "mitigations"):
                if getattr(flat_part(member), name, None) or (name == "mitigations" and getattr(member, name, None)):
                    raise UserError(f"model.{name}: cannot be used in an ensemble, switch it off")
        widest = max(members, key=lambda member: member.d_sae)
        self._template = _Template(copy.deepcopy(widest))
        self._call = partial(functional_call, self._template)
        numbers = {name: [attrgetter(name)(member) for member in members] for name in _per_member_names(widest)}
        self._numbers = {
            name: torch.tensor(values, dtype=widest.W_dec.dtype)
            for name, values in numbers.items()
            if any(value != values[0] for value in values)
        }
        states, self._tensors = [_named_tensors(member) for member in members], dict[str, Tensor]()
        for name, like in _named_tensors(widest).items():
            fill = -1.0 if name.endswith("b_enc") else 0.0  # padding never fires, and feels no gradient
            stacked = torch.stack([_grow(state[name].detach(), like.shape, fill) for state in states])
            self._tensors[f"sae.{name}"] = stacked.requires_grad_(all(state[name].requires_grad for state in states))
        self._counts = any(True for _ in widest.buffers()) or isinstance(flat_part(widest), JumpReLUSAE)
        self.steps_done = 0

    def losses(self, batch: Batch) -> Tensor:
        """Loss of each member, ``[members]``, on a batch that all share or that has a leading dimension of members."""
        return self._run(batch)[0]

    @torch.no_grad()
    def activations(self, batch: Batch) -> Tensor:
        """Activations of each member as training sees them, ``[members, batch, d_sae]``."""
        return self._run(batch)[1]

    def fit(self, batches: Batch | Callable[[int], Batch], steps: int, report: Callable[[int], None] | None = None) -> None:
        """Take optimiser steps with the first member's optimiser and schedule, and ``report`` how many after each.

        ``batches``: that of every step, or a function of the step's number; shared, or one a member (:func:`stack_batches`).
        """
        first, trained = self.members[0], [tensor for tensor in self._tensors.values() if tensor.requires_grad]
        factors = [(self._tensors[f"sae.{name}"], factor) for name, factor in lr_factors(first).items()]
        optimizer = make_optimizer(first.optimizer, trained, factors=factors)
        schedule = None if first.lr_scheduler is None else first.lr_scheduler(optimizer)
        for _ in range(steps):
            losses, values = self._run(batches(self.steps_done) if callable(batches) else batches)
            optimizer.zero_grad()
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if self._counts:
                with torch.no_grad():
                    vmap(self._call, (0, (None, None, None, 0)))(self._tensors, ({}, None, None, values))
            self.steps_done += 1
            if report is not None:
                report(self.steps_done)

    def folded(self) -> FoldedWeights:
        """Detached stacked weights with decoder norms folded in, each ``[members, ...]``; padding has decoder rows of zero."""
        weights = {name.rpartition(".")[2]: value.detach() for name, value in self._tensors.items()}
        encoder = weights["W_enc_rows"].mT
        folded: tuple[Tensor, ...] = vmap(fold)(encoder, weights["b_enc"], weights["W_dec"], weights["b_dec"])
        return FoldedWeights(*folded)

    @torch.no_grad()
    def member(self, index: int) -> SAE:
        """An SAE of its own with the weights that member ``index`` has now."""
        sae = copy.deepcopy(self.members[index])
        for name, value in _named_tensors(sae).items():
            value.copy_(self._tensors[f"sae.{name}"][index][tuple(map(slice, value.shape))])
        sae.steps_done += self.steps_done
        return sae

    def _run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses ``[members]`` and activations ``[members, batch, d_sae]``."""
        self._template.sae.steps_done = self.members[0].steps_done + self.steps_done
        of_x = 0 if batch.x.ndim > 2 else None
        of_weight = 0 if batch.weight is not None and batch.weight.ndim > 1 else None
        mapped = vmap(self._call, (0, (0, of_x, of_weight)))
        with ops.backend("dense"):
            result: tuple[Tensor, Tensor] = mapped(self._tensors, (self._numbers, batch.x, batch.weight))
        return result


class _Template(nn.Module):
    """The code that all members share, as ``functional_call`` wants it: one ``forward`` for both things a step does."""

    def __init__(self, sae: SAE) -> None:
        super().__init__()
        self.sae = sae

    def forward(
        self, numbers: dict[str, Tensor], x: Tensor, weight: Tensor | None, activations: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and activations of a batch; or, given activations, what follows the optimiser's step."""
        if activations is not None:
            self.sae.after_step(LossTerms({}, Codes.from_dense(activations), activations))
            return activations, activations
        for name, value in numbers.items():
            owner, _, attribute = f"sae.{name}".rpartition(".")
            setattr(attrgetter(owner)(self), attribute, value)
        result = self.sae.loss(Batch(x, None, weight))
        return result.total, result.codes.values.detach()


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """One batch with a leading dimension of members; populations of different size are padded with states of weight 0."""
    size = max(batch.x.shape[0] for batch in batches)
    weights = [_grow(batch.weight, (size,)) for batch in batches if batch.weight is not None]
    if len(weights) < len(batches) and (weights or any(batch.x.shape[0] != size for batch in batches)):
        raise UserError("ensemble: batches without weights must be of the same size")
    x = torch.stack([_grow(batch.x, (size, batch.x.shape[1])) for batch in batches])
    return Batch(x, None, torch.stack(weights) if weights else None)


def _architecture(sae: SAE) -> dict[str, Any]:
    """What members must agree in."""
    config = sae.config()
    if isinstance(sae, MatryoshkaSAE):
        config["inner"] = _architecture(sae.inner)
    return {name: value for name, value in config.items() if name not in (*type(sae).per_member, "beta", "d_sae")}


def _per_member_names(sae: SAE) -> list[str]:
    """Dotted names of the attributes in which members may differ."""
    inner = [f"inner.{name}" for name in _per_member_names(sae.inner)] if isinstance(sae, MatryoshkaSAE) else []
    return [*type(sae).per_member, *inner]


def _named_tensors(sae: SAE) -> dict[str, Tensor]:
    return dict([*sae.named_parameters(), *sae.named_buffers()])


def _grow(tensor: Tensor, shape: Sequence[int], fill: float = 0.0) -> Tensor:
    """The tensor, filled up at the end of each dimension."""
    missing = [wanted - there for wanted, there in zip(shape, tensor.shape, strict=True)]
    return pad(tensor, [end for more in reversed(missing) for end in (0, more)], value=fill)
