"""What a GPU does without waiting to learn which latents fired or died equals what the CPU does with that knowledge."""

import pytest
import torch

import hedgelab as hl
from hedgelab.batch import Batch
from hedgelab.kernels.codes import Codes
from hedgelab.saes import AbsTopKSAE
from hedgelab.saes.dead import AHEAD, LEAST_ROOM, DeadCandidates
from hedgelab.saes.mitigations import LISTA, OrthogonalDecoder

KINDS = {"topk": hl.TopKSAE, "batch_topk": hl.BatchTopKSAE, "abs_topk": AbsTopKSAE}


def sae_with_dead(kind: str, dead: int) -> hl.SAE:
    torch.manual_seed(0)
    sae = KINDS[kind](16, 256, k=4, dead_after_steps=300)
    sae.steps_since_fired[torch.randperm(256)[:dead]] = 301
    return sae


@pytest.mark.parametrize("among", [None, slice(5, 170), torch.arange(0, 256, 2)], ids=["all", "slice", "numbers"])
@pytest.mark.parametrize("dead", [1, 7, 8, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_auxiliary_loss_of_a_fixed_shape(kind, dead, among):
    sae = sae_with_dead(kind, dead)
    x, error = torch.randn(2, 32, 16).unbind()
    weights = [sae.W_enc_rows, sae.b_enc, sae.W_dec]
    found = sae._auxiliary_loss_without_waiting(Batch(x), error, among)
    expected = sae.auxiliary_loss(Batch(x), error, among)
    if expected is None:
        assert found is None or found.item() == 0
        return
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_no_latent_is_dead_no_auxiliary_loss():
    sae = sae_with_dead("topk", 0)
    assert sae._auxiliary_loss_without_waiting(Batch(torch.randn(4, 16)), torch.randn(4, 16), None) is None


def test_candidates_hold_all_that_can_die_until_the_next_look():
    window, clock, candidates = 300, torch.tensor([0, 150, 199, 200, 299, 400]), DeadCandidates()
    looks = 0
    for step in range(1000, 1000 + AHEAD + 1):
        before = candidates._last
        candidates.look(step, clock, window)
        looks += candidates._last != before
        latents, valid = candidates.part(0, 6)
        dead = (clock >= window).nonzero().flatten()
        assert set(dead.tolist()) <= set(latents[valid].tolist())
        clock = clock + 1
    assert looks == 1
    assert latents[valid].tolist() == [3, 4, 5]
    candidates.look(1000 + AHEAD + 1, clock, window)
    assert candidates.part(0, 6)[0][candidates.part(0, 6)[1]].tolist() == [1, 2, 3, 4, 5]


def test_where_none_can_die_the_next_look_is_when_one_could():
    candidates, clock = DeadCandidates(), torch.zeros(4, dtype=torch.int64)
    candidates.look(0, clock, 300)
    assert (candidates._last, len(candidates.part(0, 4)[0])) == (299, 0)


def test_a_fit_that_begins_anew_looks_anew():
    candidates, clock = DeadCandidates(), torch.zeros(4, dtype=torch.int64)
    for step in range(50):
        candidates.look(step, clock, 300)
    candidates.look(0, clock + 50, 300)
    assert candidates._last == 249


def test_room_changes_seldom():
    candidates, clock = DeadCandidates(), torch.zeros(1000, dtype=torch.int64)
    versions = []
    for number, dead in enumerate([1, 30, LEAST_ROOM, LEAST_ROOM + 1, 2 * LEAST_ROOM]):
        clock[:dead] = 500
        candidates.forget()
        candidates.look(number, clock, 300)
        room = len(candidates.part(0, 1000)[0])
        versions.append((candidates.version, room))
    assert [room for _, room in versions] == [LEAST_ROOM] * 3 + [2 * LEAST_ROOM] * 2
    assert versions[0][0] == versions[2][0] != versions[3][0] == versions[4][0]


def test_loaded_clocks_are_looked_at():
    sae, other = sae_with_dead("topk", 0), sae_with_dead("topk", 9)
    sae.step_key(32)
    sae.load_state_dict(other.state_dict())
    assert sae._auxiliary_loss_without_waiting(Batch(torch.randn(4, 16)), torch.randn(4, 16), None) is not None


def step_keys(sae: hl.SAE, steps: int) -> list:
    keys = []
    for step in range(steps):
        sae.steps_done = step
        keys.append(sae.step_key(32))
    return keys


def test_steps_that_differ_in_what_python_knows_have_different_keys():
    assert len({*step_keys(hl.TopKSAE(4, 16, k=2), 5)}) == 1
    assert len({*step_keys(hl.TopKSAE(4, 16, k=2, k_start=8, k_steps=3), 6)}) == 4
    assert len({*step_keys(hl.VanillaSAE(4, 16, l1_coefficient=1.0, l1_warmup_steps=3), 6)}) == 4
    assert len({*step_keys(hl.JumpReLUSAE(4, 16, target_l0=2, l0_warmup_steps=3), 6)}) == 4


@pytest.mark.parametrize(
    "made",
    [
        lambda: hl.MatryoshkaSAE(4, lambda d: hl.TopKSAE(d, 16, k=2), levels=[4, 16], credit=0.5),
        lambda: hl.MatryoshkaSAE(4, lambda d: hl.TopKSAE(d, 16, k=2), levels=[4, 16], adaptive=True),
        lambda: hl.TopKSAE(4, 16, k=2, mitigations=[LISTA()]),
        lambda: hl.TopKSAE(4, 16, k=2, mitigations=[OrthogonalDecoder()]),
    ],
)
def test_what_changes_from_step_to_step_is_never_captured(made):
    assert made().step_key(32) is None


def test_a_selection_too_large_to_have_a_fixed_shape_is_never_captured():
    sae = hl.TopKSAE(4, 16, k=2)
    assert sae.step_key(2**21) is not None
    assert sae.step_key(2**22) is None


def test_codes_split_as_they_part():
    codes = Codes.from_dense(torch.randn(7, 5).relu())
    sparse = Codes.from_csr(*codes.csr(), 5)
    for given in (codes, sparse):
        parts = given.split(3)
        assert [part.batch_size for part in parts] == [3, 3, 1]
        torch.testing.assert_close(torch.cat([part.to_dense() for part in parts]), codes.to_dense())
