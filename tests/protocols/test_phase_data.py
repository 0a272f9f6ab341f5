"""The part of a stream that belongs to a phase: its place, its other order, the same wherever it starts."""

import lightning as L
import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import IndependentFiring, ToyDataModule
from hedgelab.protocols import phase_data
from hedgelab.protocols.phase_data import PhaseData

STEPS = 10


def seen(batches, name):
    """What a member sees of the batches of one step."""
    return batches.own.get(name, batches.shared)


class Blocks(ActivationDataModule):
    """Batches that hold their own number, made in blocks of five; remembers which were made."""

    d_in = 1

    def __init__(self):
        super().__init__(batch_size=1, seed=3)
        self.made = []

    def batch(self, stage, index):
        self.made.append(index)
        return Batch(torch.tensor([[float(index)]]))

    def batches_per_block(self, stage):
        return 5


@pytest.fixture
def toy():
    return ToyDataModule(IndependentFiring([0.3] * 4), d_in=6, batch_size=8, val_batches=2, seed=3)


@pytest.fixture(params=[2**30, 0], ids=["held", "made twice"])
def phase(request, toy, monkeypatch):
    monkeypatch.setattr(phase_data, "_HELD_BYTES", request.param)
    return PhaseData(toy, 20, STEPS, ["late", "later"])


@pytest.mark.parametrize(("start", "steps"), [(0, 200), (203, 200), (7, 20_001)])
def test_the_other_order_is_of_the_same_kind_at_every_scale(start, steps):
    order = torch.tensor(PhaseData(Blocks(), start, steps, ["late"]).order)
    assert order.sort().values.tolist() == list(range(steps))
    moved = (order - torch.arange(steps)).abs().double().mean() / steps
    assert 0.23 < moved < 0.43  # a uniformly random order: 1/3
    blocks = (order + start) // 5
    assert (blocks[1:] != blocks[:-1]).sum() == len(blocks.unique()) - 1  # each block is made once in this order too
    assert PhaseData(Blocks(), start, steps).order == order.tolist()


def test_both_orders_are_read_block_by_block_and_nothing_is_held(monkeypatch):
    monkeypatch.setattr(phase_data, "_HELD_BYTES", 0)
    data = Blocks()
    phase = PhaseData(data, 3, 100, ["late"])
    stream = phase.batches("train", 90, 100)
    next(stream)
    assert len(data.made) == 2
    assert [int(seen(batch, "late").x) for batch in stream] == [3 + number for number in phase.order[91:]]


def test_one_member_alone_sees_its_own_order(toy, phase):
    served = list(phase.batches("train", 0, STEPS))
    for name in ("control", "late"):
        alone = list(phase.renamed({name: ""}).batches("train", 2, STEPS))
        assert all(torch.equal(batch.x, seen(one, name).x) for batch, one in zip(alone, served[2:], strict=True))
        assert torch.equal(phase.renamed({name: ""}).batch("train", 4).x, seen(served[4], name).x)
    assert torch.equal(phase.renamed({"late": ""}).batch("val", 1).x, toy.batch("val", 1).x)


def test_phase_begins_at_its_place_in_the_stream(toy):
    phase = PhaseData(toy, 20, STEPS)
    expected = [toy.batch("train", 20 + index).x for index in range(STEPS)]
    assert all(torch.equal(batch.x, x) for batch, x in zip(phase.batches("train", 0, STEPS), expected, strict=True))
    assert torch.equal(phase.batch("train", 3).x, expected[3])
    assert torch.equal(phase.batch("val", 1).x, toy.batch("val", 1).x)
    assert torch.equal(next(phase.batches("val", 1, 2)).x, toy.batch("val", 1).x)


def test_reordered_members_see_the_same_batches_in_another_order(toy, phase):
    served = list(phase.batches("train", 0, STEPS))
    shared = [seen(batch, "control").x for batch in served]
    own = [seen(batch, "late").x for batch in served]
    assert all(torch.equal(x, toy.batch("train", 20 + index).x) for index, x in enumerate(shared))
    places = [next(i for i, x in enumerate(shared) if torch.equal(x, other)) for other in own]
    assert sorted(places) == list(range(STEPS))
    assert places != list(range(STEPS))
    assert all(seen(batch, "later") is seen(batch, "late") for batch in served)


def test_order_does_not_depend_on_where_training_starts(phase):
    whole = list(phase.batches("train", 0, STEPS))
    for start in (1, 4, 7):
        rest = phase.batches("train", start, STEPS)
        for served, expected in zip(rest, whole[start:], strict=True):
            assert torch.equal(served.x, expected.x)
            assert torch.equal(seen(served, "late").x, seen(expected, "late").x)


def test_trainers_stream_ends_with_the_phase(phase):
    phase.trainer = L.Trainer(max_steps=STEPS, logger=False, enable_checkpointing=False, accelerator="cpu")
    assert len(list(phase.train_dataloader())) == STEPS
