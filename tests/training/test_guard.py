"""NaN and infinity: the run stops with the step, the term and the batch, or passes over the batch and counts it."""

import functools
import logging

import lightning as L
import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.data.toy import ConditionalFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.saes import BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, SAEGroup, TopKSAE, VanillaSAE
from hedgelab.training.checkpoints import LAST, RunCheckpoint, newest_whole
from hedgelab.training.guard import FiniteGuard
from tests.saes.comparison import same_weights

pytestmark = pytest.mark.filterwarnings("ignore")
SGD = functools.partial(torch.optim.SGD, lr=0.01)
MAKERS = {
    "vanilla": functools.partial(VanillaSAE, 6, 4, 0.01),
    "topk": functools.partial(TopKSAE, 6, 4, k=2, dead_after_steps=3),
    "batch_topk": functools.partial(BatchTopKSAE, 6, 4, k=2, dead_after_steps=3),
    "jumprelu": functools.partial(JumpReLUSAE, 6, 4, l0_coefficient=0.01),
    "matryoshka": lambda **kw: MatryoshkaSAE(6, functools.partial(BatchTopKSAE, d_sae=4, k=2, **kw), [1, 4]),
}


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Spoiled(ToyDataModule):
    """Batches of which some hold what they should not."""

    def __init__(self, bad, val=1, **kwargs):
        super().__init__(ConditionalFiring([0.3, 0.2, 0.4]), d_in=6, batch_size=8, seed=0, val_batches=val, **kwargs)
        self.bad = bad

    def batch(self, stage, index):
        batch = super().batch(stage, index)
        if stage == "train" and index in self.bad:
            x = batch.x.clone()
            x[3, 2] = self.bad[index]
            return Batch(x, batch.features, batch.weight)
        return batch


class SpoiledValidation(Spoiled):
    """Validation batches of which some hold what they should not."""

    def batch(self, stage, index):
        batch = ToyDataModule.batch(self, stage, index)
        if stage == "val" and index in self.bad:
            return Batch(batch.x * self.bad[index], batch.features, batch.weight)
        return batch


class Reports(L.Callback):
    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, *_):
        self.seen[trainer.global_step] = {key: float(value) for key, value in trainer.callback_metrics.items()}


def fit(model, bad=None, guard=None, folder=None, steps=40, chunk=5, every=10, checkpoint=None, data=Spoiled, **more):
    reports = Reports()
    saving = [RunCheckpoint(dirpath=str(folder), save_last=True, save_top_k=0, every_n_train_steps=every)] if folder else []
    trainer = L.Trainer(
        max_steps=steps,
        log_every_n_steps=20,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(folder),
        num_sanity_val_steps=0,
        callbacks=[*([FiniteGuard(guard)] if guard else []), reports, *saving],
    )
    trainer.fit(model, datamodule=data(bad or {}, chunk_steps=chunk, **more), ckpt_path=checkpoint)
    assert trainer.global_step == steps
    return reports.seen


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_bad_batch_stops_the_run_and_is_named(kind, value, tmp_path):
    said = r"model: loss term '[\w/]+'.* is NaN or infinite at step 28 \(batch 27 of stage train"
    with pytest.raises(UserError, match=said) as error:
        fit(MAKERS[kind](optimizer=SGD), {27: value}, folder=tmp_path)
    found = "holds 1 activations" if abs(value) != 3e38 else "activations are all finite"
    assert found in str(error.value)
    kept = torch.load(newest_whole(tmp_path), weights_only=True)
    assert kept["global_step"] == 20
    assert all(torch.isfinite(value).all() for value in kept["state_dict"].values())


def test_weights_that_overflow_without_a_bad_batch(tmp_path):
    huge = functools.partial(torch.optim.SGD, lr=1e38)
    with pytest.raises(UserError, match=r"model.*(NaN or inf).*(activations are all finite|learning rate)"):
        fit(VanillaSAE(6, 4, 0.01, optimizer=huge), folder=tmp_path, every=1000)
    assert not (tmp_path / LAST).exists()


def test_weights_that_overflow_in_the_last_step(tmp_path):
    class Breaks(VanillaSAE):
        def after_step(self, result):
            if self.steps_done == 39:
                self.W_dec.data[0, 0] = float("inf")

    with pytest.raises(UserError, match=r"model\.W_dec: holds NaN or infinity after step 40; the checkpoint before it is kept"):
        fit(Breaks(6, 4, 0.01, optimizer=SGD), folder=tmp_path)
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 30


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("lr", [1e38, 3e20])
def test_weights_that_overflow_are_not_taken_for_bad_batches(lr, grouped):
    """Skipping would pass over every batch to the end of the run."""
    model = VanillaSAE(6, 4, 0.01, optimizer=functools.partial(torch.optim.SGD, lr=lr))
    with pytest.raises(UserError, match=r"holds NaN or infinity after step \d|losses of 100 batches in a row"):
        fit(SAEGroup({"a": model, "b": MAKERS["topk"]()}) if grouped else model, guard="skip", steps=200)


def test_weights_that_turn_nan_end_a_run_that_skips():
    class Breaks(VanillaSAE):
        def after_step(self, result):
            if self.steps_done == 7:
                self.b_enc.data[1] = float("nan")

    with pytest.raises(UserError, match=r"model\.b_enc: holds NaN or infinity after step 8"):
        fit(Breaks(6, 4, 0.01, optimizer=SGD), guard="skip")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_validation_data_stops_the_run_or_is_left_out(value, grouped, caplog):
    def make():
        return SAEGroup({"a": MAKERS["topk"]()}) if grouped else MAKERS["topk"]()

    with pytest.raises(UserError, match=r"data: 1 of 3 batches of stage val hold .*guard\.on_nonfinite=skip"):
        fit(make(), {1: value}, "stop", data=SpoiledValidation, val=3)
    seen = fit(make(), {1: value}, "skip", data=SpoiledValidation, val=3)
    assert all(torch.isfinite(torch.tensor(list(values.values()))).all() for values in seen.values())
    with pytest.raises(UserError, match=r"data: 3 of 3 batches of stage val"):
        fit(make(), dict.fromkeys(range(3), value), "skip", data=SpoiledValidation, val=3)


@pytest.mark.parametrize("kind", MAKERS)
def test_skipped_batches_leave_no_trace_but_a_count(kind):
    model = MAKERS[kind](optimizer=SGD)
    seen = fit(model, {0: float("inf")} | {index: float("nan") for index in (3, 4, 5, 22)}, "skip")
    assert seen[20]["train/skipped_batches"] == 4
    assert seen[40]["train/skipped_batches"] == 5
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert all(torch.isfinite(torch.tensor(list(values.values()))).all() for values in seen.values())


def test_a_skipped_step_moves_no_weight_whatever_the_optimiser():
    adam = functools.partial(torch.optim.Adam, lr=0.01)

    class Watched(TopKSAE):
        def loss(self, batch):
            weights = [parameter.detach().clone() for parameter in self.parameters()]
            self.kept = {**getattr(self, "kept", {}), self.steps_done: weights}
            return super().loss(batch)

    model = Watched(6, 4, k=2, optimizer=adam)
    seen = fit(model, {index: float("nan") for index in range(10, 20)}, "skip")
    assert seen[40]["train/skipped_batches"] == 10
    moved = [
        step
        for step in range(39)
        if not all(torch.equal(a, b) for a, b in zip(model.kept[step], model.kept[step + 1], strict=True))
    ]
    assert moved == [step for step in range(39) if not 10 <= step < 20]


def test_skipping_without_bad_batches_changes_nothing():
    first, second = MAKERS["topk"](), MAKERS["topk"]()
    plain, guarded = fit(first), fit(second, guard="skip")
    assert same_weights(first, second)
    assert guarded[40] == plain[40] | {"train/skipped_batches": 0.0}


def test_an_interval_of_nothing_but_bad_batches():
    seen = fit(MAKERS["topk"](), {index: float("nan") for index in range(20, 40)}, "skip")
    assert seen[40]["train/skipped_batches"] == 20


def test_the_count_goes_on_after_a_resume(tmp_path):
    bad = {index: float("nan") for index in (2, 13, 31)}
    fit(MAKERS["topk"](), bad, "skip", tmp_path, steps=20)
    model = MAKERS["topk"]()
    seen = fit(model, bad, "skip", tmp_path, checkpoint=str(tmp_path / LAST))
    assert seen[40]["train/skipped_batches"] == 3
    whole = MAKERS["topk"]()
    fit(whole, bad, "skip")
    assert same_weights(whole, model)


class Fragile(VanillaSAE):
    """Its loss is NaN at one step."""

    def loss(self, batch):
        result = super().loss(batch)
        if self.steps_done == 17:
            result.terms["mse"] = result.terms["mse"] * float("nan")
        return result


def test_a_group_names_the_member(tmp_path):
    group = SAEGroup({"sound": MAKERS["topk"](), "frail": Fragile(6, 4, 0.01)})
    with pytest.raises(UserError, match=r"loss term 'mse' of member 'frail' is NaN or infinite at step 18 \(batch 17"):
        fit(group, folder=tmp_path)
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 10


def test_a_group_passes_over_a_batch_for_the_member_it_hurts_only():
    alone = MAKERS["topk"]()
    fit(alone)
    group = SAEGroup({"sound": MAKERS["topk"](), "frail": Fragile(6, 4, 0.01)})
    seen = fit(group, guard="skip")
    assert same_weights(alone, group.saes()["sound"])
    assert (seen[40]["frail/train/skipped_batches"], seen[40]["sound/train/skipped_batches"]) == (1, 0)
    assert all(torch.isfinite(value).all() for value in group.state_dict().values())
