"""k that goes from ``k_start`` to ``k`` in training: what each kind keeps, and what inference does."""

import functools

import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.kernels import ops
from hedgelab.saes import BatchTopKSAE, Initialization, MatryoshkaSAE, TopKSAE
from hedgelab.saes.abs_topk import AbsTopKSAE

SCHEDULE = {"k": 4, "k_start": 9.0, "k_steps": 10, "init": Initialization(seed=0)}


def batch(rows=40):
    return Batch(torch.randn(rows, 16, generator=torch.Generator().manual_seed(0)))


def kept(sae, step):
    sae.steps_done = step
    return int(sae.activate(batch()).codes.active_per_example().sum())


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("kind", [TopKSAE, BatchTopKSAE, AbsTopKSAE])
def test_training_keeps_as_many_as_the_schedule_says_and_inference_k(kind, path):
    sae = kind(16, 64, **SCHEDULE)
    expected = {0: 9.0, 1: 8.5, 5: 6.5, 9: 4.5, 10: 4.0, 99: 4.0}
    with ops.backend(path):
        for step, k in expected.items():
            k_now = k if kind is BatchTopKSAE else round(k)
            assert kept(sae, step) == round(40 * k_now)
            assert sae.training_numbers() == {"current_k": k}
        sae.steps_done = 0
        if kind is not BatchTopKSAE:
            assert (sae.encode(batch().x).active_per_example() == 4).all()


def test_k_may_rise_and_fractions_are_of_the_batch():
    sae = BatchTopKSAE(16, 64, k=4, k_start=1.5, k_steps=4)
    assert [kept(sae, step) for step in range(5)] == [60, 85, 110, 135, 160]  # 40 rows: 1.5, 2.125, 2.75, …


def test_without_a_schedule_there_is_nothing_to_log():
    assert TopKSAE(16, 64, k=4).training_numbers() == {}


def test_levels_share_the_schedule_and_thresholds_follow_it():
    """A smaller k keeps larger activations, so the threshold of inference rises with a falling k."""
    sae = MatryoshkaSAE(16, functools.partial(BatchTopKSAE, d_sae=64, **SCHEDULE), [8, 64])
    terms = sae.loss(batch())
    sae.after_step(terms)
    early = float(sae.inner.threshold)
    assert terms.codes.active_per_example().sum() == 360
    sae.steps_done = 10
    for _ in range(1000):
        sae.after_step(terms := sae.loss(batch()))
    assert terms.codes.active_per_example().sum() == 160
    assert float(sae.inner.threshold) > early
    assert float(sae.encode(batch().x).active_per_example().double().mean()) == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"k_start": 9}, "model.k_start: .* give both or neither"),
        ({"k_steps": 9}, "model.k_start: .* give both or neither"),
        ({"k_start": 65, "k_steps": 9}, "model.k_start: must lie between 1 and d_sae = 64, got 65"),
        ({"k_start": 9, "k_steps": 0}, "model.k_steps: expected a whole number of at least 1, got 0"),
    ],
)
def test_a_schedule_needs_both_ends(arguments, said):
    with pytest.raises(UserError, match=said):
        TopKSAE(16, 64, k=4, **arguments)
