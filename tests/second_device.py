"""A GPU without one: tensors that say they are on ``cuda:0`` and compute with real numbers on the CPU, never with the CPU's.

To PyTorch they are on ``meta``, the one device besides the CPU that every build can differentiate on. What a GPU would wait for
is counted, ``torch.autocast("cuda")`` narrows products as on a GPU, and Triton's products are those of the CPU.
"""

from __future__ import annotations

import contextlib
import traceback
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from hedgelab.data.llm.model import ModelFiles
from hedgelab.kernels import products, sparse
from hedgelab.kernels.codes import Layout

DEVICE, _META, _CPU = torch.device("cuda", 0), torch.device("meta"), torch.device("cpu")
_MAY_MIX = ("aten.index.", "aten.index_put", "aten._index_put_impl_", "aten.copy_", "aten._to_copy", "aten.to.")
_WAITS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
_NARROWED = {
    torch.mm, torch.bmm, torch.addmm, torch.mv, torch.einsum, torch.nn.functional.linear, torch.Tensor.mm, torch.Tensor.mv,
    torch.Tensor.bmm, *_MATMUL,
}  # fmt: skip

waits: list[str] = []
"""Where the GPU was waited for: the operator, and the last line of hedgelab that led to it."""


class SecondDeviceTensor(torch.Tensor):
    """A tensor of the second device; ``inner`` has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner):
        strided = {"strides": inner.stride()} if inner.layout is torch.strided else {"layout": inner.layout}
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=_META, requires_grad=inner.requires_grad, **strided
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def tolist(self):
        _waited("tolist")
        return self.inner.tolist()

    def get_device(self):
        return DEVICE.index

    def __deepcopy__(self, memo):
        return SecondDeviceTensor(self.inner.clone()).requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)

    def __repr__(self):
        return f"SecondDeviceTensor({self.inner})"


class SecondDevice(TorchDispatchMode):
    """While active, what is made on or moved to that device has numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Python(TorchFunctionMode):
    """What PyTorch decides before an operator is called: moves to where a tensor is already, and what autocast narrows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, (args[0], DEVICE)
        if func is torch.Tensor.new_tensor and isinstance(args[0], SecondDeviceTensor):
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, "device": DEVICE, **kwargs}
        if func is torch.as_tensor and isinstance(args[0], torch.Tensor):
            func = torch.Tensor.to
        if func is torch.Tensor.to:
            here = _META if isinstance(args[0], SecondDeviceTensor) else DEVICE
            args, kwargs = tree_map(lambda value: here if _is_cuda(value) else value, (args, kwargs))
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return func(*args, **{**kwargs, "device": _CPU}).to(DEVICE)  # PyTorch would make it there, without numbers
        if func in _NARROWED and torch.is_autocast_enabled("cuda"):
            args, kwargs = tree_map(_narrowed, (args, kwargs))
        if func in _MATMUL and args[0].ndim == 1 and args[1].ndim == 2:
            func, args = torch.mv, (args[1].t(), args[0])  # PyTorch would change a wrapper's shape in place
        return func(*args, **kwargs)


def _is_cuda(value):
    return isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"


def _narrowed(value):
    if isinstance(value, SecondDeviceTensor) and value.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return value.to(torch.get_autocast_dtype("cuda"))
    return value


@contextlib.contextmanager
def second_device():
    """A GPU is there, as far as Python can tell; :data:`waits` starts empty."""
    cuda = {
        "is_available": lambda: True, "current_device": lambda: 0, "device_count": lambda: 1, "synchronize": lambda *_: None,
        "is_bf16_supported": lambda *_: True, "_lazy_init": lambda: None, "get_device_name": lambda *_: "a GPU without one",
        "set_device": lambda *_: None, "get_device_capability": lambda *_: (7, 0), "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (1, 2), "utilization": lambda *_: 0,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(sparse, "products_on", return_value=_products()))
        stack.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", _submit))
        for name in ("causal_lm", "skeleton"):  # transformers uses the device meta itself
            stack.enter_context(mock.patch.object(ModelFiles, name, _without_modes(getattr(ModelFiles, name))))
        stack.enter_context(_Python())
        stack.enter_context(SecondDevice())
        waits.clear()
        yield


def _without_modes(plain):
    def run(*args, **kwargs):
        with _disable_current_modes():
            return plain(*args, **kwargs)

    return run


def _submit(pool, work, *args, real=ThreadPoolExecutor.submit, **kwargs):
    """Submit work that finds the device in its thread, too."""

    def run(*given, **named):
        with _Python(), SecondDevice():
            return work(*given, **named)

    return real(pool, run, *args, **kwargs)


class _Generator(torch.Generator):
    """A generator of the CPU that says it is one of whichever device was asked for."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    device = property(lambda self: self.place)  # type: ignore[assignment]


def _on_numbers(function):
    """A function of the CPU's products, of tensors all on one device."""

    def run(layout, *args, **kwargs):
        if isinstance(layout, Layout):
            args, plain = (
                (layout.crow, layout.latents, *args),
                lambda crow, latents: Layout(crow, latents, layout.d_sae),
            )
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        second = [isinstance(tensor, SecondDeviceTensor) for tensor in tensors]
        assert all(second) or not any(second), f"{function.__name__}: expected all tensors on one device"
        args, kwargs = tree_map(_plain, (args, kwargs))
        result = function(plain(*args[:2]), *args[2:], **kwargs)
        return tree_map(_on_second, result) if any(second) else result

    return run


def _products():
    from hedgelab.kernels.triton import (
        products as on_cuda,
    )  # only here, for this module is also read where Triton is not installed

    return SimpleNamespace(
        select=on_cuda.select, decode_levels=_on_numbers(products.decode_levels),
        latent_gradients=_on_numbers(products.latent_gradients), max_share=on_cuda.max_share,
    )  # fmt: skip


def _waited(what):
    frames = [frame for frame in traceback.extract_stack() if "/hedgelab/" in frame.filename]
    where = f"{frames[-1].filename.partition('/hedgelab/')[2]}:{frames[-1].name}" if frames else "outside"
    waits.append(f"{where} {what}")


def _run(func, args, kwargs):
    values = tree_flatten((args, kwargs))[0]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    second = [tensor for tensor in tensors if isinstance(tensor, SecondDeviceTensor)]
    pointwise = torch.Tag.pointwise in func.tags
    strangers = [t for t in tensors if not isinstance(t, SecondDeviceTensor) and (t.ndim > 0 or not pointwise)]
    name = str(func)
    if "_has_compatible_shallow_copy_type" in name:
        return False
    if second and strangers and not _may_mix(name, args):
        raise RuntimeError(f"{func}: expected all tensors on one device, found {DEVICE} and cpu")
    target = next((value for value in values if isinstance(value, torch.device)), None)
    stays = bool(second) if target is None else target.type != "cpu"
    if name.startswith("aten.copy_"):
        stays = isinstance(args[0], SecondDeviceTensor)
    if second and (not stays or _waits(func, args, kwargs)):
        _waited(name)
    plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable and second and isinstance(result, torch.Tensor):
        return args[0]
    return tree_map(_on_second, result) if stays else result


def _waits(func, args, kwargs):
    """Whether the host must know numbers of the device; of an index only where it is a mask."""
    if str(func).startswith("aten.index."):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    told = "repeat_interleave" in str(func) and kwargs.get("output_size") is not None
    return bool(_WAITS & set(func.tags)) and not told


def _may_mix(name, args):
    """Copies between devices, and a GPU's tensor with indices of the CPU; not the other way round."""
    if not name.startswith(_MAY_MIX):
        return False
    return "index" not in name or isinstance(args[0], SecondDeviceTensor)


def _on_second(value):
    with torch.inference_mode(False):  # PyTorch counts the versions of what is a view of other tensors
        return SecondDeviceTensor(value) if isinstance(value, torch.Tensor) else value


def _plain(value):
    if isinstance(value, torch.device):
        return _CPU
    return value.inner if isinstance(value, SecondDeviceTensor) else value
