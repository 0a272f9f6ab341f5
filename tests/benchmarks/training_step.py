"""How fast a whole training step is, beside a peer's on the same data and beside its own limit.

``python -m tests.benchmarks.training_step --sae topk --shape small [--peer saelens --peer-python PATH] [--json]``

A step is loss, backward pass, Adam and bookkeeping. Both sides start from the same weights, run in processes of their own, and
take turns (encoder product, ours, peer, …) on the same batches; every ratio is within one turn. ``over_encoder`` is our step
over the bare encoder product ``torch.addmm(b_enc, x, W_enc, out=…)``, the least that an exact step can cost. Peak memory is the
process's (on a GPU: the allocator's) beyond imports and data. ``loss`` is the squared error on one batch after all steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
SAES = ("vanilla", "topk", "batch_topk", "jumprelu", "matryoshka")
SHAPES = {
    "small": {"d_in": 576, "d_sae": 8192, "k": 32, "batch": 2048},
    "narrow": {"d_in": 576, "d_sae": 1024, "k": 32, "batch": 2048},
    "wide": {"d_in": 576, "d_sae": 32768, "k": 32, "batch": 2048},
    "gemma": {"d_in": 2304, "d_sae": 65536, "k": 25, "batch": 4096, "autocast": True},
    "gemma_16k": {"d_in": 2304, "d_sae": 16384, "k": 25, "batch": 4096, "autocast": True},
    "dry": {"d_in": 32, "d_sae": 256, "k": 4, "batch": 64, "autocast": True},
}
COEFFICIENTS = {"vanilla": 1.0, "jumprelu": 0.1}
CLIPS = {"saelens": 1.0, "dictionary_learning": 1.0}  # these always clip gradients; beside them we do, too
WARM_UP = 3


class Worker:
    """A process that takes training steps when told."""

    def __init__(self, python: str, script: str, task: dict[str, Any]) -> None:
        command = [python, str(HERE / script)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._write(task)

    def wait(self) -> None:
        """Return when data are read and the step is built; workers start side by side."""
        self._read()

    def ask(self, command: str, number: int = 0) -> dict[str, Any]:
        """The answer to a command."""
        self._write({"command": command, "number": number})
        return self._read()

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _write(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"worker {self.process.args} ended with code {self.process.wait()}; see its output above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def make_batches(path: Path, d_in: int, batch: int, count: int) -> None:
    """Sparse combinations of ``4 · d_in`` directions plus a little noise, ``[count, batch, d_in]``, of unit mean square."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(4 * d_in, d_in, generator=generator)
    batches = []
    for _ in range(count):
        firing = torch.rand(batch, 4 * d_in, generator=generator)
        magnitudes = torch.where(firing < 0.01, firing * 100 + 0.5, 0.0)
        x = magnitudes @ directions + 0.1 * torch.randn(batch, d_in, generator=generator)
        batches.append(x / x.square().mean().sqrt())
    np.save(path, torch.stack(batches).numpy())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one benchmark."""
    shape = SHAPES[options.shape]
    d_sae, total = int(shape["d_sae"]), WARM_UP + options.turns
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "batches.npy"
        make_batches(data, int(shape["d_in"]), int(shape["batch"]), options.batches)
        task = {
            "library": options.peer or "", "sae": options.sae, "autocast": False, **shape,
            "levels": [d_sae // 64, d_sae // 16, d_sae // 4, d_sae], "lr": 3e-4, "clip_norm": CLIPS.get(options.peer),
            "sparsity_coefficient": COEFFICIENTS.get(options.sae, 0.0), "threads": options.threads,
            "device": "cuda" if options.shape.startswith("gemma") else "cpu", "data": str(data), "steps": total,
        }  # fmt: skip
        encoder = Worker(sys.executable, "worker.py", task)
        ours = Worker(sys.executable, "ours.py", task)
        peer = Worker(options.peer_python, "peers.py", task) if options.peer else None
        for worker in filter(None, (encoder, ours, peer)):
            worker.wait()
    times: dict[str, list[float]] = {"encoder": [], "ours": [], "peer": []}
    for turn in range(total):
        seconds = {"encoder": encoder.ask("step", turn)["seconds"], "ours": ours.ask("step", turn)["seconds"]}
        if peer is not None:
            seconds["peer"] = peer.ask("step", turn)["seconds"]
        if turn >= WARM_UP:
            for name, value in seconds.items():
                times[name].append(value)
    encoder.close()
    result = summarize(times, int(shape["batch"]))
    for side, prefix in ((ours, ""), (peer, "peer_")):
        if side is None:
            continue
        final = side.ask("finish")
        side.close()
        result |= {f"{prefix}{key}": value for key, value in final.items()}
    machine = f"{processor()}, {options.threads} threads, {platform.platform()}"
    return {"sae": options.sae, "shape": options.shape, "peer": options.peer, "machine": machine, **result}


def summarize(times: dict[str, list[float]], batch: int) -> dict[str, Any]:
    """Medians, and medians of the ratios within a turn."""
    result: dict[str, Any] = {
        "tokens_per_s": batch / median(times["ours"]),
        "over_encoder": median(a / b for a, b in zip(times["ours"], times["encoder"], strict=True)),
        "step_ms": 1e3 * median(times["ours"]),
        "encoder_ms": 1e3 * median(times["encoder"]),
    }
    if times["peer"]:
        ratios = [peer / ours for peer, ours in zip(times["peer"], times["ours"], strict=True)]
        result |= {
            "peer_tokens_per_s": batch / median(times["peer"]),
            "peer_step_ms": 1e3 * median(times["peer"]),
            "ratio": median(ratios),
            "ratios": ratios,
        }
    return result


def processor() -> str:
    """The name of what runs it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def add_peer_python(parser: argparse.ArgumentParser) -> None:
    """The option that names another interpreter for the peer."""
    known = os.environ.get("HEDGELAB_PEER_PYTHON", sys.executable)
    parser.add_argument("--peer-python", default=known, help="the python that the peer is installed for (HEDGELAB_PEER_PYTHON)")


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", choices=SAES, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--peer", choices=("saelens", "dictionary_learning", "sparsify"))
    add_peer_python(parser)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15, help="measured steps, after 3 to warm up")
    parser.add_argument("--batches", type=int, default=4, help="different batches, taken in rotation")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.shape.startswith("gemma") and not torch.cuda.is_available():
        parser.error(f"--shape {options.shape} needs a GPU")
    result = measure(options)
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:18} {f'{value:,.3f}' if isinstance(value, float) else value}")


if __name__ == "__main__":
    main()
