"""Selection, initialisation, clocks, thresholds, folding and files of the SAEs."""

import functools
import json

import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.saes import (
    BatchTopKSAE,
    Initialization,
    JumpReLUSAE,
    MatryoshkaSAE,
    TopKSAE,
    VanillaSAE,
    load_sae,
    save_sae,
    weights_sha256,
)
from hedgelab.saes.losses import geometric_median, warmed_up

MAKERS = {
    "vanilla": functools.partial(VanillaSAE, d_sae=16, l1_coefficient=0.1),
    "topk": functools.partial(TopKSAE, d_sae=16, k=3),
    "batch_topk": functools.partial(BatchTopKSAE, d_sae=16, k=3),
    "jumprelu": functools.partial(JumpReLUSAE, d_sae=16, l0_coefficient=0.1),
    "matryoshka": lambda d_in: MatryoshkaSAE(d_in, functools.partial(BatchTopKSAE, d_sae=16, k=3), [4, 16], beta=0.5),
}


def x_batch(count=64, d_in=8, seed=0):
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(seed))


def step(sae, optimizer, x):
    result = sae.loss(Batch(x))
    optimizer.zero_grad()
    result.total.backward()
    sae.before_optimizer_step()
    optimizer.step()
    sae.after_step(result)
    return result


def test_topk_keeps_k_latents_an_example():
    sae = TopKSAE(8, 16, k=3)
    assert (sae.encode(x_batch()).active_per_example() <= 3).all()


def test_batch_topk_keeps_k_on_average_but_not_each():
    codes = BatchTopKSAE(8, 16, k=3).activate(Batch(x_batch())).codes
    active = codes.active_per_example()
    assert active.sum() == 3 * 64
    assert active.float().std() > 0


def test_batch_topk_population_keeps_k_on_average():
    weight = torch.rand(64, generator=torch.Generator().manual_seed(1))
    weight /= weight.sum()
    codes = BatchTopKSAE(8, 16, k=3).activate(Batch(x_batch(), weight=weight)).codes
    expected_l0 = (codes.active_per_example() * weight).sum()
    assert 3 - weight.max() <= expected_l0 <= 3 + 1e-5


def test_batch_topk_threshold_follows_the_smallest_kept_activation():
    sae = BatchTopKSAE(8, 16, k=3)
    assert sae.threshold.isnan()
    smallest = []
    for seed in range(3):
        result = sae.loss(Batch(x_batch(seed=seed)))
        kept = result.codes.to_dense()
        smallest.append(kept[kept > 0].min())
        sae.after_step(result)
    average = smallest[0].lerp(smallest[1], 0.01).lerp(smallest[2], 0.01)
    torch.testing.assert_close(sae.threshold, average.detach())
    dense = sae.encode(x_batch()).to_dense()
    assert (dense[dense > 0] > sae.threshold).all()


def test_norm_aware_selection_follows_decoder_norms():
    sae = TopKSAE(8, 16, k=1, norm_aware_selection=True)
    with torch.no_grad():
        sae.W_dec[5] *= 1000
    codes = sae.encode(x_batch()).to_dense()
    favoured = ((x_batch() @ sae.W_enc)[:, 5] > 0).sum()
    assert (codes[:, 5] > 0).sum() == favoured


def test_dead_latents_are_counted_in_steps_and_revived_by_firing():
    sae = TopKSAE(8, 16, k=1, dead_after_steps=2)
    with torch.no_grad():
        sae.b_enc[0] = -100.0
    for expected in (False, True):
        sae.after_step(sae.loss(Batch(x_batch())))
        assert sae.dead_latents[0] == expected
    with torch.no_grad():
        sae.b_enc[0] = 100.0
    sae.after_step(sae.loss(Batch(x_batch())))
    assert not sae.dead_latents[0]


def test_auxiliary_loss_revives_dead_latents():
    """Latents that start far below the selection come back with the auxiliary loss, and many stay dead without it."""
    alive = {}
    for coefficient in (0.0, 1.0):
        sae = TopKSAE(8, 32, k=2, dead_after_steps=20, auxiliary_coefficient=coefficient)
        with torch.no_grad():
            sae.b_enc[8:] -= 2.5
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        for index in range(300):
            sae.steps_done = index
            step(sae, optimizer, x_batch(seed=index))
        alive[coefficient] = 32 - int(sae.dead_latents.sum())
    assert alive[1.0] >= 30
    assert alive[0.0] <= 25


@pytest.mark.parametrize("kind", ["mean", "geometric_median"])
def test_b_dec_starts_at_the_first_batch(kind):
    x = x_batch() + 5
    sae = VanillaSAE(8, 16, 0.1, init=Initialization(b_dec=kind))
    sae.initialize(Batch(x), None)
    expected = x.mean(0) if kind == "mean" else geometric_median(x)
    torch.testing.assert_close(sae.b_dec.detach(), expected)


def test_geometric_median_resists_outliers_and_is_stationary():
    x = torch.cat([x_batch(99), torch.full((1, 8), 1e6)])
    median = geometric_median(x).double()
    assert median.norm() < 1
    pull = torch.nn.functional.normalize(x.double() - median, dim=1).sum(0)
    assert pull.norm() < 1e-2


def test_weights_start_at_the_features_plus_noise():
    features = torch.eye(8)[:4]
    sae = VanillaSAE(8, 3, 0.1, init=Initialization(at_features=True, noise=0.25, encoder="random"))
    sae.initialize(Batch(x_batch()), features)
    noise = torch.stack([sae.W_dec.detach() - features[:3], sae.W_enc.detach().t() - features[:3]])
    assert 0.1 < noise.std() < 0.4
    assert not torch.equal(noise[0], noise[1])
    clean = VanillaSAE(8, 3, 0.1, init=Initialization(at_features=True))
    clean.initialize(Batch(x_batch()), features)
    torch.testing.assert_close(clean.W_dec.detach(), features[:3])


def test_seeds_decide_the_weights():
    def weights(seed):
        return VanillaSAE(8, 16, 0.1, init=Initialization(seed=seed)).W_dec

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_random_decoder_rows_have_the_chosen_norm_and_encoders_their_transpose():
    sae = VanillaSAE(8, 16, 0.1, init=Initialization(decoder_norm=0.1))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((16,), 0.1))
    assert torch.equal(sae.W_enc.t(), sae.W_dec)
    other = VanillaSAE(8, 16, 0.1, init=Initialization(encoder="random"))
    assert not torch.equal(other.W_enc.t(), other.W_dec)


@pytest.mark.parametrize("name", ["vanilla", "jumprelu", "topk"])
def test_folding_keeps_the_reconstruction(name):
    extra = {"norm_aware_selection": True} if name == "topk" else {}
    sae = MAKERS[name](8, init=Initialization(encoder="random"), **extra)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(16, 1) + 0.5)
    folded = sae.folded()
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(16))
    x = x_batch()
    pre = (x - folded.b_dec) @ folded.W_enc + folded.b_enc
    if name == "topk":
        kept = torch.zeros_like(pre).scatter(1, pre.topk(3).indices, 1.0)
        a = pre.relu() * kept
    else:
        a = pre * (pre > (sae.theta * folded.norms if name == "jumprelu" else 0))
    torch.testing.assert_close(a @ folded.W_dec + folded.b_dec, sae(x), rtol=1e-4, atol=1e-5)


def test_normalize_decoder_keeps_rows_at_norm_one():
    sae = TopKSAE(8, 16, k=3, normalize_decoder=True)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(3):
        step(sae, optimizer, x_batch())
        along = (sae.W_dec.grad * sae.W_dec).sum(1)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(16))
    assert along.abs().max() < 0.1 * sae.W_dec.grad.norm(dim=1).max()


@pytest.mark.parametrize("name", MAKERS)
def test_saved_saes_come_back_the_same(name, tmp_path):
    sae = MAKERS[name](8)
    step(sae, torch.optim.Adam(sae.parameters()), x_batch())
    save_sae(sae, tmp_path / "a")
    loaded = load_sae(tmp_path / "a")
    assert loaded.config() == sae.config()
    assert torch.equal(loaded(x_batch()), sae(x_batch()))
    save_sae(loaded, tmp_path / "b")
    assert weights_sha256(tmp_path / "a") == weights_sha256(tmp_path / "b")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "sae.json").unlink(), "sae.json"),
        (lambda f: (f / "sae.safetensors").write_bytes(b"junk"), "damaged"),
        (lambda f: (f / "sae.json").write_text("{"), "damaged"),
        (lambda f: (f / "sae.json").write_text('{"class": "os.system", "d_in": 8, "d_sae": 16}'), "class"),
        (lambda f: (f / "sae.json").write_text(json.dumps({"class": "TopKSAE", "d_in": 8})), "d_sae"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(damage, says, tmp_path):
    save_sae(TopKSAE(8, 16, k=3), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        load_sae(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: VanillaSAE(8, 0, 0.1), "model.d_sae"),
        (lambda: VanillaSAE(8, 16, -0.1), "model.l1_coefficient"),
        (lambda: VanillaSAE(8, 16, 0.1, gradient_clip_norm=0), "model.gradient_clip_norm"),
        (lambda: TopKSAE(8, 16, k=0), "model.k"),
        (lambda: TopKSAE(8, 16, k=17), "model.k"),
        (lambda: TopKSAE(8, 16, k=2, dead_after_steps=0), "model.dead_after_steps"),
        (lambda: TopKSAE(8, 16, k=2, auxiliary_coefficient=-1), "model.auxiliary_coefficient"),
        (lambda: JumpReLUSAE(8, 16, 0.1, bandwidth=0), "model.bandwidth"),
        (lambda: JumpReLUSAE(8, 16, 0.1, threshold=0), "model.threshold"),
        (lambda: Initialization(decoder_norm=0), "model.init.decoder_norm"),
        (lambda: Initialization(noise=0.1), "model.init.noise"),
        (lambda: MatryoshkaSAE(8, MAKERS["topk"], []), "model.levels"),
        (lambda: MatryoshkaSAE(8, MAKERS["topk"], [8, 4, 16]), "model.levels"),
        (lambda: MatryoshkaSAE(8, MAKERS["topk"], [4, 8]), "model.levels"),
        (lambda: MatryoshkaSAE(8, MAKERS["topk"], [4, 16], beta=-1), "model.beta"),
        (lambda: MatryoshkaSAE(8, MAKERS["topk"], [4, 16], beta=0.5, detached=True), "model.beta"),
    ],
)
def test_impossible_arguments_name_their_key(make, key):
    with pytest.raises(UserError, match=key):
        make()


def test_at_features_needs_known_features():
    sae = VanillaSAE(8, 2, 0.1, init=Initialization(at_features=True))
    with pytest.raises(UserError, match="at_features"):
        sae.initialize(Batch(x_batch()), None)


def test_warmup_is_linear_and_may_start_above_zero():
    assert [warmed_up(1.0, s, 10) for s in (0, 5, 10, 20)] == [0.0, 0.5, 1.0, 1.0]
    assert warmed_up(20.0, 0, 10, start=10.0) == 10.0
    sae = VanillaSAE(8, 16, l1_coefficient=2.0, l1_warmup_steps=4)
    costs = []
    for done in range(6):
        sae.steps_done = done
        costs.append(sae.loss(Batch(x_batch())).terms["l1"].item())
    assert costs[0] == 0
    assert costs[2] == pytest.approx(costs[4] / 2)
    assert costs[5] == costs[4]


def test_encoder_memory_is_its_transpose():
    sae = TopKSAE(8, 16, k=3)
    assert sae.W_enc.shape == (8, 16)
    assert sae.W_enc.stride() == (1, 8)
