"""Training on a language model's activations: live or from disk, on one rank or several, the same."""

import sys
from pathlib import Path

import pytest
import torch

from hedgelab.data.llm.cache_writing import write_cache

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import fits

KINDS = fits.KINDS


@pytest.fixture(scope="module")
def cache(make_data, tmp_path_factory):
    """A complete cache of the tiny model's activations."""
    folder = tmp_path_factory.mktemp("activations") / "cache"
    data = make_data()
    write_cache(data, str(folder), shard=32)
    data.teardown("fit")
    return str(folder)


def train(rank, make_data, options, folder, steps, settings):
    data = make_data(normalisation="unit_norm", val_batches=2, **options)
    return fits.fit(fits.group(KINDS, data.d_in, True), data, folder, 1, steps, **settings)


def outcomes(make_data, cache, strategy, ranks, steps, folder, **settings):
    """What one rank gets from the live stream, and what several get from it and from the cache, which must be the same."""
    one = train(0, make_data, {}, folder / "one", steps, settings)[0]
    many = []
    for name, options in {"live": {}, "cached": {"cache": cache}}.items():
        spread = settings | {"strategy": strategy, "devices": ranks}
        fits.on_ranks(ranks, train, make_data, options, folder / name, steps, spread)
        many += [fits.Outcome.read(folder / name / f"rank{rank}.pt") for rank in range(ranks)]
    live, *others = many
    assert all(rank.numbers == live.numbers for rank in others)
    assert all(torch.equal(rank.weights[name], value) for rank in others for name, value in live.weights.items())
    return one, live


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("sharded", marks=pytest.mark.slow)])
def test_ranks_train_as_one_does(make_data, cache, strategy, tmp_path):
    fits.assert_as_one(*outcomes(make_data, cache, strategy, 2, 30, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_for_long_in_double_precision(make_data, cache, strategy, ranks, tmp_path):
    fits.assert_as_one(*outcomes(make_data, cache, strategy, ranks, 200, tmp_path, limit_val_batches=0))


@pytest.mark.slow
def test_the_order_of_a_batch_does_not_matter(make_data, tmp_path):
    """Rows in another order, their sums rounded otherwise, in double precision."""
    one, other = (
        train(0, make_data, {}, tmp_path / name, 200, settings)[0]
        for name, settings in {"as served": {}, "shuffled": {"change": fits.in_another_order}}.items()
    )
    relative = fits.deviations(one, other)
    assert set(relative) == set(KINDS)
    assert max(relative.values()) < 1e-9
