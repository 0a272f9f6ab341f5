"""Every flag of Lightning's Trainer and every stock callback: it does what Lightning's docs say, or is refused in one line.

The table in hedgelab/training/README.md is made of the rows below: HEDGELAB_WRITE_DOCS=1 python -m pytest THIS_FILE -k table
"""

import csv
import functools
import logging
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as stock
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import SimpleProfiler

from hedgelab.data.toy import IndependentFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.saes import BatchTopKSAE, SAEGroup, TopKSAE, VanillaSAE
from hedgelab.training.checkpoints import RunCheckpoint
from tests.saes.comparison import same_weights

pytestmark = pytest.mark.filterwarnings("ignore")
README = Path(__file__).parents[2] / "hedgelab" / "training" / "README.md"
VAL = 4


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Seen(L.Callback):
    """What a callback of the user's own sees."""

    def __init__(self):
        self.steps, self.batches, self.validated, self.val_batches, self.order = [], 0, [], 0, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.order.append("start")

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.order.append("step")

    def on_after_backward(self, trainer, module):
        self.order.append("backward")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches += 1
        self.order.append("end")
        self.steps.append((trainer.global_step, batch_idx, float(outputs["loss"])))
        assert batch.x.shape == (16, 6)

    def on_validation_batch_end(self, *_):
        self.val_batches += 1

    def on_validation_end(self, trainer, module):
        self.validated.append(trainer.global_step)


def logged():
    """The rows that a CSVLogger("csv", version="0") has written."""
    with Path("csv/lightning_logs/0/metrics.csv").open() as file:
        return list(csv.DictReader(file))


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def sae(cls=TopKSAE, **options):
    torch.manual_seed(0)
    return cls(6, 5, **{"k": 2, "optimizer": adam, **options})


def data(**options):
    return ToyDataModule(
        IndependentFiring([0.3] * 6), d_in=6, batch_size=16, val_batches=VAL, seed=0, **{"chunk_steps": 10, **options}
    )


class Fit(NamedTuple):
    trainer: L.Trainer
    model: L.LightningModule
    seen: Seen


def fit(model=None, callbacks=(), ckpt_path=None, watched=True, stream=None, **flags):
    seen = Seen()
    quiet = {
        "enable_progress_bar": False,
        "enable_checkpointing": any(isinstance(callback, stock.Checkpoint) for callback in callbacks),
        "enable_model_summary": False,
    }
    plain = {"max_steps": 20, "accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0, "log_every_n_steps": 10}
    trainer = L.Trainer(**{**quiet, **plain, **flags}, callbacks=[*([seen] if watched else []), *callbacks])
    model = model or sae()
    trainer.fit(model, datamodule=stream or data(), ckpt_path=ckpt_path)
    return Fit(trainer, model, seen)


def steps(count, validated=None, **flags):
    """A fit with some flags takes so many steps, which callbacks see one by one, and validates after these."""

    def check():
        done = fit(**flags)
        assert done.trainer.global_step == done.seen.batches == count
        assert [step for step, _, _ in done.seen.steps] == list(range(1, count + 1))
        assert done.seen.validated == ([count] if validated is None else validated)
        return done

    return check


def refused(said, **flags):
    """A fit with some flags is refused, in one line, before its first step."""

    def check():
        seen = Seen()
        with pytest.raises(UserError, match=re.escape(said)) as error:
            fit(**{**flags, "callbacks": [seen, *flags.get("callbacks", ())]}, watched=False)
        assert "\n" not in str(error.value)
        assert seen.batches == 0

    return check


# -- what the rows check -------------------------------------------------------------------------------


def precision(name, dtype):
    def check():
        done = fit(precision=name)
        assert done.model.W_dec.dtype == dtype
        assert torch.isfinite(done.model.W_dec).all()
        assert done.trainer.callback_metrics["train/loss"] < done.seen.steps[0][2]

    return check


def limited_validation():
    assert fit(limit_val_batches=3).seen.val_batches == 3
    assert fit(limit_val_batches=0.5).seen.val_batches == VAL // 2
    assert fit(limit_val_batches=0).seen.val_batches == 0
    done = fit()
    measured = L.Trainer(limit_test_batches=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert "test/mse" in measured.test(done.model, data(), verbose=False)[0]


def trial_of_seven():
    done = steps(7, fast_dev_run=7)()
    assert done.seen.val_batches == VAL  # as many as there are, at most 7
    assert fit(fast_dev_run=True).seen.val_batches == 1


def overfitting():
    class Kept(Seen):
        def __init__(self):
            super().__init__()
            self.x = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.x.append(batch.x)

    kept = Kept()
    done = fit(overfit_batches=3, callbacks=[kept])
    assert done.trainer.global_step == 20
    expected = [data().batch("train", i % 3).x for i in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(kept.x, expected, strict=True))


def time_limit(**flags):
    def check():
        done = fit(max_steps=10**6, limit_val_batches=0, **flags)
        assert 0 < done.trainer.global_step < 10**6

    return check


def sanity_check():
    done = fit(num_sanity_val_steps=2, logger=CSVLogger("csv", version="0"))
    assert done.seen.val_batches == 2 + VAL
    assert [int(row["step"]) for row in logged() if row["val/mse"]] == [20]


def anomalies_are_found():
    class Broken(VanillaSAE):
        def loss(self, batch):
            result = super().loss(batch)
            result.terms["mse"] = result.terms["mse"] + (self.b_dec.sum() * 0 - 1).sqrt().nan_to_num()
            return result

    with pytest.raises(RuntimeError, match="SqrtBackward"):
        fit(Broken(6, 5, 0.01), detect_anomaly=True, max_steps=2)


def deterministic():
    try:
        assert same_weights(fit(deterministic=True).model, fit().model)
    finally:
        torch.use_deterministic_algorithms(False)


def early_stopping():
    stop = stock.EarlyStopping("val/mse", min_delta=1e9, patience=1)
    steps(10, validated=[5, 10], callbacks=[stop], val_check_interval=5)()
    by_training_loss = stock.EarlyStopping("train/loss", stopping_threshold=1e9, check_on_train_epoch_end=False)
    steps(5, validated=[5], callbacks=[by_training_loss], val_check_interval=5)()


def typo():
    refused("EarlyStopping monitors 'val_loss', which is never logged", callbacks=[stock.EarlyStopping("val_loss")])()
    fit(callbacks=[stock.EarlyStopping("val_loss", strict=False)])
    kept = stock.ModelCheckpoint(monitor="val/mcx")
    refused("ModelCheckpoint monitors 'val/mcx'", callbacks=[kept])()
    assert fit(SAEGroup({"a": sae()}), callbacks=[stock.EarlyStopping("a/val/mcc")]).trainer.global_step == 20


def learning_rates_each_step():
    schedule = functools.partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.5, total_iters=20)
    logger = CSVLogger("csv", version="0")
    fit(
        sae(lr_scheduler=schedule), [stock.LearningRateMonitor("step")], logger=logger, log_every_n_steps=1, limit_val_batches=0
    )
    rates = [float(row["lr-Adam"]) for row in logged() if row["lr-Adam"]]
    assert rates == pytest.approx([1e-2 * (1 - 0.5 * step / 20) for step in range(20)])


def own_checkpoints():
    own = stock.ModelCheckpoint("own", "{step}", every_n_train_steps=5, save_top_k=-1, save_last=True)
    done = fit(callbacks=[own])
    assert {path.name for path in Path("own").iterdir()} == {"last.ckpt", *(f"step={n}.ckpt" for n in (5, 10, 15, 20))}
    best = stock.ModelCheckpoint("best", monitor="val/mse")
    assert Path(fit(callbacks=[best], val_check_interval=5).trainer.checkpoint_callback.best_model_path).exists()
    assert same_weights(fit(ckpt_path="own/step=10.ckpt").model, done.model)


def averages(callback, expected):
    """The callback's average after 20 steps of a fit, against what its formula makes of the weights of each step."""

    def check():
        class Weights(L.Callback):
            history: list

            def on_train_start(self, trainer, module):
                self.history = []

            def on_train_batch_end(self, trainer, module, *_):
                self.history.append(module.W_dec.detach().double().clone())

        weights = Weights()
        done = fit(callbacks=[weights, callback()])
        torch.testing.assert_close(done.model.W_dec.double(), expected(weights.history), atol=1e-6, rtol=1e-5)
        # What validation measured is the averaged SAE, with chunks allowed or not, and however often training logs.
        measured = float(done.trainer.callback_metrics["val/explained_variance"])
        by_hand = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        again = by_hand.validate(done.model, data(), verbose=False)[0]
        assert again["val/explained_variance"] == pytest.approx(measured, abs=1e-6)
        assert again["val/mcc"] == pytest.approx(float(done.trainer.callback_metrics["val/mcc"]), abs=1e-6)
        for changed in ({"log_every_n_steps": 1}, {"stream": data(chunk_steps=1)}):
            other = fit(callbacks=[callback()], watched=False, **changed)
            assert float(other.trainer.callback_metrics["val/explained_variance"]) == measured

    return check


def mean(history):
    return torch.stack(history).mean(0)


def moving(history, decay=0.9):
    average = history[0]
    for weights in history[1:]:
        average = decay * average + (1 - decay) * weights
    return average


def profilers():
    profiler = SimpleProfiler()
    fit(profiler=profiler)
    assert len(profiler.recorded_durations["run_training_batch"]) == 20


def csv_logger():
    fit(logger=CSVLogger("csv", version="0"))
    assert [int(row["step"]) for row in logged() if row["train/loss"]] == [10, 20]
    assert [int(row["step"]) for row in logged() if row["val/mse"]] == [20]


def tensorboard_logger():
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(logger=[TensorBoardLogger("tb", version="0"), CSVLogger("csv", version="0")])
    events = EventAccumulator("tb/lightning_logs/0")
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20]
    assert Path("csv/lightning_logs/0/metrics.csv").exists()


def measured_numbers():
    done = fit()
    (validated,) = done.trainer.validate(done.model, data(), verbose=False)
    assert validated["val/mse"] == pytest.approx(float(done.trainer.callback_metrics["val/mse"]))
    (tested,) = done.trainer.test(done.model, data(), verbose=False)
    assert {name.removeprefix("test/") for name in tested} == {name.removeprefix("val/") for name in validated}
    logger = CSVLogger("csv", version="0")
    L.Trainer(accelerator="cpu", logger=logger, enable_checkpointing=False).test(done.model, data(), verbose=False)
    assert [float(row["test/mse"]) for row in logged()] == pytest.approx([tested["test/mse"]])


def callback_metrics():
    class Losses(L.Callback):
        seen: list

        def on_fit_start(self, trainer, module):
            self.seen = []

        def on_train_batch_end(self, trainer, module, outputs, *_):
            self.seen.append((float(outputs["loss"]), float(trainer.callback_metrics["train/loss"])))

    losses = Losses()
    done = fit(callbacks=[losses])
    own, shown = zip(*losses.seen, strict=True)
    every_tenth = range(9, 20, 10)
    assert [shown[i] for i in range(20) if i not in every_tenth] == [own[i] for i in range(20) if i not in every_tenth]
    assert shown[9] == pytest.approx(sum(own[:10]) / 10)  # where training logs: the mean since it did so last
    assert {"train/mse", "train/loss", "val/mse", "val/mcc"} <= done.trainer.callback_metrics.keys()


def loads():
    done = fit(callbacks=[stock.ModelCheckpoint("kept", "one")])
    assert same_weights(TopKSAE.load_from_checkpoint("kept/one.ckpt"), done.model)
    group = SAEGroup({"a": sae(), "b": sae(BatchTopKSAE)})
    fit(group, [stock.ModelCheckpoint("kept", "two")])
    assert same_weights(BatchTopKSAE.load_from_checkpoint("kept/two.ckpt", member="b"), group.saes()["b"])
    with pytest.raises(UserError, match="holds the SAEs a, b; name one of them"):
        TopKSAE.load_from_checkpoint("kept/two.ckpt")


def by_time():
    class Slow(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.checkpoint_callback._interval_began -= 60

    kept = RunCheckpoint("mine", save_last=True, save_top_k=0, train_time_interval=timedelta(minutes=3))
    saved = []
    promote = kept._save
    kept._save = lambda trainer: (saved.append(trainer.global_step), promote(trainer))
    fit(callbacks=[Slow(), kept], max_steps=10)
    assert saved == [3, 6, 9, 10]


SWA = stock.StochasticWeightAveraging(1e-2)
RUN_EPOCHS = {"limit_train_batches": 5, "max_epochs": 3}
ROWS = [
    ("`max_steps`", "number of steps; needed, for a stream has no end", steps(20)),
    ("`max_epochs`", "with `limit_train_batches: N`: epochs of N further steps; else a stream has one epoch",
     steps(15, [5, 10, 15], **RUN_EPOCHS)),
    ("`max_epochs` alone", "refused: set `max_steps`", refused("trainer.max_steps: must be set", max_steps=-1, max_epochs=1)),
    ("`min_steps`, `min_epochs`", "as documented", steps(20, min_steps=10, min_epochs=1)),
    ("`max_time`, `Timer`", "as documented; looked at every step", time_limit(max_time={"seconds": 1})),
    ("`limit_train_batches: 5`", "5 steps", steps(5, limit_train_batches=5)),
    ("`limit_train_batches: 0.5`", "refused: a stream has no length", refused("so give steps", limit_train_batches=0.5)),
    ("`limit_val_batches`, `limit_test_batches`", "as documented, numbers and fractions", limited_validation),
    ("`overfit_batches: 3`", "the first 3 batches, again and again", overfitting),
    ("`overfit_batches: 0.1`", "refused: a stream has no length", refused("so give steps", overfit_batches=0.1)),
    ("`fast_dev_run: 7`", "7 steps and up to 7 validation batches, without checkpoints and loggers", trial_of_seven),
    ("`val_check_interval: 5`", "every 5 steps", steps(20, [5, 10, 15, 20], val_check_interval=5)),
    ("`val_check_interval`, a time", "as documented",
     steps(20, [], val_check_interval=timedelta(hours=1))),
    ("`val_check_interval: 0.5`", "refused: a stream has no length", refused("so give steps", val_check_interval=0.5)),
    ("`check_val_every_n_epoch: null`", "as documented, with `val_check_interval`",
     steps(20, [5, 10, 15, 20], val_check_interval=5, check_val_every_n_epoch=None)),
    ("`check_val_every_n_epoch: 2`", "as documented with `max_epochs`; refused where a stream has one epoch",
     refused("trainer.check_val_every_n_epoch: must be 1", check_val_every_n_epoch=2)),
    ("`num_sanity_val_steps`", "as documented; logs nothing", sanity_check),
    ("`reload_dataloaders_every_n_epochs`", "changes nothing: the stream goes on where it was",
     steps(15, [5, 10, 15], reload_dataloaders_every_n_epochs=1, **RUN_EPOCHS)),
    ("`gradient_clip_val`, `gradient_clip_algorithm`", "refused: `model.gradient_clip_norm` clips each SAE's gradients by norm",
     refused("model.gradient_clip_norm to 0.5", gradient_clip_val=0.5)),
    ("`accumulate_grad_batches`, `GradientAccumulationScheduler`", "refused: raise `data.batch_size`",
     refused("data.batch_size 2 times as large", accumulate_grad_batches=2)),
    ("`precision: 32-true`", "as documented", precision("32-true", torch.float32)),
    ("`precision: 64-true`", "as documented", precision("64-true", torch.float64)),
    ("`precision: bf16-mixed`", "as documented", precision("bf16-mixed", torch.float32)),
    ("`precision: 16-mixed`", "as documented (a GPU's; a CPU takes bf16-mixed); gradients are unscaled, then clipped",
     precision("16-mixed", torch.float32)),
    ("`precision: bf16-true`, `16-true`", "refused: Adam's steps are rounded away; use `bf16-mixed`",
     refused("use bf16-mixed", precision="bf16-true")),
    ("`detect_anomaly`", "as documented", anomalies_are_found),
    ("`deterministic`", "as documented; the numbers are the same without", deterministic),
    ("`profiler`", "as documented; a batch is a step", profilers),
    ("`barebones`", "as documented", steps(20, barebones=True, logger=None, enable_checkpointing=None,
     enable_progress_bar=None, enable_model_summary=None, num_sanity_val_steps=None, log_every_n_steps=None)),
    ("`logger`: `CSVLogger`", "steps count optimiser steps; instead of MLflow or beside it", csv_logger),
    ("`logger`: `TensorBoardLogger`", "likewise", tensorboard_logger),
    ("`EarlyStopping`", "as documented, at validations", early_stopping),
    ("`EarlyStopping`, `ModelCheckpoint` on a name that is not logged", "refused before the first step", typo),
    ("`LearningRateMonitor`", "as documented, each step", learning_rates_each_step),
    ("`ModelCheckpoint` of one's own", "as documented, beside the run's checkpoints", own_checkpoints),
    ("`ModelCheckpoint` by time", "refused: `RunCheckpoint` does that", refused("RunCheckpoint with train_time_interval",
     callbacks=[stock.ModelCheckpoint(train_time_interval=timedelta(minutes=1))])),
    ("`RunCheckpoint` (`checkpoint.`) by time", "`train_time_interval`, instead of steps", by_time),
    ("`WeightAveraging`", "as documented; can be resumed", averages(stock.WeightAveraging, mean)),
    ("`EMAWeightAveraging`", "as documented; can be resumed",
     averages(functools.partial(stock.EMAWeightAveraging, decay=0.9), moving)),
    ("`StochasticWeightAveraging`", "refused: use `WeightAveraging`", refused("use WeightAveraging", callbacks=[SWA])),
    ("`BatchSizeFinder`, `LearningRateFinder`, `ModelPruning`", "refused",
     refused("LearningRateFinder sets an attribute", callbacks=[stock.LearningRateFinder()])),
    ("`trainer.validate`, `trainer.test`", "return the metrics", measured_numbers),
    ("`trainer.callback_metrics`", "loss terms of each step, means where training logs, metrics", callback_metrics),
    ("`SAE.load_from_checkpoint`", "the SAE; `member=` names one of a group", loads),
]  # fmt: skip


@pytest.mark.parametrize(("name", "what", "check"), ROWS, ids=[name.replace("`", "") for name, _, _ in ROWS])
def test_row(name, what, check):
    check()


def test_the_table_of_the_docs_is_made_of_these_rows():
    table = "\n".join(["| flag or callback | what it does here |", "|---|---|", *(f"| {n} | {what} |" for n, what, _ in ROWS)])
    text = README.read_text(encoding="utf-8")
    fresh = re.sub(r"(<!-- table -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
    if os.environ.get("HEDGELAB_WRITE_DOCS"):
        README.write_text(fresh, encoding="utf-8")
    assert text == fresh, "run HEDGELAB_WRITE_DOCS=1 python -m pytest tests/training/test_lightning_interface.py -k table"


# -- chunks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TopKSAE, BatchTopKSAE])
def test_numbers_are_the_same_with_chunks_and_without_and_however_often_training_logs(kind):
    clipped = functools.partial(sae, kind, gradient_clip_norm=0.1)
    first = fit(clipped(), stream=data(chunk_steps=1))
    for every in (1, 3, 10):
        other = fit(clipped(), watched=False, log_every_n_steps=every)
        assert same_weights(first.model, other.model)
        assert other.trainer.callback_metrics["val/mse"] == first.trainer.callback_metrics["val/mse"]


@pytest.mark.parametrize(
    ("sees_steps", "flags"),
    [
        (False, {}),
        (True, {"callbacks": [Seen()]}),
        (True, {"profiler": "simple"}),
        (True, {"limit_train_batches": 20}),
        (True, {"val_check_interval": 10}),
        (True, {"precision": "bf16-mixed"}),
        (True, {"fast_dev_run": 20}),
        (True, {"stream": data(chunk_steps=1)}),
    ],
)
def test_several_steps_a_batch_only_where_nobody_looks(sees_steps, flags, monkeypatch):
    sizes = []
    step = TopKSAE.training_step

    def spied(self, batch, index):
        sizes.append(len(batch) if isinstance(batch, list) else 1)
        return step(self, batch, index)

    monkeypatch.setattr(TopKSAE, "training_step", spied)
    spied.__module__ = TopKSAE.__module__
    fit(watched=False, **flags)
    assert sizes == ([1] * 20 if sees_steps else [10, 10])


def test_a_batch_is_a_step_where_a_step_costs_more_than_lightning_does():
    wide = fit(TopKSAE(6, 2**16, k=2), watched=False, max_steps=2, limit_val_batches=0)
    assert wide.trainer.train_dataloader.chunk_steps == 1
    assert fit(watched=False).trainer.train_dataloader.chunk_steps == 10


def test_hooks_come_in_lightnings_order():
    assert fit(max_steps=2).seen.order == ["start", "backward", "step", "end"] * 2


def test_an_hook_of_ones_own_sae_is_called_each_step():
    class Own(TopKSAE):
        calls = 0

        def on_train_batch_end(self, *_):
            self.calls += 1

    own = Own(6, 5, k=2)
    fit(own, watched=False)
    assert own.calls == 20
