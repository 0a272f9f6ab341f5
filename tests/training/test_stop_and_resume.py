"""Stopped between any two steps and gone on with, a fit ends as if it had never been stopped."""

import logging
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import checkpointed

from hedgelab.errors import Stopped, UserError
from hedgelab.saes import SAEGroup, TopKSAE, VanillaSAE
from hedgelab.training.checkpoints import LAST, PREVIOUS, RunCheckpoint, newest_whole
from tests.saes.comparison import same_weights

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Signal(L.Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class Scores(L.Callback):
    """What was logged, by step."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self.seen["train", trainer.global_step] = float(trainer.callback_metrics["train/loss"])

    def on_validation_end(self, trainer, module):
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key.endswith("val/mse")}
        self.seen["val", trainer.global_step] = values


def fit(folder, module=None, checkpoint=None, callbacks=(), **changed):
    saving = RunCheckpoint(dirpath=str(folder), save_last=True, save_top_k=0, every_n_train_steps=checkpointed.EVERY)
    scores = Scores()
    options = {**checkpointed.settings(saving), **changed, "callbacks": [*callbacks, scores, saving]}
    trainer = L.Trainer(**options, logger=False)
    module = module or checkpointed.sae()
    try:
        trainer.fit(module, datamodule=checkpointed.data(), ckpt_path=checkpoint)
    finally:
        fit.scores, fit.saving = scores.seen, saving
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(tmp_path_factory.mktemp("whole")), fit.scores


@pytest.mark.parametrize(("number", "step"), [(15, 2), (15, 22), (15, 24), (signal.SIGUSR1, 36), (signal.SIGINT, 48), (15, 70)])
def test_signals_stop_between_steps_and_nothing_is_lost(whole, tmp_path, number, step):
    """Steps: before the first interval, between logs, at a validation, at an interval, just before the end."""
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stop:
        fit(tmp_path, callbacks=[Signal(number, step)])
    assert stop.value.code == 128 + number
    assert f"stopped by {signal.Signals(number).name} after step {step}; saved in" in str(stop.value)
    assert signal.getsignal(number) is before
    first = fit.scores
    resumed = fit(tmp_path, checkpoint=str(newest_whole(tmp_path)))
    assert same_weights(whole[0], resumed)
    assert not first.keys() & fit.scores.keys()
    assert first | fit.scores == whole[1]


def test_a_signal_during_the_last_chunk_lets_the_fit_end(whole, tmp_path):
    done = fit(tmp_path, callbacks=[Signal(signal.SIGTERM, checkpointed.STEPS)])
    assert same_weights(whole[0], done)


def test_a_second_interrupt_stops_at_once(tmp_path):
    class Impatient(Signal):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 6:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, callbacks=[Impatient(signal.SIGINT, 6)])
    assert not isinstance(stop.value, Stopped)
    assert isinstance(stop.value.__context__, KeyboardInterrupt)


@pytest.mark.parametrize("damaged", [LAST, None])
def test_what_stops_within_a_step_is_gone_on_with_from_the_checkpoint_before(whole, tmp_path, damaged, caplog):
    class Crash(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 46:
                raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path, callbacks=[Crash()])
    if damaged:
        (tmp_path / damaged).write_bytes((tmp_path / damaged).read_bytes()[:-1])
    found = newest_whole(tmp_path)
    assert (found.name, sum("damaged" in line for line in caplog.messages)) == ((PREVIOUS, 1) if damaged else (LAST, 0))
    first = fit.scores
    assert same_weights(whole[0], fit(tmp_path, checkpoint=str(found)))
    assert first | fit.scores == whole[1]
    assert all(fit.scores[key] == value for key, value in first.items() if key in fit.scores)


def test_a_run_that_was_stopped_after_its_last_step_only_ends(whole, tmp_path):
    fit(tmp_path)
    again = fit(tmp_path, checkpoint=str(tmp_path / LAST))
    assert same_weights(whole[0], again)
    assert fit.scores == {}


def test_groups_too(tmp_path):
    def members():
        return SAEGroup(
            {
                "a": VanillaSAE(8, 3, 0.01, l1_warmup_steps=50),
                "b": checkpointed.sae(1),
                "c": TopKSAE(8, 5, k=2, dead_after_steps=5),
            }
        )

    whole = fit(tmp_path / "whole", members())
    scores = fit.scores.items()
    with pytest.raises(Stopped):
        fit(tmp_path / "cut", members(), callbacks=[Signal(signal.SIGTERM, 46)])
    first = fit.scores
    resumed = fit(tmp_path / "cut", members(), checkpoint=str(tmp_path / "cut" / LAST))
    assert all(same_weights(whole.saes()[name], resumed.saes()[name]) for name in "abc")
    assert (first | fit.scores).items() == scores


def test_another_runs_checkpoints_are_not_replaced(tmp_path):
    fit(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint\.dirpath: .* holds checkpoints of another run"):
        fit(tmp_path)


def test_a_disk_that_takes_no_checkpoint_does_not_stop_training(whole, tmp_path, monkeypatch, caplog):
    real = L.Trainer.save_checkpoint

    def full(self, path, **options):
        if 24 <= self.global_step < 48:
            raise OSError(28, "No space left on device")
        real(self, path, **options)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    assert same_weights(whole[0], fit(tmp_path))
    said = [line for line in caplog.messages if "no checkpoint" in line]
    assert said == [
        f"no checkpoint could be written at step 24 in {tmp_path} (No space left on device); training goes on, the one "
        "before it is kept"
    ]
    assert newest_whole(tmp_path) == tmp_path / LAST


def test_a_signal_while_the_disk_is_full_says_what_is_left(tmp_path, monkeypatch):
    def full(self, path, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    with pytest.raises(Stopped, match="after step 6, which could not be saved"):
        fit(tmp_path, callbacks=[Signal(signal.SIGTERM, 6)])


def test_saving_as_often_as_possible_changes_nothing(whole, tmp_path):
    saving = partial(RunCheckpoint, save_last=True, save_top_k=0)
    often = saving(dirpath=str(tmp_path), every_n_train_steps=2)
    trainer = L.Trainer(**checkpointed.settings(often), logger=False)
    module = checkpointed.sae()
    trainer.fit(module, datamodule=checkpointed.data())
    assert same_weights(whole[0], module)
