import numpy as np
import pytest

from hedgelab.errors import UserError
from hedgelab.theory import best_mixture, hedging_lowers_loss, tied_loss


@pytest.mark.parametrize(("p_first", "p_both"), [(0.3, 0.1), (0.1, 0.3)])
@pytest.mark.parametrize("l1", [0.0, 0.1])
@pytest.mark.parametrize("norm", [0.5, 1.0, 2.0])
def test_landscape_equals_the_loss_of_a_tied_latent(p_first, p_both, l1, norm):
    t = np.linspace(0, 1, 11)
    for mixture, loss in zip(t, tied_loss(t, p_first, p_both, l1, norm), strict=True):
        direction = np.array([1 - mixture, mixture]) / np.hypot(1 - mixture, mixture)
        expected = 0.0
        for x, p in ((np.array([1.0, 0.0]), p_first), (np.array([1.0, 1.0]), p_both)):
            a = x @ direction
            expected += p * (((x - a * direction) ** 2).sum() + l1 * a**norm)
        assert loss == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("p_first", "p_both", "l1"), [(0.3, 0.1, 0.0), (0.1, 0.3, 0.0), (0.3, 0.1, 0.1), (0.1, 0.3, 1.0)])
def test_best_mixture_is_the_bottom(p_first, p_both, l1):
    t = np.linspace(0, 1, 100_001)
    bottom = t[tied_loss(t, p_first, p_both, l1).argmin()]
    assert best_mixture(p_first, p_both, l1) == pytest.approx(bottom, abs=2e-5)


@pytest.mark.parametrize(("l1", "norm"), [(0.0, 1.0), (1.9, 1.0), (2.1, 1.0), (3.9, 0.5), (4.1, 0.5)])
def test_the_condition_is_the_sign_of_the_slope(l1, norm):
    start, next_to_it = tied_loss([0.0, 1e-6], 0.3, 0.1, l1, norm)
    assert hedging_lowers_loss(0.1, l1, norm) == (next_to_it < start)


def test_mistakes():
    with pytest.raises(UserError, match="p_first, p_both"):
        tied_loss(0.5, 0.7, 0.7)
    with pytest.raises(UserError, match="norm"):
        tied_loss(0.5, 0.1, 0.1, norm=0.0)
