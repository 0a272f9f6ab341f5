"""Decoder geometry against the whole matrix of cosines."""

import torch

from hedgelab.metrics.functional.geometry import decoder_geometry


def test_cosines_block_by_block_are_those_of_the_whole_matrix():
    W_dec = torch.randn(1500, 20, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 9, 1500)[:, None]
    W_dec[7] = 2 * W_dec[1400] + 0.01
    geometry = decoder_geometry(W_dec)
    unit = torch.nn.functional.normalize(W_dec.double(), dim=1)
    cosines = unit @ unit.T
    pairs = cosines[torch.triu(torch.ones_like(cosines), 1).bool()]
    assert geometry.counts.sum() == 1500 * 1499 // 2
    torch.testing.assert_close(geometry.mean_absolute, pairs.abs().mean(), rtol=1e-5, atol=1e-7)
    cosines.fill_diagonal_(-2)
    torch.testing.assert_close(geometry.largest.double(), cosines.max(1).values, rtol=1e-5, atol=1e-6)
    assert geometry.nearest[7] == 1400
    assert geometry.near_duplicates == (cosines.max(1).values >= 0.9).sum()
    expected = torch.histc(pairs, 200, -1, 1)
    assert (geometry.counts - expected).abs().sum() < 40  # float32 puts a few pairs into the next bin


def test_only_live_latents_count():
    W_dec = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    assert decoder_geometry(W_dec).near_duplicates == 2
    assert decoder_geometry(W_dec, torch.tensor([True, False, True])).near_duplicates == 0
    assert decoder_geometry(W_dec, torch.tensor([False, False, False])).largest.shape == (0,)
