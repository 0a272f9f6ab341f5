"""A GPU without one: tensors that say they are on ``cuda:0`` and compute with real numbers on the CPU, never with the CPU's.

To PyTorch they are on ``meta``, the one device besides the CPU that every build can differentiate on. What a GPU would wait for
is counted, ``torch.autocast("cuda")`` narrows products as on a GPU, and Triton's products are those of the CPU. Where work is
queued on several CUDA streams, what uses a tensor of another stream must have waited for it, and have told its memory.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from hedgelab.data.llm.model import ModelFiles
from hedgelab.data.llm.stream import _own_stream
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

copies: list[str] = []
"""Where the host was held up by a copy to the GPU, which was not from pinned memory or not asked to go on by itself."""

streams: set = set()
"""The streams that something was queued on."""


class Stream:
    """A CUDA stream: counts what is queued on it, and knows how far each other one was when it has waited for it."""

    def __init__(self, *_):
        self.queued, self.knows = 0, {}

    def record_event(self):
        return SimpleNamespace(stream=self, at=self.queued, synchronize=lambda at=self.queued: _host_knows(self, at))

    def wait_event(self, event):
        self.knows[event.stream] = max(event.at, self.knows.get(event.stream, 0))

    def synchronize(self):
        _host_knows(self, self.queued)


_here = threading.local()
_host: dict[Stream, int] = {}  # how far streams were when a thread has waited for them
_pinned: set[int] = set()
_recorded: set[tuple[int, Stream]] = set()
_default = Stream()


def _host_knows(stream, at):
    _host[stream] = max(at, _host.get(stream, 0))


def _current(*_):
    return getattr(_here, "stream", _default)


@contextlib.contextmanager
def _on_stream(stream):
    before, _here.stream = _current(), stream
    try:
        yield
    finally:
        _here.stream = before


def _check_stream(tensors):
    """That the numbers of these tensors are there for the stream at hand, and that their memory waits for it."""
    stream = _current()
    for tensor in tensors:
        if (made := tensor.made)[0] is not stream:
            known = max(stream.knows.get(made[0], 0), _host.get(made[0], 0))
            assert made[1] <= known, "a tensor of another CUDA stream is used before it is there"
            kept = (_place(tensor.inner), stream) in _recorded
            assert kept or not tensor.numel(), (
                "the memory of another CUDA stream's tensor may be reused before this one has read it"
            )
    stream.queued += 1
    streams.add(stream)


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
        made.inner, made.made = inner, (_current(), _current().queued)
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def record_stream(self, stream):
        _recorded.add((_place(self.inner), stream))

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
        if func is torch.Tensor.is_pinned:
            return _place(args[0]) in _pinned
        if func is torch.Tensor.pin_memory or (func is torch.empty and kwargs.pop("pin_memory", False)):
            made = args[0] if func is torch.Tensor.pin_memory else func(*args, **kwargs)
            _pinned.add(_place(made))
            return made
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


def _place(tensor):
    return tensor.untyped_storage().data_ptr()


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
        "is_available": lambda: True, "current_device": lambda: 0, "device_count": lambda: 1, "synchronize": _whole_device,
        "is_bf16_supported": lambda *_: True, "_lazy_init": lambda: None, "get_device_name": lambda *_: "a GPU without one",
        "set_device": lambda *_: None, "get_device_capability": lambda *_: (7, 0), "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (1, 2), "utilization": lambda *_: 0, "current_stream": _current, "Stream": Stream,
        "stream": _on_stream,
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
        for known in (waits, copies, streams, _host, _pinned, _recorded):
            known.clear()
        _own_stream.cache_clear()
        yield


def _whole_device(*_):
    _waited("synchronize")


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
            args, plain = ((layout.crow, layout.latents, *args), lambda crow, latents: Layout(crow, latents, layout.d_sae))
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


def _waited(what, where=waits):
    frames = [frame for frame in traceback.extract_stack() if "/hedgelab/" in frame.filename]
    place = f"{frames[-1].filename.partition('/hedgelab/')[2]}:{frames[-1].name}" if frames else "outside"
    where.append(f"{place} {what}")


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
    _check_stream(second)
    if second and (not stays or _waits(func, args, kwargs)):
        _waited(name)
        _current().synchronize()
    if stays and strangers and _is_copy(name) and not (kwargs.get("non_blocking") or args[2:] == (True,)):
        _waited(name, copies)
    elif stays and strangers and _is_copy(name) and not all(_place(t) in _pinned for t in strangers):
        _waited(f"{name} from memory that is not pinned", copies)
    plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable and second and isinstance(result, torch.Tensor):
        args[0].made = (_current(), _current().queued)
        return args[0]
    return tree_map(_on_second, result) if stays else result


def _waits(func, args, kwargs):
    """Whether the host must know numbers of the device; of an index only where it is a mask."""
    if str(func).startswith("aten.index."):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    told = "repeat_interleave" in str(func) and kwargs.get("output_size") is not None
    return bool(_WAITS & set(func.tags)) and not told


def _is_copy(name):
    return name.startswith(("aten.copy_", "aten._to_copy"))


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
