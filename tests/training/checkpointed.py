"""Fits that the tests kill: run inside forks of a warm parent, without a command line, whose parsing costs seconds."""

import warnings
from functools import partial
from pathlib import Path

import lightning as L
import torch

from hedgelab.data.toy import ConditionalFiring, ToyDataModule
from hedgelab.protocols.training_phases import Phase, PhaseRunner, PhaseTrainer
from hedgelab.saes import BatchTopKSAE, Initialization, TopKSAE, VanillaSAE, duplicate
from hedgelab.saes.io import save_sae
from hedgelab.tracking import MLflowTracker, RunRecord
from hedgelab.tracking.store import tracking_uri
from hedgelab.training.checkpoints import RunCheckpoint, newest_whole
from hedgelab.training.checkpoints.folder import known_runs

STEPS, LONG, EVERY, CHUNK, LOG, VALIDATE = 72, 300, 4, 2, 6, 24


def data():
    firing = ConditionalFiring([0.3, {"f0": 0.3, "not f0": 0.1}, 0.2, {"f2": 0.4, "otherwise": 0}])
    return ToyDataModule(firing, d_in=8, batch_size=16, seed=3, chunk_steps=CHUNK, val_batches=2)


def sae(seed=0):
    adam = partial(torch.optim.Adam, lr=1e-2)
    schedule = partial(torch.optim.lr_scheduler.LinearLR, total_iters=STEPS, end_factor=0.1)
    init = Initialization(seed=seed, b_dec="mean")
    return BatchTopKSAE(8, 5, k=2, dead_after_steps=7, init=init, optimizer=adam, lr_scheduler=schedule)


def settings(callback, steps=STEPS):
    return {
        "max_steps": steps,
        "log_every_n_steps": LOG,
        "val_check_interval": VALIDATE,
        "check_val_every_n_epoch": None,
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [callback],
    }


def toy(folder, tracked=True):
    """One fit in a folder; goes on with what it finds there; leaves the weights in ``result/``."""
    root = Path(folder) / "runs" / "checkpoints"
    found = next(iter(known_runs(root)), None)
    callback = RunCheckpoint(save_last=True, save_top_k=0, every_n_train_steps=EVERY)
    callback.facts = lambda: {"identity": "toy"}
    tracker = MLflowTracker(run_name="toy", uri=tracking_uri()) if tracked else False
    checkpoint = None
    if found is not None:
        callback.folder, callback.dirpath = found, str(found.path)
        found.claim()
        if tracked:
            tracker.go_on_with(found.run_id)
        checkpoint = newest_whole(found.path)
    record = [RunRecord()] if tracked else []
    trainer = L.Trainer(
        **{**settings(callback, LONG), "callbacks": [*record, callback]}, logger=tracker, default_root_dir=folder
    )
    model = sae()
    trainer.fit(model, datamodule=data(), ckpt_path=None if checkpoint is None else str(checkpoint))
    save_sae(model, Path(folder) / "result")


def group(folder):
    """Two phases, the first of two SAEs, the second going on from one of them."""
    tracker = MLflowTracker(uri=tracking_uri())
    callback = RunCheckpoint(save_last=True, save_top_k=0, every_n_train_steps=EVERY)
    runner = PhaseRunner(PhaseTrainer(**settings(callback, LONG)))
    first = [
        Phase("vanilla", {"kind": "vanilla"}, lambda: VanillaSAE(8, 3, 0.01, l1_warmup_steps=50), tracker),
        Phase("topk", {"kind": "topk"}, lambda: TopKSAE(8, 5, k=2, dead_after_steps=5), tracker),
    ]
    trained = runner.train(first, data())
    phase = Phase("again", {"kind": "again"}, lambda: duplicate(trained["topk"]), tracker)
    trained |= runner.train([phase], data())
    tracker.finalize("success")
    for name, model in trained.items():
        save_sae(model, Path(folder) / "result" / name)


def run(name, folder):
    warnings.simplefilter("ignore")
    {"toy": toy, "untracked": partial(toy, tracked=False), "group": group}[name](folder)
    return 0
