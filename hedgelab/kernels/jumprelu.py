"""JumpReLU and its step function, with straight-through gradients (Rajamanoharan et al. 2024, section 3)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def jump(pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """``pre · 1[pre > threshold]`` and ``1[pre > threshold]``.

    The threshold's gradients are estimates with a rectangle kernel of the given bandwidth; the second has none to ``pre``.
    """
    result: tuple[Tensor, Tensor] = _Jump.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return result


class _Jump(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        fired = pre > threshold
        return torch.where(fired, pre, 0.0), fired.to(pre.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pre, threshold, ctx.bandwidth = inputs
        ctx.save_for_backward(pre, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_fired: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype)
        of_jump = -(threshold / ctx.bandwidth) * (near * grad).sum_to_size(threshold.shape)
        of_step = -(near * grad_fired).sum_to_size(threshold.shape) / ctx.bandwidth
        return torch.where(pre > threshold, grad, 0.0), of_jump + of_step, None
