"""Samples/s of a whole fit on SynthSAEBench-16k, beside SAELens's ``SyntheticSAERunner`` on the same folder, in turns.

``python -m tests.benchmarks.synth_speed --peer-python PATH [--sae matryoshka] [--json]``

Ours is ``hedgelab fit``: drawing samples, training, metrics, tracking. Both sides read one folder that SAELens saves (its
16 384 features in 768 dimensions, without orthogonalisation), train 4 096 latents with k 25 on batches of 1 024 with clipped
gradients, and time the steps after the first few of each run. Ratios are within one turn. At least 4 is asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import lightning as L
import torch
import yaml

from tests.benchmarks.training_step import Worker, add_peer_python, processor

WARM_UP = 4
SAES = ("batch_topk", "matryoshka")
LEVELS = [128, 512, 2048, 4096]
SHAPE = {"d_in": 768, "d_sae": 4096, "k": 25, "batch": 1024, "lr": 3e-4}
SYNTHETIC_MODEL = {
    "num_features": 16_384,
    "hidden_dim": 768,
    "firing_probability": {"generator_name": "zipfian", "exponent": 0.5, "max_prob": 0.4, "min_prob": 5e-4},
    "hierarchy": {
        "total_root_nodes": 128,
        "branching_factor": 4,
        "max_depth": 3,
        "mutually_exclusive_portion": 1.0,
        "compensate_probabilities": True,
        "scale_children_by_parent": True,
    },
    "correlation": {"rank": 25, "correlation_scale": 0.1},
    "mean_firing_magnitudes": {"generator_name": "linear", "start": 5.0, "end": 4.0},
    "std_firing_magnitudes": {"generator_name": "folded_normal", "mean": 0.5, "std": 0.5},
    "bias": 0.5,
    "seed": 42,
}


class Clock(L.Callback):
    """Notes when each batch has been trained on, and after how many steps."""

    times: ClassVar[list[tuple[int, float]]] = []

    def on_train_start(self, trainer, module):
        self.times.clear()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.times.append((trainer.global_step, time.perf_counter()))


def fit(sae: str, folder: Path, steps: int) -> float:
    """Seconds a step of one ``hedgelab fit``."""
    from hedgelab.cli import main as hedgelab

    inner = {"d_sae": SHAPE["d_sae"], "k": SHAPE["k"], "norm_aware_selection": True, "init": {"decoder_norm": 0.1}}
    inner["gradient_clip_norm"] = 1.0  # SAELens always clips
    inner["optimizer"] = {"class_path": "torch.optim.Adam", "init_args": {"lr": SHAPE["lr"], "fused": True}}
    model: dict[str, Any] = {"class_path": "BatchTopKSAE", "init_args": inner}
    if sae == "matryoshka":
        arguments = {"levels": LEVELS, "auxiliary_per_level": True, "inner": model}
        model = {"class_path": "MatryoshkaSAE", "init_args": arguments}
    config = {
        "seed_everything": 0,
        "trainer": {
            "max_steps": steps + WARM_UP,
            "accelerator": "cpu",
            "limit_val_batches": 0,
            "log_every_n_steps": 10,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": f"{__spec__.name}.Clock"}],
        },
        "data": {
            "class_path": "hedgelab.data.toy.synthetic_model.SyntheticModelFolder",
            "init_args": {"path": str(folder / "model"), "batch_size": SHAPE["batch"], "chunk_steps": 1},
        },
        "model": model,
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(config))
    if hedgelab(["fit", "--config", str(folder / "fit.yaml")]):
        raise SystemExit("hedgelab fit failed; see its output above")
    times = import_module(__spec__.name).Clock.times
    start = next(noted for step, noted in times if step >= WARM_UP)
    return (times[-1][1] - start) / (times[-1][0] - next(step for step, _ in times if step >= WARM_UP))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one SAE."""
    torch.set_num_threads(options.threads)
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        os.environ["HEDGELAB_THREADS"] = str(options.threads)
        task = {
            **SHAPE, "levels": LEVELS, "synthetic_model": SYNTHETIC_MODEL, "folder": str(folder / "model"),
            "warm_up": WARM_UP, "threads": options.threads,
        }  # fmt: skip
        peer = Worker(options.peer_python, "synth_peer.py", task)
        peer.wait()
        for _ in range(options.turns):
            rates["ours"].append(SHAPE["batch"] / fit(options.sae, folder, options.steps))
            rates["peer"].append(SHAPE["batch"] / peer.ask(options.sae, options.peer_steps)["seconds"])
        versions = peer.ask("finish")["versions"]
        peer.close()
    ratios = [ours / peers for ours, peers in zip(rates["ours"], rates["peer"], strict=True)]
    return {
        "sae": options.sae, "machine": f"{processor()}, {options.threads} threads, {platform.platform()}",
        "samples_per_s": median(rates["ours"]), "peer_samples_per_s": median(rates["peer"]), "ratio": median(ratios),
        "ratios": [round(ratio, 2) for ratio in ratios], "versions": {"torch": torch.__version__}, "peer_versions": versions,
    }  # fmt: skip


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", choices=SAES, default="batch_topk")
    add_peer_python(parser)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of ours, a turn")
    parser.add_argument("--peer-steps", type=int, default=10, help="timed steps of the peer's, a turn")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options)
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:20} {f'{value:,.1f}' if isinstance(value, float) else value}")


if __name__ == "__main__":
    main()
