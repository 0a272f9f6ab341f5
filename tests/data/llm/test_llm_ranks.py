"""Training on a language model's activations: live or from disk, on one rank or several, the same."""

import os
import sys
from pathlib import Path

import pytest
import torch

from hedgelab.data.llm.cache_writing import write_cache

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import fits

KINDS = ["vanilla", "batch_topk", "matryoshka"]


@pytest.fixture(scope="module")
def cache(make_data, tmp_path_factory):
    """A complete cache of the tiny model's activations."""
    pytest.importorskip("zarr")
    folder = tmp_path_factory.mktemp("activations") / "cache"
    data = make_data()
    write_cache(data, str(folder), shard=32)
    data.teardown("fit")
    return str(folder)


def outcomes(make_data, cache, ranks, steps, folder):
    """What one rank gets from the live stream, and what several get from it and from the cache."""
    runs = []
    for name, count, options in (("one", 1, {}), ("live", ranks, {}), ("cached", ranks, {"cache": cache})):
        data = make_data(normalisation="unit_norm", val_batches=2, **options)
        runs.append(fits.fit(fits.group(KINDS, data.d_in, True), data, folder / name, count, steps)[0])
    return runs


@pytest.mark.parametrize(
    ("ranks", "steps"),
    [(2, 30), pytest.param(2, 200, marks=pytest.mark.slow), pytest.param(4, 200, marks=pytest.mark.slow)],
)
def test_ranks_train_as_one_does(make_data, cache, ranks, steps, tmp_path):
    one, live, cached = outcomes(make_data, cache, ranks, steps, tmp_path)
    assert live.numbers == cached.numbers
    assert all(torch.equal(cached.weights[name], value) for name, value in live.weights.items())
    fits.assert_as_one(one, live)


def train_sharded(rank, make_data, options, folder, steps):
    data = make_data(normalisation="unit_norm", val_batches=2, **options)
    settings = {"strategy": "sharded", "devices": int(os.environ["WORLD_SIZE"])}
    fits.fit(fits.group(KINDS, data.d_in, True), data, folder, 1, steps, **settings)


@pytest.mark.parametrize(
    ("ranks", "steps"),
    [(2, 30), pytest.param(2, 200, marks=pytest.mark.slow), pytest.param(4, 200, marks=pytest.mark.slow)],
)
def test_split_latents_train_as_whole_ones_do(make_data, cache, ranks, steps, tmp_path):
    data = make_data(normalisation="unit_norm", val_batches=2)
    one = fits.fit(fits.group(KINDS, data.d_in, True), data, tmp_path / "one", 1, steps)[0]
    many = {}
    for name, options in {"live": {}, "cached": {"cache": cache}}.items():
        fits.on_ranks(ranks, train_sharded, make_data, options, tmp_path / name, steps)
        many[name] = [fits.Outcome.read(tmp_path / name / f"rank{rank}.pt") for rank in range(ranks)]
    live, cached = many["live"][0], many["cached"][0]
    assert all(rank.numbers == live.numbers for rank in [*many["live"], *many["cached"]])
    assert all(torch.equal(cached.weights[name], value) for name, value in live.weights.items())
    fits.assert_as_one(one, live)
