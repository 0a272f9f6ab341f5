"""TPP and SCR against evaluations that silence latents token by token."""

import pytest
import torch

from hedgelab.metrics.functional.probing import LinearProbe, linear_probes
from hedgelab.metrics.functional.removal import (
    PooledTexts,
    attribution,
    biased_probes,
    silence,
    spurious_correlation_removal,
    targeted_probe_perturbation,
    top,
)

D, TOKENS = 12, 5


def texts(n, seed, directions, kinds):
    """Texts of 5 tokens whose activations are sums of known latents' rows plus an error; ``kinds``: [n, latents] bool."""
    random = torch.Generator().manual_seed(seed)
    strength = kinds[:, None, :] * (1 + torch.rand(n, TOKENS, kinds.shape[1], generator=random))
    codes = strength * (torch.rand(strength.shape, generator=random) < 0.8)
    error = 0.05 * torch.randn(n, TOKENS, D, generator=random)
    return codes @ directions + error, codes


def pooled(x, codes, labels=None):
    return PooledTexts(x.mean(1), codes.mean(1), labels)


def rows(count, seed=3):
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed))).Q[:count]


def test_silencing_after_pooling_is_silencing_every_token():
    W_dec = rows(4)
    x, codes = texts(6, 0, W_dec, torch.ones(6, 4, dtype=torch.bool))
    off = codes.clone()
    off[..., [1, 3]] = 0
    by_token = (off @ W_dec + (x - codes @ W_dec)).mean(1)
    torch.testing.assert_close(silence(pooled(x, codes), W_dec, torch.tensor([1, 3])), by_token.double(), rtol=1e-5, atol=1e-6)


def classified(seed, n=120):
    labels = torch.nn.functional.one_hot(torch.arange(n) % 3, 3).bool()
    return pooled(*texts(n, seed, rows(3), labels), labels)


def test_latents_of_one_class_each_score_high_and_shared_ones_nothing():
    train, test = classified(0), classified(1)
    probe = linear_probes(train.x, train.labels)
    clean = targeted_probe_perturbation(probe, train, test, rows(3), [1])
    assert clean.intended.item() > 0.3  # of the .5 that a blind probe loses
    assert clean.unintended.abs().item() < 0.1
    shared = [part._replace(codes=part.codes.sum(1, keepdim=True)) for part in (train, test)]
    mixed = targeted_probe_perturbation(probe, *shared, rows(3).mean(0, keepdim=True), [1])
    assert mixed.total.item() < clean.total.item() / 2


def test_tpp_is_the_difference_of_mean_losses_by_definition():
    train, test = classified(0), classified(1)
    y, y_test, W_dec = train.labels, test.labels, rows(3)
    probe = linear_probes(train.x, y)
    scores = targeted_probe_perturbation(probe, train, test, W_dec, [1, 2])

    def accuracy(x, c):
        found = x.double() @ probe.weight[c] + probe.bias[c] > 0
        return ((found[y_test[:, c]]).double().mean() + (~found[~y_test[:, c]]).double().mean()) / 2

    intended, unintended = [], []
    for c in range(3):
        means = [train.codes[mask].mean(0) for mask in (y[:, c], ~y[:, c])]
        effect = (means[0] - means[1]).clamp_min(0).double() * (W_dec.double() @ probe.weight[c])
        chosen = effect.argsort(descending=True)[:2]
        chosen = chosen[effect[chosen] != 0]
        x = test.x.double() - test.codes[:, chosen].double() @ W_dec[chosen].double()
        for other in range(3):
            (intended if other == c else unintended).append(accuracy(test.x, other) - accuracy(x, other))
    assert scores.intended[1].item() == pytest.approx(torch.stack(intended).mean().item())
    assert scores.unintended[1].item() == pytest.approx(torch.stack(unintended).mean().item())
    assert scores.total[1].item() == pytest.approx((scores.intended[1] - scores.unintended[1]).item())


def fourfold(seed, n=400):
    """Texts with a label and a stronger spurious property, a latent for each."""
    labels = torch.stack([torch.arange(n) % 2 == 0, torch.arange(n) // 2 % 2 == 0], dim=1)
    return pooled(*texts(n, seed, DIRECTIONS, labels), labels)


DIRECTIONS = rows(2) * torch.tensor([[1.0], [2.0]])


def test_taking_the_spurious_latent_out_mends_the_biased_probe():
    train, test = fourfold(0), fourfold(1)
    probes = biased_probes(train.x, *train.labels.T, C=1e-3)
    scores = spurious_correlation_removal(probes, train, test, DIRECTIONS, [1])
    assert scores.clean.min() > 0.95
    assert scores.score[0] == scores.both[int(scores.biased.argmin()), 0]
    removed = [silence(test, DIRECTIONS, torch.tensor([latent])) for latent in (1, 0)]
    for kept in (0, 1):
        found = probes[0].scores(removed[kept])[:, 0] > 0
        accuracy = (found == test.labels[:, kept]).double().mean()
        expected = (accuracy - scores.biased[kept]) / (scores.clean[kept] - scores.biased[kept])
        assert scores.both[kept, 0].item() == pytest.approx(expected.item())


def test_useless_latents_mend_nothing():
    train, test = fourfold(0), fourfold(1)
    probes = biased_probes(train.x, *train.labels.T)
    silent = [part._replace(codes=torch.zeros(len(part.x), 2)) for part in (train, test)]
    scores = spurious_correlation_removal(probes, *silent, rows(2), [1, 2])
    assert scores.score.tolist() == [0, 0]


def test_attribution_and_choice():
    probe = LinearProbe(torch.tensor([[1.0, 0], [0, -1]], dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    codes = torch.tensor([[2.0, 0], [0, 3]])
    labels = torch.eye(2, dtype=torch.bool)
    W_dec = torch.tensor([[1.0, 1], [1, 2]])
    assert attribution(probe, codes, labels, W_dec, True).tolist() == [[2, 0], [0, -6]]
    assert attribution(probe, codes, labels, W_dec, False).tolist() == [[2, 3], [2, 6]]
    assert top(torch.tensor([0.0, 2, 1, 0]), 3).tolist() == [1, 2]
