"""Codes as containers: parts of consecutive examples, other devices, who fires, other numbers for latents."""

import pytest
import torch

from hedgelab.kernels import reference, sparse
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import Decoder, Encoder, JumpReLU, Target

DENSE = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0], [0.0, 5.0, 6.0]])


def both_layouts() -> list[Codes]:
    dense = Codes.from_dense(DENSE)
    return [dense, Codes.from_csr(*dense.csr(), 3)]


@pytest.mark.parametrize("codes", both_layouts(), ids=["dense", "sparse"])
@pytest.mark.parametrize("rows", [slice(0, 4), slice(1, 3), slice(2, None), slice(-1, None), slice(1, 1), slice(3, 9)], ids=str)
def test_a_part_is_the_rows_of_the_whole(codes: Codes, rows: slice) -> None:
    part = codes.part(rows)
    assert torch.equal(part.to_dense(), DENSE[rows])
    assert part.batch_size == len(DENSE[rows])
    assert part.firing_counts().tolist() == (DENSE[rows] > 0).sum(0).tolist()
    assert part.csr()[0].tolist()[0] == 0


@pytest.mark.parametrize("codes", both_layouts(), ids=["dense", "sparse"])
def test_parts_are_of_consecutive_examples(codes: Codes) -> None:
    with pytest.raises(ValueError, match="consecutive"):
        codes.part(slice(0, 4, 2))


@pytest.mark.parametrize("codes", both_layouts(), ids=["dense", "sparse"])
def test_codes_move_whole_to_another_device(codes: Codes) -> None:
    moved = codes.to("meta")
    assert moved.values.is_meta
    assert moved.examples == (4,)
    assert moved.d_sae == 3
    if moved.layout is not None:
        assert moved.layout.crow.is_meta
        assert moved.layout.latents.is_meta
    assert torch.equal(codes.to("cpu").to_dense(), DENSE)


SIGNED = torch.tensor([[0.0, -2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, -0.5], [0.0, 5.0, 6.0]])


@pytest.mark.parametrize("stored_zeros", [False, True])
@pytest.mark.parametrize("sparse_layout", [False, True])
def test_a_latent_fires_where_its_value_is_not_zero(sparse_layout: bool, stored_zeros: bool) -> None:
    codes = Codes.from_dense(SIGNED)
    if sparse_layout:
        codes = Codes.from_csr(*codes.csr(), 3)
        if stored_zeros:
            codes = Codes.from_topk(torch.arange(3).repeat(4, 1), SIGNED, 3)
    assert codes.firing_counts().tolist() == [1, 2, 2]
    assert codes.fired().tolist() == [True, True, True]
    assert codes.active_per_example().tolist() == [1, 0, 2, 2]
    assert codes.part(slice(0, 2)).fired().tolist() == [False, True, False]
    assert codes.smallest_positive().item() == 3


def test_what_a_jumprelu_stores_below_its_threshold_does_not_fire() -> None:
    x, encoder = torch.tensor([[0.95, 1.05]]), Encoder(torch.eye(2), torch.zeros(2), torch.zeros(2))
    codes = sparse.encode(x, encoder, JumpReLU(torch.ones(2), 0.2))
    assert len(codes.values) == 2
    assert codes.firing_counts().tolist() == [0, 1]
    assert codes.active_per_example().tolist() == [1]


@pytest.mark.parametrize("sparse_layout", [False, True])
def test_latents_by_other_numbers_decode_through_rows_in_their_places(sparse_layout: bool) -> None:
    """Each latent's row and value keep their gradients; levels are cut among the new numbers."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(9, 20, generator=generator).double()
    dense = torch.where(dense.abs() > 1, dense, 0.0)
    W_dec, x = torch.randn(20, 4, generator=generator).double(), torch.randn(9, 4, generator=generator).double()
    place = torch.randperm(20, generator=generator)
    latents = place.argsort().tolist()  # by place
    path = sparse if sparse_layout else reference
    found = []
    for sorted_by_kernel in (True, False):
        codes = Codes.from_csr(*Codes.from_dense(dense).csr(), 20) if sparse_layout else Codes.from_dense(dense)
        codes = codes.with_values(codes.values.clone().requires_grad_())
        rows = W_dec.clone().requires_grad_()
        if sorted_by_kernel:
            moved = codes.relabelled(place)
            assert torch.equal(moved.to_dense(), torch.stack([dense[:, latent] for latent in latents], dim=1))
            losses, _ = path.level_errors(moved, Decoder(rows[place.argsort()], torch.zeros(4)), Target(x, [5, 20]))
        else:  # the same sums, level by level, among the old numbers
            inner = torch.tensor([number in latents[:5] for number in range(20)]).double()
            part = (codes.to_dense() * inner) @ rows
            losses = [(part - x).square().sum() / 9, (codes.to_dense() @ rows - x).square().sum() / 9]
        (2 * losses[0] + losses[1]).backward()
        found.append([losses[0].detach(), losses[1].detach(), codes.values.grad, rows.grad])
    for own, plain in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-10, atol=1e-10)


def test_rates_move_with_their_latents() -> None:
    rates = torch.tensor([0.1, 0.2, 0.3]).requires_grad_()
    moved = Codes.from_dense(DENSE, rates).relabelled(torch.tensor([2, 0, 1]))
    assert moved.rates is not None
    assert moved.rates.tolist() == pytest.approx([0.2, 0.3, 0.1])
    moved.rates[0].backward()
    assert rates.grad is not None
    assert rates.grad.tolist() == [0, 1, 0]
