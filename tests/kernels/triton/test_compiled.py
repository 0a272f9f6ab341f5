"""Every Triton kernel compiles for an H100 at the shapes that users have, without one: registers, memory and offsets are known.

The launches are those of the wrappers themselves, given tensors without numbers, so that a kernel cannot be forgotten, nor an
argument of another type than in use.
"""

import inspect
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is missing")
pytest.importorskip("triton.language", reason="Triton is missing")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hedgelab.kernels.codes import Layout  # noqa: E402
from hedgelab.kernels.triton import products, selection  # noqa: E402

SPILLED = 0  # bytes a thread may spill
REGISTERS = 128  # at most: half of what there is, so that 512 threads are at work on each processor
SHARED = 227 * 1024  # bytes of shared memory of a program on an H100
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64"}
WIDTHS = [576, 768, 2304, 4096]
D_SAE = [4096, 16384, 65536, 2**20]
BATCH = 4096
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


class Launches(dict):
    """The different launches that wrappers make: kernel, types of arguments and constants."""

    def __init__(self):
        super().__init__()
        self.kernels = set()

    def record(self, monkeypatch, module):
        """Stand in for the kernels that a module launches; other functions are called by these."""
        for name in set(re.findall(r"(\w+)\[\(", inspect.getsource(module))) & vars(module).keys():
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), self))
            self.kernels.add(name)


class Recorder:
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        assert 0 < grid[0] < 2**31
        assert all(size < 2**16 for size in grid[1:])

        def launch(*args, **options):
            warps = options.pop("num_warps")
            types, divisible = [], []
            for place, value in enumerate(args):
                if isinstance(value, torch.Tensor):
                    types.append("*" + TYPES[value.dtype])
                else:
                    types.append(1 if value == 1 else "i64" if abs(value) >= 2**31 else "i32")
                if isinstance(value, torch.Tensor) or (value != 1 and value % 16 == 0):
                    divisible.append(place)
            key = (self.kernel.fn.__name__, *types, *divisible, *options.items(), warps)
            self.launches[key] = (self.kernel, types, divisible, options, warps)

        return launch


def compiled(kernel, types, divisible, options, warps):
    names = kernel.arg_names
    known = {names[place]: value for place, value in enumerate(types) if not isinstance(value, str)} | options
    signature = {name: "constexpr" if name in known else types[place] for place, name in enumerate(names)}
    constants = {(names.index(name),): value for name, value in known.items()}
    attributes = {(place,): [["tt.divisibility", 16]] for place in divisible}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def check(launch, folder):
    done = compiled(*launch)
    assert narrow_products(done.asm["ttir"]) == []
    assert done.metadata.shared <= SHARED
    (folder / "kernel.ptx").write_text(done.asm["ptx"])
    command = [PTXAS, "-v", "-arch=sm_90a", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = [int(count) for count in re.findall(r"(\d+) bytes spill", said)]
    assert len(spilled) == 2
    assert max(spilled) <= SPILLED, said
    assert int(re.search(r"Used (\d+) registers", said).group(1)) <= REGISTERS


def narrow_products(ttir):
    """Products of two numbers that are known at run time only, in 32 bits: at 4 096 times 2^20 they overflow."""
    constants = set(re.findall(r"(%\S+) = arith\.constant", ttir))
    products = re.findall(r"arith\.muli (%\S+), (%\S+) : (?:tensor<(?:\d+x)+)?i32", ttir)
    return [(a, b) for a, b in products if not {a, b} & constants]


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_products(width, d_sae, k, dtype, levels):
    layout = Layout(meta(BATCH + 1, dtype=torch.long), meta(BATCH * k, dtype=torch.long), d_sae)
    vars(layout)["transposed"] = tuple(meta(size, dtype=torch.long) for size in (d_sae + 1, BATCH * k, BATCH * k))
    values, weight = meta(BATCH * k), meta(d_sae, width)
    products.decode_levels(layout, values, weight.to(dtype), levels)
    source = meta(len(levels), BATCH, width, dtype=dtype)
    for given in ({"weight": weight}, {"weight": weight, "bias": True}):
        products.latent_gradients(layout, values, source, levels, torch.float32, **given)
        products.latent_gradients(layout, values, source, levels, None, **given)
    if len(levels) == 1:
        products.DENSITY_16_BIT = products.DENSITY_32_BIT = 1.0
        products.latent_gradients(layout, values, source, levels, torch.float32, bias=True)


def launch_selection(d_sae, k, dtype):
    pre, tile = meta(BATCH, d_sae, dtype=dtype), selection.SELECTION
    assert selection.fits(BATCH, d_sae, k)
    for scale in (None, meta(d_sae)):
        for per_row in (True, False):
            maxima, thresholds = selection._maxima(pre, scale, k if per_row else 1, tile, per_row)
            threshold = thresholds if per_row else selection._batch_threshold(maxima, BATCH * k)
            counts, offsets = meta(BATCH, dtype=torch.int32), meta(BATCH, dtype=torch.long)
            selection._launch_candidates(pre, scale, maxima, threshold, counts, tile)
            packed, capacity = meta(BATCH * 1024, dtype=torch.long), 1024 if per_row else d_sae
            selection._launch_candidates(pre, scale, maxima, threshold, counts, tile, offsets, packed, capacity)


@pytest.fixture
def launches(monkeypatch):
    found = Launches()
    for module in (products, selection):
        found.record(monkeypatch, module)
    for name in ("DENSITY_16_BIT", "DENSITY_32_BIT"):
        monkeypatch.setattr(products, name, 1.0)
    return found


def test_at_one_shape(launches, tmp_path):
    """The kernels of a TopK step whose pre-activations are 2^32 numbers, one of them to the end."""
    launch_products(4096, 2**20, 32, torch.bfloat16, [2**20])
    launch_selection(2**20, 32, torch.bfloat16)
    assert {name for name, *_ in launches} == launches.kernels
    assert len(launches.kernels) == 7
    check(next(launch for key, launch in launches.items() if key[0] == "_decode"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(launches, tmp_path, dtype):
    for width in WIDTHS:
        for d_sae in D_SAE:
            for k in (16, 25, 256):
                for levels in ([d_sae], [d_sae // 64, d_sae // 16, d_sae // 4, d_sae]):
                    launch_products(width, d_sae, k, dtype, levels)
    assert len(launches) > 4
    for launch in launches.values():
        check(launch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selections(launches, tmp_path, dtype):
    for d_sae in D_SAE:
        for k in (16, 25, 256):
            launch_selection(d_sae, k, dtype)
    assert len(launches) > 4
    for launch in launches.values():
        check(launch, tmp_path)


def test_a_product_in_32_bits_is_found():
    lines = [
        "%c256 = arith.constant 256 : i32", "%a = arith.muli %row, %width : i32", "%b = arith.muli %tile, %c256 : i32",
        "%c = arith.muli %x, %y : tensor<8x256xi32>", "%d = arith.muli %x, %y : tensor<256xi64>",
    ]  # fmt: skip
    assert narrow_products("\n".join(lines)) == [("%row", "%width"), ("%x", "%y")]
