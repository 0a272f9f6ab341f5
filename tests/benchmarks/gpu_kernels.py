"""The Triton kernels on a GPU: right first, then how fast, against plain PyTorch and the floors of memory and arithmetic.

    python -m tests.benchmarks.gpu_kernels [--json FILE] [--no-sweep] [--d-in 2304 --d-sae 65536 --k 25 --batch 4096]

Checks every kernel against float64, sweeps launch shapes, times each part of a training step, finds the density at which
dense products win, and times whole steps (bf16 autocast, float32 weights, fused Adam) with the best launch shapes found. The
tables come last. Needs PyTorch, Triton and ``hedgelab.kernels`` only.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hedgelab.kernels import reference, sparse
from hedgelab.kernels.codes import Codes, Layout
from hedgelab.kernels.triton import products, selection
from hedgelab.kernels.triton.products import Tile, decode_levels, latent_gradients
from hedgelab.kernels.triton.selection import SelectionTile
from hedgelab.kernels.values import BatchTopK, Decoder, Encoder, Target, TopK

SELECTIONS: dict[str, Any] = {"topk": TopK, "batch_topk": BatchTopK}

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(128, 1), (256, 1), (256, 2), (512, 1), (512, 2), (512, 4), (1024, 2), (1024, 4), (4096, 8)]
BF16 = torch.bfloat16


def timed(work: Callable[[], Any], rep: int = 40) -> float:
    """Median milliseconds; the L2 cache is emptied before each run."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    from triton.testing import do_bench

    return float(do_bench(work, warmup=10, rep=rep, return_mode="median"))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def random_layout(batch: int, d_sae: int, k: int, zipf: bool = False) -> Layout:
    """Latents drawn evenly, or with rates that fall like 1 / rank; a latent may occur twice in a row."""
    if zipf:
        rates = 1 / torch.arange(1, d_sae + 1, device=DEVICE, dtype=torch.float64)
        latents = torch.searchsorted(rates.cumsum(0) / rates.sum(), torch.rand(batch * k, device=DEVICE).double())
        latents = torch.randperm(d_sae, device=DEVICE)[latents.clamp_max(d_sae - 1)]
    else:
        latents = torch.randint(0, d_sae, (batch * k,), device=DEVICE)
    return Layout(torch.arange(batch + 1, device=DEVICE) * k, latents, d_sae)


def check(rows: list[tuple[str, float, float]]) -> None:
    """Compare every kernel with float64 at several shapes; a row is a name, an error and its tolerance."""
    shapes = [(300, 100, 3000, 7), (512, 576, 8192, 32), (256, 2304, 65536, 25)]
    for batch, d_in, d_sae, k in shapes if DEVICE == "cuda" else [(5, 20, 40, 2)]:
        name = f"{batch}x{d_in}x{d_sae} k{k}"
        layout = random_layout(batch, d_sae, k)
        values, weight = torch.randn(batch * k, device=DEVICE), torch.randn(d_sae, d_in, device=DEVICE)
        source = torch.randn(3, batch, d_in, device=DEVICE)
        dense = Codes(values.double(), layout).to_dense()
        levels = [d_sae // 8, d_sae // 2, d_sae]
        exact = torch.stack([dense[:, a:b] @ weight[a:b].double() for a, b in pairwise([0, *levels])])
        rows.append((f"decode {name}", relative(decode_levels(layout, values, weight, levels), exact), 1e-6))
        level = torch.bucketize(layout.latents, torch.tensor(levels, device=DEVICE), right=True)
        for dtype, tolerance in ((torch.float32, 1e-6), (BF16, 1e-6)):
            given = source.to(dtype)
            of_weight, of_bias, of_values = latent_gradients(layout, values, given, levels, torch.float32, weight, bias=True)
            assert of_values is not None
            assert of_bias is not None
            expected = torch.zeros_like(weight, dtype=torch.float64)
            for number in range(3):
                part = torch.where(level == number, values.double(), 0.0)
                expected += Codes(part, layout).to_dense().t() @ given[number].double()
            felt = given[level, layout.rows].double()
            rows.append((f"weight gradient {dtype} {name}", relative(of_weight, expected), tolerance))
            dots = (felt * weight[layout.latents].double()).sum(1)
            rows.append((f"value gradient {dtype} {name}", relative(of_values, dots), tolerance))
            rows.append((f"bias gradient {dtype} {name}", relative(of_bias, dense.sum(0)), tolerance))
        for dtype in (torch.float32, BF16):
            pre = torch.randn(batch, d_sae, device=DEVICE).to(dtype)
            selected = selection.top_k(pre, k)
            assert selected is not None
            best = pre.topk(k, dim=1).values.flatten()
            rows.append((f"top_k {dtype} {name}", float((selected.values != best).sum()), 0))
            spread = pre * torch.rand(batch, 1, device=DEVICE).mul(3).to(dtype)
            chosen = selection.batch_top_k(spread, k * batch).values.sort(descending=True).values
            best = spread.flatten().topk(k * batch).values
            rows.append((f"batch_top_k {dtype} {name}", float((chosen != best).sum()), 0))
    rows.extend(check_step())


def check_step() -> list[tuple[str, float, float]]:
    """Gradients of a whole step against dense float64 autograd."""
    batch, d_in, d_sae, k = (128, 576, 32768, 16) if DEVICE == "cuda" else (5, 20, 40, 2)
    products.DENSITY_16_BIT = products.DENSITY_32_BIT = 1.0
    x = torch.randn(batch, d_in, device=DEVICE)
    leaves = make_weights(d_in, d_sae)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    rows = []
    for kind in ("topk", "batch_topk"):
        found, expected = [], []
        for path, given, collected in ((sparse, leaves, found), (reference, exact, expected)):
            codes = path.encode(x.to(given[0].dtype), Encoder(given[0], given[1], given[3]), SELECTIONS[kind](k))
            target = Target(x.to(given[0].dtype), (d_sae // 4, d_sae))
            losses, _ = path.level_errors(codes, Decoder(given[2], given[3]), target)
            collected.extend(torch.autograd.grad(losses[0] + losses[1], given))
        for name, a, b in zip(("W_enc", "b_enc", "W_dec", "b_dec"), found, expected, strict=True):
            rows.append((f"{kind} step, gradient of {name}", relative(a, b), 1e-5))
    return rows


def make_weights(d_in: int, d_sae: int) -> list[Tensor]:
    """``W_enc`` (transposed in memory), ``b_enc``, ``W_dec``, ``b_dec``, all leaves."""
    W_dec = F.normalize(torch.randn(d_sae, d_in, device=DEVICE), dim=1)
    weights = [W_dec.clone().t(), torch.zeros(d_sae, device=DEVICE), W_dec, torch.zeros(d_in, device=DEVICE)]
    return [weight.requires_grad_() for weight in weights]


def sweep_tiles(options: argparse.Namespace, results: dict[str, float]) -> dict[str, Any]:
    """Time launch shapes; the best of each kernel."""
    layout, values, weight, source = inputs(options)
    best: dict[str, Any] = {}

    def race(name: str, candidates: list[Any], run: Callable[[Any], Any]) -> None:
        times = {}
        for tile in candidates:
            try:
                times[tile] = timed(lambda tile=tile: run(tile), rep=20)
            except Exception as error:
                print(f"  {name} {tile}: {type(error).__name__}: {str(error)[:80]}")
        ranked = sorted(times, key=lambda tile: times[tile])
        for tile in ranked[:4]:
            print(f"  {name:<22} {times[tile]:8.3f} ms  {tile}", flush=True)
        best[name] = ranked[0]
        results[f"sweep {name}"] = times[ranked[0]]

    shapes = SHAPES if DEVICE == "cuda" else [(16, 1)]
    few = (2, 4, 8) if DEVICE == "cuda" else (4,)

    def cut(choices: tuple[int, ...]) -> list[Any]:
        """Tiles of at most 128 numbers a thread."""
        cuts = [Tile(block, entries, warps) for block, warps in shapes for entries in choices]
        return [tile for tile in cuts if tile.block * tile.entries <= 128 * 32 * tile.num_warps]

    race(
        "decode",
        cut((4, 8, 16) if DEVICE == "cuda" else (4,)),
        lambda tile: decode_levels(layout, values, weight, (options.d_sae,), tile=tile),
    )
    race(
        "decoder gradients",
        cut(few),
        lambda tile: latent_gradients(layout, values, source, (options.d_sae,), torch.float32, weight, tile=tile),
    )
    race(
        "encoder gradients",
        cut(few),
        lambda tile: latent_gradients(layout, values, source, (options.d_sae,), torch.float32, bias=True, tile=tile),
    )
    pre = torch.randn(options.batch, options.d_sae, device=DEVICE, dtype=BF16)
    groups = (2048, 4096) if DEVICE == "cuda" else (64,)
    selection_tiles = [SelectionTile(g, warps) for g in groups for warps in (4, 8, 16)]
    race("top_k", selection_tiles, lambda tile: selection.top_k(pre, options.k, None, tile))
    race("batch_top_k", selection_tiles, lambda tile: selection.batch_top_k(pre, options.k * options.batch, None, tile))
    return best


def inputs(options: argparse.Namespace, k: int | None = None) -> tuple[Layout, Tensor, Tensor, Tensor]:
    """A layout, its values, decoder weights and a bf16 gradient of the reconstruction."""
    k = k or options.k
    layout = random_layout(options.batch, options.d_sae, k)
    values = torch.rand(options.batch * k, device=DEVICE)
    weight = F.normalize(torch.randn(options.d_sae, options.d_in, device=DEVICE), dim=1)
    return layout, values, weight, torch.randn(1, options.batch, options.d_in, device=DEVICE, dtype=BF16)


def time_parts(options: argparse.Namespace, bandwidth: float, best: dict[str, Any], results: dict[str, float]) -> None:
    """Each part of a step beside its floor and plain PyTorch."""
    batch, d_in, d_sae, k = options.batch, options.d_in, options.d_sae, options.k
    layout, values, weight, source = inputs(options)
    nnz, size = batch * k, d_sae * d_in
    touched = int(layout.latents.unique().numel()) * d_in
    encoder, x = weight.to(BF16), torch.randn(batch, d_in, device=DEVICE, dtype=BF16)
    bias = torch.zeros(d_sae, device=DEVICE, dtype=BF16)
    decode_tile, dots_tile = best.get("decode", products.DECODE), best.get("decoder gradients", products.GRADIENT)
    bias_tile, select_tile = best.get("encoder gradients", products.GRADIENT), best.get("top_k", selection.SELECTION)

    def part(name: str, work: Callable[[], Any], gigabytes: float = 0.0) -> None:
        results[name] = timed(work)
        floor = f"floor {1e3 * gigabytes / bandwidth:7.3f}" if gigabytes else ""
        print(f"  {name:<48} {results[name]:8.3f} ms  {floor}", flush=True)

    part("encoder weights to bf16", lambda: weight.to(BF16), 6e-9 * size)
    part("encoder product (bf16 addmm)", lambda: torch.addmm(bias, x, encoder.t()))
    pre = torch.addmm(bias, x, encoder.t())
    part("top_k: ours", lambda: selection.top_k(pre, k, None, select_tile), 2e-9 * pre.numel())
    part("top_k: torch.topk", lambda: pre.topk(k, dim=1, sorted=False))
    part("batch_top_k: ours", lambda: selection.batch_top_k(pre, nnz, None, select_tile), 2e-9 * pre.numel())
    part("batch_top_k: torch.topk", lambda: pre.flatten().topk(nnz, sorted=False))
    rows = layout.rows

    def fresh() -> Any:
        return Layout(layout.crow, layout.latents, d_sae).transposed

    def by_int32() -> Any:
        ordered, order = torch.sort(layout.latents.int(), stable=True)
        bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=DEVICE)
        return torch.searchsorted(ordered, bounds), rows[order]

    part("layout grouped by latent: Layout.transposed", fresh)
    part("layout grouped by latent: int32 sort, searchsorted", by_int32)
    one = (d_sae,)
    part("decode: ours", lambda: decode_levels(layout, values, weight, one, tile=decode_tile), 4e-9 * touched)
    part("decode: ours, weights in bf16", lambda: decode_levels(layout, values, encoder, one, tile=decode_tile))
    four = (d_sae // 64, d_sae // 16, d_sae // 4, d_sae)
    part("decode: ours, 4 levels", lambda: decode_levels(layout, values, weight, four, tile=decode_tile))
    bags = layout.latents.view(batch, k)
    part("decode: embedding_bag", lambda: F.embedding_bag(bags, weight, per_sample_weights=values.view(batch, k), mode="sum"))
    codes = Codes(values.to(BF16), layout)
    part("decode: dense bf16 (scatter + product)", lambda: codes.to_dense() @ encoder)
    _ = layout.transposed
    gigabytes = 4e-9 * (size + touched) + 2e-9 * source.numel()

    def decoder_gradients(given: Tensor, levels: tuple[int, ...] = one, lay: Layout = layout) -> Any:
        return latent_gradients(lay, values, given, levels, torch.float32, weight, tile=dots_tile)

    part("decoder gradients: ours (bf16 rows)", lambda: decoder_gradients(source), gigabytes)
    part("decoder gradients: ours (fp32 rows)", lambda: decoder_gradients(source.float()))
    part("decoder gradients: ours, 4 levels", lambda: decoder_gradients(source.expand(4, -1, -1), four))
    skewed = random_layout(batch, d_sae, k, zipf=True)
    _ = skewed.transposed
    hottest = int(skewed.transposed[0].diff().max())
    part(f"decoder gradients: ours, hottest latent {hottest} x", lambda: decoder_gradients(source, one, skewed))

    def plain_gradients() -> Any:
        gathered = source[0].repeat_interleave(k, 0)
        dots = (gathered * weight[layout.latents]).sum(1)
        return torch.zeros_like(weight).index_add_(0, layout.latents, gathered * values[:, None]), dots

    part("decoder gradients: gather + index_add", plain_gradients)
    part(
        "encoder gradients: ours",
        lambda: latent_gradients(layout, values, source, (options.d_sae,), torch.float32, bias=True, tile=bias_tile),
        4e-9 * size + 2e-9 * source.numel(),
    )
    part("one weight gradient: dense bf16 product", lambda: pre.t() @ source[0])
    sums = torch.randn(d_sae, device=DEVICE)
    part("b_dec through the encoder, bf16 weights", lambda: encoder.t() @ sums.to(BF16), 2e-9 * size)
    part("b_dec through the encoder, fp32 weights", lambda: weight.t() @ sums, 4e-9 * size)
    for kind in ("fused", "foreach"):
        parameters = [torch.zeros_like(weight).requires_grad_() for _ in range(2)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(weight)
        adam = torch.optim.Adam(parameters, lr=1e-4, **{kind: True})
        part(f"Adam, {kind}", adam.step, 2 * 28e-9 * size)


def find_density(options: argparse.Namespace, best: dict[str, Any], results: dict[str, float]) -> None:
    """Sparse against dense bf16 for decode and all weight gradients, by k."""
    one = (options.d_sae,)
    for k in (25, 50, 100, 200) if DEVICE == "cuda" else (2,):
        layout, values, weight, source = inputs(options, k)
        encoder = weight.to(BF16)
        _ = layout.transposed

        def sparse() -> None:
            decode_levels(layout, values, weight, one, tile=best.get("decode", products.DECODE))  # noqa: B023
            gradient = best.get("decoder gradients", products.GRADIENT)
            latent_gradients(layout, values, source, one, torch.float32, weight, tile=gradient)  # noqa: B023
            latent_gradients(layout, values, source, one, torch.float32, bias=True, tile=gradient)  # noqa: B023

        def dense() -> None:
            codes = Codes(values.to(BF16), layout).to_dense()  # noqa: B023
            weight.to(BF16)  # noqa: B023
            codes @ encoder  # noqa: B023
            (codes.t() @ source[0]).float()  # noqa: B023
            (source[0] @ encoder.t()).flatten()[layout.rows * options.d_sae + layout.latents]  # noqa: B023
            (codes.t() @ source[0]).float()  # noqa: B023

        a, b = timed(sparse, 20), timed(dense, 20)
        results[f"density {k / options.d_sae:.1e} sparse"], results[f"density {k / options.d_sae:.1e} dense"] = a, b
        print(f"  k {k:<4} density 1/{options.d_sae // k:<6} sparse {a:7.2f} ms   dense {b:7.2f} ms", flush=True)


def time_decoder_losses(options: argparse.Namespace, results: dict[str, float]) -> None:
    """Decoder and loss, forward and backward, as flex-sae's README times them: k 32, 64 and 128, one level and several."""
    one, d_sae = [options.d_sae], options.d_sae
    for k in (32, 64, 128) if DEVICE == "cuda" else (2,):
        layout, values, weight, _ = inputs(options, k)
        values, weight = values.requires_grad_(), weight.requires_grad_()
        bias, x = (
            torch.zeros(options.d_in, device=DEVICE, requires_grad=True),
            torch.randn(options.batch, options.d_in, device=DEVICE),
        )
        for name, levels in (("TopK", one), ("hierarchical", [d_sae // 64, d_sae // 16, d_sae // 4, d_sae])):

            def loss() -> None:
                losses, _ = sparse.level_errors(Codes(values, layout), Decoder(weight, bias), Target(x, levels))  # noqa: B023
                torch.autograd.grad(torch.stack(list(losses)).sum(), [values, weight, bias])  # noqa: B023

            results[f"decoder loss {name} k {k}"] = ms = timed(loss)
            print(f"  decoder and loss, forward and backward, {name:<13} k {k:<4} {ms:8.2f} ms", flush=True)


def make_step(options: argparse.Namespace, path: Any, kind: str, levels: list[int]) -> Callable[[], None]:
    """A whole training step on fresh weights, over four batches in turn."""
    data = [torch.randn(options.batch, options.d_in, device=DEVICE, dtype=BF16) for _ in range(4)]
    weights = make_weights(options.d_in, options.d_sae)
    adam = torch.optim.Adam(weights, lr=1e-4, fused=True)
    W_enc, b_enc, W_dec, b_dec = weights
    selection = SELECTIONS[kind](options.k)

    def step() -> None:
        data.append(data.pop(0))
        x = data[0]
        with torch.autocast(DEVICE, BF16, cache_enabled=False):
            codes = path.encode(x, Encoder(W_enc, b_enc, b_dec), selection)
            losses, _ = path.level_errors(codes, Decoder(W_dec, b_dec), Target(x, levels))
        adam.zero_grad()
        torch.stack(list(losses)).sum().backward()
        adam.step()

    return step


def time_steps(options: argparse.Namespace, results: dict[str, float]) -> None:
    """Whole training steps, ours and dense autograd under autocast."""
    d_sae = options.d_sae
    four = [d_sae // 64, d_sae // 16, d_sae // 4, d_sae]
    for name, path, kind, levels in (
        ("TopK, ours", sparse, "topk", [d_sae]),
        ("BatchTopK, ours", sparse, "batch_topk", [d_sae]),
        ("matryoshka BatchTopK, 4 levels, ours", sparse, "batch_topk", four),
        ("TopK, dense autograd", reference, "topk", [d_sae]),
    ):
        step = make_step(options, path, kind, levels)
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = timed(step, 300)
        peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0
        results[f"step {name}"], results[f"peak {name}"] = ms, peak
        rate = options.batch / ms * 1e3
        print(f"  {name:<40} {ms:8.2f} ms  {rate:12,.0f} tokens/s  peak {peak:5.1f} GB", flush=True)
        if name == "TopK, ours" and DEVICE == "cuda":
            print_profile(step)


def print_profile(step: Callable[[], None], steps: int = 5) -> None:
    """The kernels that take the most time of a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events[:16]:
        ms = event.self_device_time_total / 1e3 / steps
        print(f"      {ms:7.3f} ms  {event.count / steps:4.1f} x  {event.key[:90]}")


def patch_interpreter() -> None:
    """Triton 3.6 interprets scalars as arrays of one element, which NumPy 2.4 no longer takes for integers."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = with_index


def main() -> None:
    if DEVICE == "cpu":
        patch_interpreter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-sweep", action="store_true", help="time the launch shapes that are built in")
    for name, default in (("d-in", 2304), ("d-sae", 65536), ("k", 25), ("batch", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)
    results: dict[str, float] = {}
    checks: list[tuple[str, float, float]] = []
    check(checks)
    products.DENSITY_16_BIT, products.DENSITY_32_BIT = 1 / 600, 1 / 50
    if DEVICE == "cpu":
        products.DENSITY_16_BIT = 1.0
    print(f"checks, {time.perf_counter() - start:.0f} s")
    for name, error, tolerance in checks:
        print(f"  {'ok  ' if error <= tolerance else 'FAIL'} {error:.1e} (<= {tolerance:.0e})  {name}", flush=True)
    results["failed checks"] = sum(not error <= tolerance for _, error, tolerance in checks)
    block = torch.randn(1 << (28 if DEVICE == "cuda" else 12), device=DEVICE)
    bandwidth = 8e-9 * block.numel() / (timed(block.clone) / 1e3)
    del block
    print(f"copy bandwidth {bandwidth:.0f} GB/s; launch shapes, best first, {time.perf_counter() - start:.0f} s")
    best = {} if options.no_sweep else sweep_tiles(options, results)
    print(f"parts of a step, {time.perf_counter() - start:.0f} s")
    time_parts(options, bandwidth, best, results)
    print(f"decoder losses at flex-sae's shape, {time.perf_counter() - start:.0f} s")
    time_decoder_losses(options, results)
    print(f"sparse against dense, {time.perf_counter() - start:.0f} s")
    find_density(options, best, results)
    if best:
        products.decode_levels = functools.partial(decode_levels, tile=best["decode"])
        products.latent_gradients = functools.partial(latent_gradients, tile=best["decoder gradients"])
    print(f"steps, {time.perf_counter() - start:.0f} s")
    time_steps(options, results)
    print(f"failed checks: {results['failed checks']:.0f}; best: {best}; {time.perf_counter() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({**results, "best": {key: str(tile) for key, tile in best.items()}}, indent=1))


if __name__ == "__main__":
    main()
