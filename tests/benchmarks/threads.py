"""Steps a second of the toy of one latent beside busy processes, with the threads that a fit takes and with PyTorch's own.

python -m tests.benchmarks.threads [--busy 4] [--steps 3000]
"""

import argparse
import multiprocessing
import os
import time

import lightning as L
import torch

from hedgelab.data.toy import ConditionalFiring, ToyDataModule
from hedgelab.saes import VanillaSAE


def keep_busy() -> None:
    """Use one core until the process is ended."""
    while True:
        sum(range(10_000))


def steps_per_second(steps: int, threads: int | None) -> float:
    """Of one fit; with ``threads`` None, of one that chooses them itself."""
    os.environ.pop("HEDGELAB_THREADS", None)
    if threads is not None:
        os.environ["HEDGELAB_THREADS"] = str(threads)
    data = ToyDataModule(ConditionalFiring([0.25, {"f0": 0.2, "otherwise": 0}]), d_in=50, batch_size=500, seed=0)
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", limit_val_batches=0, log_every_n_steps=100, **quiet)
    started = time.perf_counter()
    trainer.fit(VanillaSAE(50, 1, 1e-3), datamodule=data)
    return steps / (time.perf_counter() - started)


def main() -> None:
    """Measure and print, alternating."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.pop(name, None)
    most = max(2, os.cpu_count() or 1)
    for busy in (0, options.busy):
        others = [multiprocessing.Process(target=keep_busy, daemon=True) for _ in range(busy)]
        for process in others:
            process.start()
        torch.set_num_threads(most)
        chosen, all_cores = [], []
        for _ in range(3):
            chosen.append(steps_per_second(options.steps, None))
            all_cores.append(steps_per_second(options.steps, most))
        print(f"{busy} busy processes: {sorted(chosen)[1]:.0f} steps/s, on {most} threads {sorted(all_cores)[1]:.0f}")
        for process in others:
            process.terminate()


if __name__ == "__main__":
    main()
