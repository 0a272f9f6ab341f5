"""Loss recovered against sums by hand, over batches."""

import pytest
import torch

from hedgelab.metrics import LossRecovered


def logits(seed, n=4, length=6, vocabulary=11):
    return torch.randn(n, length, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_losses_and_shares_are_those_by_hand():
    clean, sae, zero, mean = (logits(seed) for seed in range(4))
    tokens = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(9))
    keep = torch.rand(4, 6, generator=torch.Generator().manual_seed(8)) < 0.7
    metric = LossRecovered()
    for rows in (slice(0, 1), slice(1, 4)):
        metric.update(tokens[rows], keep[rows], clean[rows], sae[rows], zero[rows], mean[rows])
    result = metric.compute()

    places = [(i, j) for i in range(4) for j in range(5) if keep[i, j]]

    def cross_entropy(values):
        return sum(-values[i, j].double().log_softmax(0)[tokens[i, j + 1]] for i, j in places) / len(places)

    def divergence(values):
        total = 0.0
        for i, j in places:
            p, q = clean[i, j].double().softmax(0), values[i, j].double().softmax(0)
            total += (p * (p / q).log()).sum()
        return total / len(places)

    by_hand = [cross_entropy(values) for values in (clean, sae, zero, mean)]
    assert result.cross_entropy.item() == pytest.approx(by_hand[0].item(), rel=1e-5)
    assert result.cross_entropy_sae.item() == pytest.approx(by_hand[1].item(), rel=1e-5)
    assert result.kl_sae.item() == pytest.approx(divergence(sae).item(), rel=1e-5)
    assert result.recovered.item() == pytest.approx(((by_hand[2] - by_hand[1]) / (by_hand[2] - by_hand[0])).item(), rel=1e-4)
    assert result.recovered_mean.item() == pytest.approx(
        ((by_hand[3] - by_hand[1]) / (by_hand[3] - by_hand[0])).item(), rel=1e-4
    )
    assert result.kl_recovered.item() == pytest.approx((1 - divergence(sae) / divergence(zero)).item(), rel=1e-5)
    assert result.kl_recovered_mean.item() == pytest.approx((1 - divergence(sae) / divergence(mean)).item(), rel=1e-5)


def test_a_perfect_reconstruction_recovers_everything_and_zeros_nothing():
    clean, zero, mean = (logits(seed) for seed in range(3))
    tokens, keep = torch.randint(0, 11, (4, 6)), torch.ones(4, 6, dtype=torch.bool)
    for sae, share in ((clean, 1.0), (zero, 0.0)):
        metric = LossRecovered()
        metric.update(tokens, keep, clean, sae, zero, mean)
        assert metric.compute().recovered.item() == pytest.approx(share)
        assert metric.compute().kl_recovered.item() == pytest.approx(share)
