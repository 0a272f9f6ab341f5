"""What each mitigation keeps from step to step, what it refuses, and the sign of what it is for."""

import math

import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.data.toy import IndependentFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.interop.saelens import export_saelens
from hedgelab.kernels import ops
from hedgelab.kernels.values import Threshold
from hedgelab.saes import BatchTopKSAE, Initialization, JumpReLUSAE, MatryoshkaSAE, TopKSAE, load_sae
from hedgelab.saes.mitigations import LISTA, DetachedInnerLevels, RandomPrefixes, SortedLatents, TiltedLoss
from hedgelab.saes.widen import widen
from tests.saes.comparison import same_weights

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def matryoshka(*mitigations, levels=(4, 16), inner=TopKSAE, **more):
    return MatryoshkaSAE(8, inner(8, 16, k=3), list(levels), mitigations=list(mitigations), **more)


@pytest.mark.parametrize("norm_aware", [False, True])
def test_each_pass_of_lista_has_a_threshold_of_its_own(norm_aware):
    sae = BatchTopKSAE(8, 16, k=3, norm_aware_selection=norm_aware, mitigations=[LISTA(eta=0.3, steps=2)])
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.5, 2, 16)[:, None]
    lista, norms = sae.mitigations[0], sae.W_dec.norm(dim=1) if norm_aware else torch.ones(16)
    assert lista.thresholds.isnan().all()
    seen, smallest = X, []
    for _ in range(3):
        ranked = (((seen - sae.b_dec) @ sae.W_enc + sae.b_enc) * norms).detach()
        kept = ranked.where(ranked >= ranked.flatten().sort(descending=True).values[3 * 64 - 1], torch.zeros(()))
        smallest.append(kept[kept > 0].min())
        seen = seen + 0.3 * (X - (kept / norms) @ sae.W_dec - sae.b_dec).detach()
    result = sae.loss(X)
    sae.after_step(result)
    torch.testing.assert_close(torch.cat([lista.thresholds, sae.threshold[None]]), torch.stack(smallest))
    lista.thresholds.mul_(2)
    before = lista.thresholds.clone()
    sae.loss(X)
    sae.after_step(result)
    torch.testing.assert_close(lista.thresholds, 0.99 * before + 0.01 * torch.stack(smallest[:2]))

    seen = X
    for threshold in lista.thresholds:
        codes = ops.encode(seen, sae.encoder(), Threshold(threshold / norms))
        seen = seen + 0.3 * (X - sae.decode(codes))
    wanted = ops.encode(seen, sae.encoder(), Threshold(sae.threshold / norms))
    torch.testing.assert_close(sae.encode(X).to_dense(), wanted.to_dense())
    torch.testing.assert_close(sae.encode(X.view(4, 16, 8)).to_dense(), wanted.to_dense().view(4, 16, 16))


def test_lista_of_a_jumprelu_sae_takes_its_thresholds_in_every_pass():
    sae = JumpReLUSAE(8, 16, l0_coefficient=0.1, threshold=0.4, mitigations=[LISTA()])
    torch.testing.assert_close(sae.encode(X).to_dense(), sae.loss(X).codes.to_dense())
    sae.after_step(sae.loss(X))
    assert sae.mitigations[0].thresholds.isnan().all()


def test_lista_explains_overlapping_features_better():
    """Two features at cosine .8: a pass of the transposed dictionary excites both; passes converge on the one that fires."""
    rows = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    errors = []
    for steps in (0, 1, 4):
        sae = TopKSAE(2, 2, k=2, mitigations=[LISTA(eta=0.5, steps=steps)] if steps else None)
        with torch.no_grad():
            sae.W_enc, sae.W_dec.data = rows.T, rows.clone()
        errors.append(sae.loss(rows).total.item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_sorted_latents_follow_firing_rates():
    sae = matryoshka(SortedLatents(decay=0.75))
    assert sae.latent_order().tolist() == list(range(16))  # before anything fired
    assert matryoshka().latent_order() is None
    rates = torch.zeros(16, dtype=torch.float64)
    for _ in range(2):
        result = sae.loss(X)
        sae.after_step(result)
        rates = 0.75 * rates + 0.25 * (result.codes.to_dense() > 0).double().mean(0)
    torch.testing.assert_close(sae.mitigations[0].rates, rates, rtol=1e-12, atol=0)
    ordered = rates[sae.latent_order()]
    assert (ordered.diff() <= 0).all()
    assert set(sae.loss(X).terms) == {"mse/level4", "mse/level16"}


def test_sorted_latents_bring_frequent_features_inward():
    """Latents start at the features, the rare ones first: without sorting the rare ones stay the inner level."""
    toy = ToyDataModule(IndependentFiring([0.02] * 4 + [0.4] * 4), d_in=8, batch_size=128)
    outcomes = {}
    for kinds in ((), (SortedLatents,)):
        init = Initialization(at_features=True)
        inner = TopKSAE(8, 8, k=4, init=init)
        sae = MatryoshkaSAE(8, inner, [4, 8], mitigations=[kind() for kind in kinds])
        sae.initialize(toy.batch("train", 0), toy.feature_directions)
        inner.b_enc.data -= 0.05  # so that rounding makes no latent fire
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
        for step in range(40):
            terms = sae.loss(toy.batch("train", step))
            terms.total.backward()
            optimizer.step()
            optimizer.zero_grad()
            sae.after_step(terms)
        outcomes[kinds] = terms.terms["mse/level4"].item()
        inner_level = list(range(4)) if sae.latent_order() is None else sae.latent_order()[:4].tolist()
        assert sorted(inner_level) == ([4, 5, 6, 7] if kinds else [0, 1, 2, 3])
    assert outcomes[SortedLatents,] < outcomes[()] / 3


def test_dead_latents_of_sorted_levels_are_revived_for_the_error_of_their_level():
    sae = MatryoshkaSAE(8, TopKSAE(8, 16, k=3, dead_after_steps=1), [8, 16], auxiliary_per_level=True,
                        mitigations=[SortedLatents()])  # fmt: skip
    sae.mitigations[0].rates[8:] = 1.0
    sae.inner.steps_since_fired[:2] = 1
    assert {name for name in sae.loss(X).terms if name.startswith("aux")} == {"auxiliary/level16"}
    sae.mitigations[0].rates[:2] = 2.0
    assert {name for name in sae.loss(X).terms if name.startswith("aux")} == {"auxiliary/level8"}


def test_random_prefixes_are_a_function_of_seed_and_step():
    drawn = RandomPrefixes(smallest=4, seed=1)
    sizes = [drawn.sizes(step, 3, 1024) for step in range(400)]
    assert sizes == [RandomPrefixes(smallest=4, seed=1).sizes(step, 3, 1024) for step in range(400)]
    assert sizes != [RandomPrefixes(smallest=4, seed=2).sizes(step, 3, 1024) for step in range(400)]
    assert all(4 <= a < b < c == 1024 for a, b, c in sizes)
    logs = torch.tensor([[math.log(a), math.log(b)] for a, b, _ in sizes]).double()
    middle, width = math.log(4096) / 2, math.log(256)
    assert logs.mean().item() == pytest.approx(middle, abs=3 * width / math.sqrt(12 * 800) + 0.05)
    assert logs.std().item() == pytest.approx(width / math.sqrt(12), rel=0.1)
    tight = RandomPrefixes(smallest=2, seed=0)
    assert {tuple(tight.sizes(step, 3, 4)) for step in range(50)} == {(2, 3, 4)}


def test_random_prefixes_name_terms_by_position():
    sae = matryoshka(RandomPrefixes(), levels=(2, 4, 16), beta=0.5)
    assert sae.mitigations[0].smallest == 2
    seen = set()
    for step in range(5):
        sae.steps_done = step
        result = sae.loss(X)
        seen.add(result.terms["mse/level1"].item())
        assert list(result.terms) == ["mse/level1", "mse/level2", "mse/level3"]
    assert len(seen) > 1


def test_tilted_loss_weighs_the_worst_examples():
    plain, tilted = matryoshka().loss(X).terms, matryoshka(TiltedLoss(tilt=1.0)).loss(X).terms
    assert all(tilted[name] > 1.05 * plain[name] for name in plain)
    torch.testing.assert_close(matryoshka(TiltedLoss(tilt=0.0)).loss(X).total, matryoshka().loss(X).total)


def test_widened_latents_come_last_and_old_ones_keep_their_order():
    sae = matryoshka(LISTA(steps=2), SortedLatents(), inner=BatchTopKSAE)
    sae.after_step(sae.loss(X))
    wide = widen(sae, 4)
    assert wide.latent_order().tolist() == [*sae.latent_order().tolist(), 16, 17, 18, 19]
    assert torch.equal(wide.mitigations[0].thresholds, sae.mitigations[0].thresholds)


def test_only_what_encodes_differently_cannot_be_exported(tmp_path):
    sae = matryoshka(SortedLatents(), TiltedLoss(), inner=BatchTopKSAE)
    sae.after_step(sae.loss(X))
    assert export_saelens(sae, tmp_path)["architecture"] == "jumprelu"
    with pytest.raises(UserError, match=r"^export: SAELens knows nothing that computes what MatryoshkaSAE does"):
        export_saelens(matryoshka(LISTA(eta=0.5)), tmp_path)


@pytest.mark.parametrize("wraps", [True, False])
def test_weights_of_an_sae_on_disk_bring_what_the_same_mitigations_counted(wraps, tmp_path):
    def made(**more):
        inner = BatchTopKSAE(8, 16, k=3, mitigations=[LISTA()], **more)
        return MatryoshkaSAE(8, inner, [4, 16], mitigations=[SortedLatents()]) if wraps else inner

    first = made()
    first.after_step(first.loss(X))
    first.save(tmp_path)
    again = made(init=Initialization(weights=str(tmp_path), seed=1))
    again.initialize(Batch(X), None)
    expected = first.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items() if "since" not in name)
    other = BatchTopKSAE(8, 16, k=3, mitigations=[LISTA(eta=0.1)], init=Initialization(weights=str(tmp_path)))
    other.initialize(Batch(X), None)
    assert other.mitigations[0].thresholds.isnan().all()
    assert same_weights(load_sae(tmp_path), first)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LISTA(eta=0), r"^model\.mitigations\.eta: must be above 0"),
        (lambda: LISTA(steps=0), r"^model\.mitigations\.steps: expected a whole number of at least 1"),
        (lambda: SortedLatents(decay=1.0), r"^model\.mitigations\.decay: must be at least 0 and below 1"),
        (lambda: TiltedLoss(tilt=-1), r"^model\.mitigations\.tilt: must not be negative"),
        (lambda: RandomPrefixes(smallest=0), r"^model\.mitigations\.smallest: expected a whole number"),
        (lambda: matryoshka(RandomPrefixes(smallest=16)), r"^model\.mitigations: RandomPrefixes: 2 levels from 16 up do not"),
        (lambda: matryoshka(RandomPrefixes(), adaptive=True), r"^model\.adaptive: weighs levels of fixed sizes"),
        (lambda: matryoshka(DetachedInnerLevels(), detached=True), r"^model\.detached: detaches all"),
        (lambda: matryoshka(DetachedInnerLevels(), credit=0.5), r"^model\.credit: gives levels targets"),
        (lambda: matryoshka(SortedLatents(), SortedLatents()), r"^model\.mitigations: SortedLatents is there twice"),
        (lambda: TopKSAE(8, 16, k=3, mitigations=[RandomPrefixes()]), r"^model\.mitigations: RandomPrefixes needs levels"),
    ],
)
def test_mistakes(make, said):
    with pytest.raises(UserError, match=said):
        make()
