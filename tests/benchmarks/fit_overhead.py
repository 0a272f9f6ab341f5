"""What ``hedgelab fit`` adds to the bare training step: data, metrics, logging, checkpoints, MLflow.

    python -m tests.benchmarks.fit_overhead [--sae topk] [--steps 60] [--pairs 5] [--threads 2]

Both train the same SAE at the small shape (d_in 576, d_sae 8192, k 32, batch 2048, fp32) on the same batches, taken from
memory. They take turns; printed are the bare step's share of the fit's step, pair by pair, and its median.
"""

import argparse
import functools
import json
import logging
import statistics
import tempfile
import time
import warnings

import lightning as L
import torch

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.kernels.allocator import keep_large_blocks
from hedgelab.saes import SAE, BatchTopKSAE, MatryoshkaSAE, TopKSAE
from hedgelab.tracking import MLflowTracker, RunRecord
from hedgelab.training.trainee import Trainee

D_IN, D_SAE, K, BATCH = 576, 8192, 32, 2048


class FromMemory(ActivationDataModule):
    """A few batches, again and again."""

    def __init__(self) -> None:
        super().__init__(BATCH, seed=0, val_batches=1)
        rng = torch.Generator().manual_seed(0)
        self.stored = [Batch(torch.randn(BATCH, D_IN, generator=rng)) for _ in range(8)]

    @property
    def d_in(self) -> int:
        return D_IN

    def batch(self, stage, index):
        return self.stored[index % len(self.stored)]


def make_sae(kind: str) -> SAE:
    match kind:
        case "topk":
            return TopKSAE(D_IN, D_SAE, k=K)
        case "batch_topk":
            return BatchTopKSAE(D_IN, D_SAE, k=K)
        case _:
            inner = functools.partial(BatchTopKSAE, d_sae=D_SAE, k=K)
            return MatryoshkaSAE(D_IN, inner, [D_SAE // 64, D_SAE // 16, D_SAE // 4, D_SAE])


def bare(kind: str, data: FromMemory, steps: int) -> float:
    """Seconds a step of loss, backward pass, fused Adam and dead-latent clock."""
    sae = make_sae(kind)
    optimizer = sae.configure_optimizers()
    for index in range(steps + 3):
        if index == 3:
            start = time.perf_counter()
        sae.zero_grad()
        result = sae.loss(data.batch("train", index))
        result.total.backward()
        Trainee(sae).prepare_gradients()
        optimizer.step()
        sae.after_step(result)
    return (time.perf_counter() - start) / steps


class Clock(L.Callback):
    """Times the steps after the third."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            self.start = time.perf_counter()

    def on_train_end(self, trainer, module):
        self.seconds = (time.perf_counter() - self.start) / (trainer.max_steps - 3)


def fitted(kind: str, data: FromMemory, steps: int, folder: str) -> float:
    """Seconds a step inside a fit, tracking and all."""
    clock = Clock()
    trainer = L.Trainer(
        max_steps=steps + 3,
        accelerator="cpu",
        logger=MLflowTracker(uri=f"sqlite:///{folder}/mlflow.db"),
        callbacks=[clock, RunRecord()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
        limit_val_batches=0,
    )
    trainer.fit(make_sae(kind), datamodule=data)
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", choices=("topk", "batch_topk", "matryoshka"), default="topk")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    keep_large_blocks()
    data = FromMemory()
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.pairs):
            pairs.append((bare(options.sae, data, options.steps), fitted(options.sae, data, options.steps, folder)))
    ratios = [a / b for a, b in pairs]
    report = {
        "sae": options.sae,
        "bare_ms": round(1e3 * statistics.median(a for a, _ in pairs), 1),
        "fit_ms": round(1e3 * statistics.median(b for _, b in pairs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
