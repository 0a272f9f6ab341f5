"""Whole training steps at Gemma's shapes beside SAELens and sparsify, one table and one JSON line a measurement.

    python tests/gpu/steps.py --shapes gemma,gemma_16k --peer-python PYTHON --json FILE

The floor is what an exact TopK step must move and multiply on the card: measured bandwidth and measured bf16 rate are put in
for the datasheet's.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

PAIRS = [("topk", "saelens"), ("topk", "sparsify"), ("batch_topk", "saelens"), ("matryoshka", "saelens")]
ROOT = Path(__file__).parents[2]


def ceilings() -> tuple[float, float]:
    """Bytes per second of a copy (read plus written), and bf16 operations per second of a product."""
    if not torch.cuda.is_available():
        return 1e10, 1e11
    from triton.testing import do_bench

    block = torch.randn(1 << 28, device="cuda")
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy = do_bench(block.clone, return_mode="median")
    product = do_bench(lambda: square @ square, return_mode="median")
    return 8 * block.numel() / copy * 1e3, 2 * 8192**3 / product * 1e3


def floor_ms(d_in: int, d_sae: int, k: int, batch: int, bandwidth: float, rate: float) -> float:
    """Encoder product; Adam's 28 bytes a weight; pre-activations written and read; weights in bf16; a row for each entry."""
    size = d_in * d_sae
    moved = 2 * size * 28 + 2 * 2 * batch * d_sae + 2 * size + 4 * batch * k * d_in
    return 1e3 * (2 * batch * size / rate + moved / bandwidth)


def has(python: str, peer: str) -> bool:
    """Whether the environment of a Python has a peer."""
    package = {"saelens": "sae_lens"}.get(peer, peer)
    found = f"import importlib.util as util, sys; sys.exit(util.find_spec('{package}') is None)"
    return subprocess.run([python, "-c", found], check=False).returncode == 0


def profile(shape: str, sae: str) -> None:
    """Where the time of our step goes: milliseconds with and without waiting for each step, busy kernels, host copies."""
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    import ours
    from worker import Task

    from tests.benchmarks.training_step import COEFFICIENTS, SHAPES

    sizes = SHAPES[shape]
    d_sae, device = int(sizes["d_sae"]), "cuda" if torch.cuda.is_available() else "cpu"
    task = Task(
        library="", sae=sae, levels=[d_sae // 64, d_sae // 16, d_sae // 4, d_sae], lr=3e-4, clip_norm=None, threads=2,
        sparsity_coefficient=COEFFICIENTS.get(sae, 0.0), device=device, data="", steps=40, **sizes,
    )  # fmt: skip
    step = ours.build(task)
    data = [torch.randn(task.batch, task.d_in, device=device) for _ in range(4)]

    def steps(count: int, wait: bool) -> float:
        start = time.perf_counter()
        for number in range(count):
            with torch.autocast(device, torch.bfloat16):
                step.take(data[number % 4])
            if wait and device == "cuda":
                torch.cuda.synchronize()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count * 1e3

    steps(5, wait=True)
    count = 20 if device == "cuda" else 2
    print(
        f"{shape} {sae}: {steps(count, wait=True):.2f} ms waiting for each step, {steps(count, wait=False):.2f} ms not waiting"
    )
    with torch.profiler.profile() as record:
        steps(5, wait=False)
    events = record.key_averages()
    # Operators and marked regions carry the times of their kernels once more.
    kernels = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU and "#" not in event.key]
    on_device = sorted(kernels, key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in kernels) / 5e3
    print(f"    kernels busy {busy:.2f} ms a step")
    for event in on_device[:22]:
        print(f"    {event.self_device_time_total / 5e3:7.3f} ms  {event.count / 5:5.1f} x  {event.key[:100]}")
    waits = [event for event in events if any(word in event.key for word in ("Synchronize", "aten::item", "DtoH", "nonzero"))]
    print("    waits: " + "; ".join(f"{event.key[:40]} {event.count / 5:.1f} x" for event in waits), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="gemma,gemma_16k")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pairs", default=",".join(":".join(pair) for pair in PAIRS), help="SAE:peer,...")
    parser.add_argument("--profile", action="store_true", help="only ours, with its kernels")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.benchmarks.training_step import SHAPES

    bandwidth, rate = ceilings()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}, torch {torch.__version__}: copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
    if options.profile:
        for shape in options.shapes.split(","):
            for sae in ("topk", "batch_topk", "matryoshka", "jumprelu"):
                profile(shape, sae)
        return 0
    failures, rows, pairs = 0, [], [pair.split(":") for pair in options.pairs.split(",")]
    for shape in options.shapes.split(","):
        sizes = {key: int(SHAPES[shape][key]) for key in ("d_in", "d_sae", "k", "batch")}
        floor = floor_ms(**sizes, bandwidth=bandwidth, rate=rate)
        for sae, peer in pairs if torch.cuda.is_available() else pairs[:1]:
            command = [sys.executable, "-m", "tests.benchmarks.training_step", "--sae", sae, "--shape", shape, "--json"]
            command += ["--turns", "20"]
            if there := has(options.peer_python, peer):
                command += ["--peer", peer, "--peer-python", options.peer_python]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
            if done.returncode:
                failures += 1
                print(f"{shape} {sae} beside {peer} failed:\n{done.stderr[-1500:]}")
                continue
            row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) | {"floor_ms": floor, "device": name}
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            beside = f"{peer} is not installed"
            if there:
                beside = (
                    f"{peer:<9}{row['peer_step_ms']:8.2f} ms {row['peer_peak_bytes'] / 1e9:6.2f} GB, "
                    f"ratio {row['ratio']:5.2f}; loss {row['loss']:.4g} and {row['peer_loss']:.4g}"
                )
            print(
                f"{shape:<10} {sae:<11} {row['step_ms']:7.2f} ms {row['tokens_per_s']:11,.0f} tokens/s "
                f"{row['peak_bytes'] / 1e9:6.2f} GB  {row['step_ms'] / floor:5.2f} x floor {floor:5.2f} ms | {beside}",
                flush=True,
            )
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
