"""Exact selection from tiles: the same sets as full sorts, whatever the estimate of the threshold says."""

import pytest
import torch
from torch import Tensor

from hedgelab.kernels import selection
from hedgelab.kernels.codes import Codes, stable_order
from hedgelab.kernels.ranks import ALONE, Share
from hedgelab.kernels.selection import Product as Encoder
from hedgelab.kernels.selection import select_above, select_topk


def encoder(batch: int, d_sae: int, dtype: torch.dtype = torch.float64, order: str = "shuffled") -> Encoder:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 6, generator=generator, dtype=torch.float64)
    x *= torch.rand(batch, 1, generator=generator).double() * 9
    if order == "sorted":
        x = x[x.norm(dim=1).argsort()]
    weights = torch.randn(6, d_sae, generator=generator, dtype=torch.float64)
    bias = torch.randn(d_sae, generator=generator, dtype=torch.float64)
    return Encoder(x.to(dtype), weights.to(dtype), bias.to(dtype), dtype)


def select_batch_topk(encoder: Encoder, k: int, scale: Tensor | None) -> Codes:
    return selection.select_batch_topk(encoder, k, scale, Share(ALONE, len(encoder.x), encoder.W_enc.shape[1]))


def whole(encoder: Encoder) -> Tensor:
    return torch.addmm(encoder.b_enc, encoder.x, encoder.W_enc)


@pytest.mark.parametrize("d_sae", [300, 1027])
@pytest.mark.parametrize("order", ["shuffled", "sorted"])
@pytest.mark.parametrize("k", [1, 7, 200])
def test_batch_selection_is_that_of_a_full_sort(d_sae, order, k):
    e = encoder(1300, d_sae, order=order)
    pre = whole(e)
    edge = pre.flatten().sort(descending=True).values[k * 1300 - 1].clamp_min(0)
    expected = torch.where((pre >= edge) & (pre > 0), pre, 0.0)
    torch.testing.assert_close(select_batch_topk(e, k, None).to_dense(), expected, rtol=1e-12, atol=1e-12)


def products(monkeypatch) -> list[int]:
    """Counts the rows that pass through the encoder's product from now on."""
    rows, product = [], torch.addmm

    def counting(bias: Tensor, x: Tensor, *args, **kwargs) -> Tensor:
        rows.append(len(x))
        return product(bias, x, *args, **kwargs)

    monkeypatch.setattr(torch, "addmm", counting)
    return rows


@pytest.mark.parametrize(("estimate", "passes"), [(0.0, 1), (2.0, 1), (1e6, 2), (float("inf"), 2)])
def test_a_wrong_floor_costs_time_but_not_exactness(monkeypatch, estimate, passes):
    """Too low: more candidates. Too high: one more pass, which cannot fail."""
    e = encoder(1400, 520)
    expected = select_batch_topk(e, 9, None).to_dense()
    monkeypatch.setattr(selection, "_estimated_floor", lambda *args: estimate)
    rows = products(monkeypatch)
    assert torch.equal(select_batch_topk(e, 9, None).to_dense(), expected)
    assert sum(rows) == passes * 1400


TIES = {
    "no weights": lambda x, w: (x, 0 * w, torch.ones(w.shape[1])),
    "constant activations": lambda x, w: (torch.ones_like(x), w, torch.zeros(w.shape[1])),
    "all infinite": lambda x, w: (x, 0 * w, torch.full((w.shape[1],), torch.inf)),
    "two values": lambda x, w: (x, 0 * w, 1.0 + (torch.arange(w.shape[1]) % 2)),
}


@pytest.mark.parametrize("k", [3, 40])
@pytest.mark.parametrize("case", TIES)
def test_where_ties_decide_one_product_does(case, k, monkeypatch):
    """The count is right, and among equal entries those with the lowest row, then latent, are kept."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(1300, 6, generator=generator), torch.randn(6, 600, generator=generator)
    x, w, b = TIES[case](x, w)
    e = Encoder(x, w, b, torch.float32)
    pre = whole(e).relu().flatten()
    rows = products(monkeypatch)
    entries = select_batch_topk(e, k, None)
    assert sum(rows) == 1300
    assert entries.values.numel() == k * 1300
    order = pre.argsort(descending=True, stable=True)[: k * 1300]
    kept = entries.layout.rows * 600 + entries.layout.latents
    assert torch.equal(kept.sort().values, order.sort().values)


def test_fewer_positive_entries_than_wanted():
    e = encoder(50, 64)
    e = e._replace(b_enc=e.b_enc - 30)
    kept = select_batch_topk(e, 20, None)
    assert 0 < kept.values.numel() < 20 * 50
    torch.testing.assert_close(kept.to_dense(), whole(e).relu(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 5, 100])
def test_row_selection_is_topk(k):
    e, scale = encoder(1300, 1027), torch.rand(1027).double() + 0.5
    for factor in (None, scale):
        entries = select_topk(e, k, factor)
        ranked = whole(e) if factor is None else whole(e) * factor
        chosen = entries.layout.latents.view(-1, k).sort(dim=1).values
        assert torch.equal(chosen, ranked.topk(k, dim=1).indices.sort(dim=1).values)


def test_non_finite_pre_activations_do_not_crash():
    """A diverged run must end in NaN losses, not in an index out of range."""
    e = encoder(40, 301)
    for value in (torch.nan, torch.inf, -torch.inf):
        e.x[3] = value
        for entries in (select_topk(e, 4, None), select_batch_topk(e, 4, None)):
            assert entries.layout.latents.max() < 301


def test_a_transposed_layout_is_ordered_by_latent():
    entries = select_above(encoder(60, 90), torch.tensor(1.0))
    layout = entries.layout
    ccol, rows, order = layout.transposed
    latents = layout.latents[order]
    assert (latents.diff() >= 0).all()
    assert torch.equal(rows, layout.rows[order])
    assert torch.equal(ccol.diff(), torch.bincount(layout.latents, minlength=90))
    levels = layout.by_level([10, 40, 90])
    assert levels.row_count == 180
    assert torch.equal(levels.rows % 60, layout.rows[levels.order])
    assert torch.equal(levels.transposed[1] % 60, rows)
    assert layout.by_level([10, 40, 90]) is levels


def test_wide_dictionaries_are_ordered_alike():
    keys = torch.randint(0, 1 << 17, (5000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(stable_order(keys, 1 << 17), torch.argsort(keys, stable=True))
    assert torch.equal(stable_order(keys % 999, 999), torch.argsort(keys % 999, stable=True))
