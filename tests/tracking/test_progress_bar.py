import re

import lightning as L
import pytest
import torch

from hedgelab.data.toy import IndependentFiring, ToyDataModule
from hedgelab.saes import VanillaSAE
from hedgelab.tracking import StepProgressBar


def run(steps, chunk_steps, bar):
    data = ToyDataModule(IndependentFiring([0.25]), d_in=4, seed=0, batch_size=8, chunk_steps=chunk_steps)
    sae = VanillaSAE(4, 1, 1e-3, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3))
    trainer = L.Trainer(
        max_steps=steps,
        logger=False,
        callbacks=[bar],
        log_every_n_steps=20,
        limit_val_batches=0,
        accelerator="cpu",
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(sae, datamodule=data)


@pytest.mark.parametrize("chunk_steps", [1, 20])
def test_log_file_gets_few_lines_that_count_steps(chunk_steps, capsys):
    run(200, chunk_steps, StepProgressBar(per_second=1e6))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert 5 <= len(lines) <= 22
    assert re.fullmatch(r"step 200/200, [\d.]+ steps/s, loss \S+", lines[-1])
    assert re.fullmatch(r"step \d+/200, [\d.]+ steps/s, \d+ s left(, loss \S+)?", lines[0])


def test_terminal_gets_one_bar_that_ends_at_the_last_step(capsys):
    bar = StepProgressBar()
    bar._terminal = True
    run(200, 20, bar)
    last = capsys.readouterr().out.rstrip().split("\r")[-1]
    assert "200/200" in last
    assert "loss" in last
    assert bar.train_progress_bar.n == 200


def test_redraws_are_few(monkeypatch, capsys):
    bar = StepProgressBar(per_second=0.001)
    shown = []
    monkeypatch.setattr(bar, "_show", lambda trainer: shown.append(trainer.global_step))
    run(100, 1, bar)
    assert len(shown) <= 2
    assert shown[-1] == 100


def test_disabled_bar_is_silent(capsys):
    bar = StepProgressBar()
    bar.disable()
    run(40, 20, bar)
    assert "step " not in capsys.readouterr().out
