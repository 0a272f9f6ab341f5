"""Codes as containers: parts of consecutive examples, and other devices."""

import pytest
import torch

from hedgelab.kernels.codes import Codes

DENSE = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0], [0.0, 5.0, 6.0]])


def both_layouts() -> list[Codes]:
    dense = Codes.from_dense(DENSE)
    return [dense, Codes.from_csr(*dense.csr(), 3)]


@pytest.mark.parametrize("codes", both_layouts(), ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "rows", [slice(0, 4), slice(1, 3), slice(2, None), slice(-1, None), slice(1, 1), slice(3, 9)], ids=str
)
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
