"""What the Lightning shell costs: ``hedgelab``'s toy training beside a plain PyTorch loop of the same arithmetic.

    python -m tests.benchmarks.lightning_overhead [--steps 2000] [--pairs 5]

Both draw the same batches of the two-feature hierarchical toy (d_in 50, batch 500), train the same single-latent SAE from the
same start with fused Adam, and end at the same loss. They take turns; printed are the ratio of each pair and the median.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings

import lightning as L
import torch
from torch import nn

from hedgelab.data.toy import ConditionalFiring, ToyDataModule
from hedgelab.saes import Initialization, VanillaSAE

L1 = 1e-3


def make_data() -> ToyDataModule:
    return ToyDataModule(ConditionalFiring([0.25, {"f0": 0.2, "otherwise": 0.0}]), d_in=50, batch_size=500, seed=0)


def make_sae() -> VanillaSAE:
    return VanillaSAE(50, 1, l1_coefficient=L1, init=Initialization(at_features=True, noise=0.25, seed=0))


def plain_loop(steps: int) -> tuple[float, float]:
    """Seconds and final loss of a loop that owes nothing to hedgelab but its batches and its initial weights."""
    data, sae = make_data(), make_sae()
    sae.initialize(data.batch("train", 0), data.feature_directions)
    W_enc, b_enc, W_dec, b_dec = (nn.Parameter(p.detach().clone()) for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    optimizer = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=3e-4, fused=True)
    start = time.perf_counter()
    for index in range(steps):
        x = data.batch("train", index).x
        a = torch.relu((x - b_dec) @ W_enc + b_enc)
        x_hat = a @ W_dec + b_dec
        loss = (x_hat - x).pow(2).sum(-1).mean() + L1 * (a * W_dec.norm(dim=-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    x = data.batch("train", steps).x
    a = torch.relu((x - b_dec) @ W_enc + b_enc)
    loss = (a @ W_dec + b_dec - x).pow(2).sum(-1).mean() + L1 * (a * W_dec.norm(dim=-1)).sum(-1).mean()
    return seconds, loss.item()


class Clock(L.Callback):
    """Times a fit from its first step to its last, without Lightning's start-up; then takes the loss on a fresh batch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 0:
            self.start = time.perf_counter()

    def on_train_end(self, trainer, module):
        self.seconds = time.perf_counter() - self.start
        self.loss = module.loss(trainer.datamodule.batch("train", trainer.max_steps)).total.item()


def hedgelab_fit(steps: int, tracked: bool) -> tuple[float, float]:
    """Seconds and final loss of the same training through a Lightning trainer, with or without tracking and checkpoints."""
    clock = Clock()
    callbacks: list[L.Callback] = [clock]
    with tempfile.TemporaryDirectory() as folder:
        if tracked:
            from hedgelab.tracking.logger import MLflowTracker
            from hedgelab.tracking.record import RunRecord

            checkpoint = L.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=1000, save_last=True)
            callbacks += [checkpoint, RunRecord()]
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=MLflowTracker(uri=f"sqlite:///{folder}/mlflow.db") if tracked else False,
            callbacks=callbacks,
            enable_checkpointing=tracked,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=100,
            limit_val_batches=0,
        )
        trainer.fit(make_sae(), datamodule=make_data())
        assert trainer.global_step == steps
    return clock.seconds, clock.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps a run")
    parser.add_argument("--pairs", type=int, default=5, help="how often the loops take turns")
    parser.add_argument("--tracked", action="store_true", help="with MLflow, checkpoints and the run record on")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    plain_loop(200)
    rates: dict[str, list[float]] = {"plain": [], "hedgelab": []}
    losses = {}
    for _ in range(arguments.pairs):
        for name, run in (("plain", plain_loop), ("hedgelab", lambda n: hedgelab_fit(n, arguments.tracked))):
            seconds, losses[name] = run(arguments.steps)
            rates[name].append(arguments.steps / seconds)
    ratios = [b / a for a, b in zip(rates["plain"], rates["hedgelab"], strict=True)]
    print(
        json.dumps(
            {
                "steps_per_s": {name: round(statistics.median(values)) for name, values in rates.items()},
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "final_loss": losses,
                "threads": torch.get_num_threads(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
