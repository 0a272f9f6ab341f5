"""First-letter absorption: constructed cases, and an independent word-by-word evaluation of the public definition."""

import numpy as np
import pytest
import torch

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.first_letter import first_letter_scores, l1_ranking, word_absorption
from hedgelab.metrics.functional.probing import firing_magnitudes, linear_probes

LETTER = torch.tensor([1.0, 0, 0, 0])  # the probe
W_DEC = torch.tensor([[1.0, 0, 0, 0], [0.8, 0.6, 0, 0], [0, 0, 1.0, 0]])  # the letter's latent, an absorber, a stranger


@pytest.mark.parametrize(
    ("latents", "full", "fraction"),
    [
        ([2.0, 0, 1], False, 0.0),  # the letter's latent fires
        ([0.0, 2.5, 1], True, 1.0),  # silent, and the absorber carries it all
        ([0.0, 0.5, 1], False, 0.0),  # the absorber carries .4 of 2: no less is counted; .4 < .8
        ([0.0, 0, 3], False, 0.0),  # nobody knows it
        ([1.0, 1.25, 0], False, 0.5),  # half each
    ],
)
def test_constructed_words(latents, full, fraction):
    x = torch.tensor([[2.0, 0, 0, 0]])
    found = word_absorption(torch.tensor([latents]), x, 3 * LETTER, torch.tensor([0]), W_DEC)
    assert [one.item() for one in found] == [full, pytest.approx(fraction)]


def definition(latents, x, direction, main, W_dec):
    """Full absorption and absorption fraction of one word, in the words of the public definition."""
    direction = direction / np.linalg.norm(direction)
    cosines = np.array([row @ direction / np.linalg.norm(row) for row in W_dec])
    share = latents * cosines
    projection = x @ direction
    strongest = int(np.argmax(share))
    full = (
        all(latents[i] < 1e-8 for i in main)
        and cosines[strongest] >= 0.025
        and projection > 0
        and share[strongest] / projection >= 0.4
    )
    by_main = sum(share[i] for i in main)
    candidates = sorted(share[i] for i in range(len(share)) if i not in main and cosines[i] >= 0.1 and share[i] > 0)
    absorbed = sum(candidates[-3:])
    if by_main >= projection or absorbed / projection < 0.4:
        fraction = 0.0
    elif by_main <= 0:
        fraction = 1.0
    else:
        taken = min(absorbed, projection - by_main)
        fraction = min(1.0, max(0.0, taken / (taken + by_main)))
    return full, fraction


def words(n, seed, letters=3, d_in=24, groups=12):
    """Activations that know the letter; its latent is silent for words that one of its many absorbers knows."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(5))).Q[:letters]
    letter = torch.randint(0, letters, (n,), generator=random)
    x = 3 * directions[letter] + 0.4 * torch.randn(n, d_in, generator=random)
    noise = torch.randn(letters * (1 + groups), d_in, generator=torch.Generator().manual_seed(6)) / d_in**0.5
    W_dec = torch.cat([directions + 0.2 * noise[:letters], directions.repeat_interleave(groups, 0) + noise[letters:]])
    W_dec = torch.nn.functional.normalize(W_dec, dim=1)
    latents = torch.zeros(n, len(W_dec))
    word, share = torch.arange(n), 0.5 + torch.rand(n, generator=random)
    absorbed = torch.rand(n, generator=random) < 0.3
    absorber = letters + letter * groups + torch.randint(0, groups, (n,), generator=random)
    latents[word, letter] = torch.where(absorbed, 0.0, 3 * share)
    partly = torch.rand(n, generator=random) < 0.5
    latents[word, absorber] = torch.where(absorbed, 3 * share, torch.where(partly, 1.5 * share, 0.0))
    latents[torch.rand(n, len(W_dec), generator=random) < 0.02] = 0.7
    return x, torch.nn.functional.one_hot(letter, letters).bool(), Codes.from_dense(latents), W_dec


def test_scores_agree_with_an_independent_evaluation():
    linear, metrics = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.metrics")
    x, y, train, W_dec = words(500, 0)
    x_test, y_test, test, _ = words(300, 1)
    probe = linear_probes(x, y)
    sparse = [Codes.from_csr(*codes.csr(), codes.d_sae) for codes in (train, test)]
    scores = first_letter_scores(sparse[0], y, sparse[1], y_test, x_test, probe, W_dec)
    scale = firing_magnitudes(train).numpy()
    a, a_test = train.values.numpy() / scale, test.values.numpy() / scale
    for letter in range(3):
        found = probe.scores(x_test)[:, letter].numpy() > 0
        assert scores.probe_f1[letter] == pytest.approx(metrics.f1_score(y_test[:, letter], found))
        # saga minimises the same L1-penalised loss: n (mean of weighted losses) + .01 n |w|
        target = y[:, letter].numpy()
        weight = np.where(target, (~target).sum() / target.sum(), 1.0)
        l1 = linear.LogisticRegression(
            l1_ratio=1, C=1 / (0.01 * len(a)), solver="saga", max_iter=20_000, tol=1e-7, random_state=0
        )
        best = np.argsort(-l1.fit(a, target, sample_weight=weight).coef_[0], kind="stable")
        f1, splits = [], 0
        for k in range(1, 11):
            model = linear.LogisticRegression(class_weight="balanced", max_iter=500).fit(a[:, best[:k]], target)
            f1.append(metrics.f1_score(y_test[:, letter], model.predict(a_test[:, best[:k]])))
            if k == 1 or f1[-1] > f1[-2] + 0.03:
                splits = k
            else:
                break
        assert scores.splits[letter] == splits
        assert scores.f1[letter] == pytest.approx(f1[0], abs=0.01)
        rows = np.flatnonzero(found & y_test[:, letter].numpy())
        by_hand = [
            definition(
                test.values[i].double().numpy(), x_test[i].double().numpy(), probe.weight[letter].numpy(),
                best[:splits].tolist(), W_dec.double().numpy(),
            )
            for i in rows
        ]  # fmt: skip
        assert scores.full[letter] == pytest.approx(np.mean([full for full, _ in by_hand]))
        assert scores.fraction[letter] == pytest.approx(np.mean([fraction for _, fraction in by_hand]))
    assert 0.05 < scores.full.mean() < 0.5  # absorption is there to be found


def test_folding_changes_nothing():
    x, y, train, W_dec = words(300, 0)
    x_test, y_test, test, _ = words(200, 1)
    probe = linear_probes(x, y)
    norms = torch.linspace(0.3, 3, len(W_dec))
    plain = first_letter_scores(train, y, test, y_test, x_test, probe, W_dec)
    scaled = first_letter_scores(
        train.scale(1 / norms), y, test.scale(1 / norms), y_test, x_test, probe, W_dec * norms[:, None]
    )
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one, other)


def test_letters_that_the_probe_does_not_know_are_left_out():
    _, y, train, W_dec = words(300, 0)
    x_test, y_test, test, _ = words(200, 1)
    noise = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    scores = first_letter_scores(train, y, test, y_test, torch.randn_like(x_test), linear_probes(noise, y), W_dec)
    assert scores.full.isnan().all()
    assert not scores.probe_f1.isnan().any()


def test_the_l1_ranking_finds_what_fires_for_the_letter():
    _, y, train, _ = words(500, 0)
    ranked = l1_ranking(train, y, firing_magnitudes(train))
    assert ranked[:, 0].tolist() == [0, 1, 2]
    assert all(set(row[1:6]) <= set(range(3 + 12 * i, 15 + 12 * i)) for i, row in enumerate(ranked.tolist()))
