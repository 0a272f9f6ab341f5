"""Laws: closed forms, and mistakes in one line."""

import math

import pytest
import torch

from hedgelab.data.toy import Exponential, FoldedNormal, Linear, Zipf
from hedgelab.errors import UserError


def test_zipf_in_its_three_forms():
    plain = Zipf(1.5, 0.4).values(100)
    assert plain[[0, 9]].tolist() == pytest.approx([0.4, 0.4 * 10**-1.5])
    summed = Zipf(1.0, 0.3, total=25.0).values(2000)
    assert float(summed.sum()) == pytest.approx(25.0)
    assert float(summed.max()) == pytest.approx(0.3)
    below = summed[summed < 0.3 - 1e-9]
    assert float(below[0] / below[-1]) == pytest.approx(2000 / (2000 - len(below) + 1))
    assert Zipf(0.0, 0.5, total=4.999).values(10).tolist() == pytest.approx([0.4999] * 10)
    ranged = Zipf(0.5, 0.4, 5e-4).values(16384)
    share = (101**-0.5 - 1 / 128) / (1 - 1 / 128)
    assert ranged[[0, 100, -1]].tolist() == pytest.approx([0.4, 5e-4 + (0.4 - 5e-4) * share, 5e-4])
    assert Zipf(0.5, 0.4, 5e-4).values(1).tolist() == [0.4]


def test_straight_lines_and_powers():
    assert Linear(5, 4).values(5).tolist() == [5, 4.75, 4.5, 4.25, 4]
    assert Exponential(1, 16).values(5).tolist() == pytest.approx([1, 2, 4, 8, 16])
    assert Linear(3, 1).values(1).tolist() == Exponential(3, 1).values(1).tolist() == [3]


def test_folded_normals_have_their_mean_and_are_the_same_again():
    values = FoldedNormal(0.5, 0.5).values(40_000)
    assert torch.equal(values, FoldedNormal(0.5, 0.5).values(40_000))
    assert not torch.equal(values, FoldedNormal(0.5, 0.5, seed=1).values(40_000))
    expected = 0.5 * math.sqrt(2 / math.pi) * math.exp(-0.5) + 0.5 * math.erf(1 / math.sqrt(2))
    assert float(values.mean()) == pytest.approx(expected, abs=5 * 0.5 / math.sqrt(40_000))
    assert float(values.min()) >= 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Zipf(-1), r"Zipf\.exponent: must be at least 0"),
        (lambda: Zipf(math.nan), r"Zipf\.exponent: must be at least 0"),
        (lambda: Zipf(1000).values(10), r"Zipf\.exponent: 1000 gives feature 9 a value of zero"),
        (lambda: Zipf(largest=0.0), r"Zipf\.largest: must be above 0"),
        (lambda: Zipf(smallest=0.6), r"Zipf\.smallest: must be above 0, below largest = 0\.5"),
        (lambda: Zipf(0.0, smallest=0.1), r"Zipf\.smallest: .* \(exponent above 0\)"),
        (lambda: Zipf(smallest=0.1, total=2.0), r"Zipf\.smallest: give it or total"),
        (lambda: Zipf(total=5.0).values(10), r"Zipf\.total: must be above 0, below n \* largest = 5, got 5"),
        (lambda: Zipf(total=0.0).values(10), r"Zipf\.total: must be above 0"),
        (lambda: Linear(-1, 2), r"Linear\.start: must not be negative"),
        (lambda: Exponential(1, 0), r"Exponential\.end: must be above 0"),
        (lambda: FoldedNormal(std=-1), r"FoldedNormal\.std: must not be negative"),
        (lambda: FoldedNormal(seed=-1), r"FoldedNormal\.seed: expected a whole number"),
    ],
)
def test_impossible_laws_are_refused(build, message):
    with pytest.raises(UserError, match="^" + message):
        build()
