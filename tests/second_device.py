"""A second device without a GPU: its tensors compute with real numbers on the CPU, but refuse to meet the CPU's own.

The device is called ``meta``, which every build of PyTorch knows.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_MAY_MIX = ("aten.index.Tensor", "aten.index_put", "aten.copy_", "aten._to_copy", "aten.to", "aten._index_put_impl_")


class SecondDeviceTensor(torch.Tensor):
    """A tensor of the second device; ``inner`` has its numbers."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self):
        return f"SecondDeviceTensor({self.inner})"


class SecondDevice(TorchDispatchMode):
    """While active, what is made on or moved to that device has numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    second = [tensor for tensor in tensors if isinstance(tensor, SecondDeviceTensor)]
    strangers = [tensor for tensor in tensors if not isinstance(tensor, SecondDeviceTensor) and tensor.ndim > 0]
    if second and strangers and not str(func).startswith(_MAY_MIX):
        raise RuntimeError(f"{func}: expected all tensors on one device, found {DEVICE} and cpu")
    values = tree_flatten((args, kwargs))[0]
    target = next((value for value in values if isinstance(value, torch.device)), None)
    stays = bool(second) if target is None else target == DEVICE
    if str(func).startswith("aten.copy_"):
        stays = isinstance(args[0], SecondDeviceTensor)
    plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable and second and isinstance(result, torch.Tensor):
        return args[0]
    return tree_map(_on_second, result) if stays else result


def _on_second(value):
    return SecondDeviceTensor(value) if isinstance(value, torch.Tensor) else value


def _plain(value):
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.inner if isinstance(value, SecondDeviceTensor) else value
