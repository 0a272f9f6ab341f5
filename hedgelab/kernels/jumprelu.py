"""JumpReLU and its step function, with straight-through gradients (Rajamanoharan et al. 2024, section 3)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def jump(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """``pre · 1[pre > threshold]``; the threshold's gradient is a rectangle-kernel estimate of the given bandwidth."""
    activations: Tensor = _Jump.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return activations


def step(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """``1[pre > threshold]``; no gradient to ``pre``, a rectangle-kernel estimate to the threshold."""
    fired: Tensor = _Step.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return fired


class _Jump(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pre, threshold, ctx.bandwidth = inputs
        ctx.save_for_backward(pre, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = _rectangle(pre, threshold, ctx.bandwidth)
        grad_threshold = -(threshold / ctx.bandwidth) * (near * grad).sum_to_size(threshold.shape)
        return torch.where(pre > threshold, grad, 0.0), grad_threshold, None


class _Step(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pre, threshold, ctx.bandwidth = inputs
        ctx.save_for_backward(pre, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = _rectangle(pre, threshold, ctx.bandwidth)
        return None, -(near * grad).sum_to_size(threshold.shape) / ctx.bandwidth, None


def _rectangle(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 where ``pre`` lies within half a bandwidth of the threshold, else 0."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)
