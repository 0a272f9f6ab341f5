"""The part of a stream that belongs to a phase: its place, its other order, the same wherever it starts."""

import lightning as L
import pytest
import torch

from hedgelab.data.toy import IndependentFiring, ToyDataModule
from hedgelab.protocols import phase_data
from hedgelab.protocols.phase_data import PhaseData

STEPS = 10


@pytest.fixture
def toy():
    return ToyDataModule(IndependentFiring([0.3] * 4), d_in=6, batch_size=8, val_batches=2, seed=3)


@pytest.fixture(params=[10, 4], ids=["one window", "three windows"])
def phase(request, toy, monkeypatch):
    monkeypatch.setattr(phase_data, "_WINDOW_BYTES", request.param * 4 * 8 * 6)
    made = PhaseData(toy, 20, STEPS, ["late", "later"])
    assert made.window == request.param
    return made


def test_phase_begins_at_its_place_in_the_stream(toy):
    phase = PhaseData(toy, 20, STEPS)
    expected = [toy.batch("train", 20 + index).x for index in range(STEPS)]
    assert all(torch.equal(batch.x, x) for batch, x in zip(phase.batches("train", 0, STEPS), expected, strict=True))
    assert torch.equal(phase.batch("train", 3).x, expected[3])
    assert torch.equal(phase.batch("val", 1).x, toy.batch("val", 1).x)
    assert torch.equal(next(phase.batches("val", 1, 2)).x, toy.batch("val", 1).x)


def test_reordered_members_see_the_same_batches_in_another_order(toy, phase):
    served = list(phase.batches("train", 0, STEPS))
    shared = [batch.of("control").x for batch in served]
    own = [batch.of("late").x for batch in served]
    assert all(torch.equal(x, toy.batch("train", 20 + index).x) for index, x in enumerate(shared))
    places = [next(i for i, x in enumerate(shared) if torch.equal(x, other)) for other in own]
    assert sorted(places) == list(range(STEPS))
    assert places != list(range(STEPS))
    assert all(batch.of("later") is batch.of("late") for batch in served)


def test_order_does_not_depend_on_where_training_starts(phase):
    whole = list(phase.batches("train", 0, STEPS))
    for start in (1, 4, 7):
        rest = phase.batches("train", start, STEPS)
        for served, expected in zip(rest, whole[start:], strict=True):
            assert torch.equal(served.x, expected.x)
            assert torch.equal(served.of("late").x, expected.of("late").x)


def test_trainers_stream_ends_with_the_phase(phase):
    phase.trainer = L.Trainer(max_steps=STEPS, logger=False, enable_checkpointing=False, accelerator="cpu")
    assert sum(len(chunk) for chunk in phase.train_dataloader()) == STEPS
