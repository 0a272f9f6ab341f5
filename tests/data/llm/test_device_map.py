"""A model that is spread over devices gives the activations of one that is not."""

import pytest
import torch

from hedgelab.errors import UserError

pytest.importorskip("accelerate", reason="needs hedgelab[llm]")
SPREAD = {"embed_tokens": "cpu", "layers.0": "disk", "layers.1": "cpu", "norm": "cpu", "rotary_emb": "cpu"}


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, SPREAD], ids=["auto", "one", "two"])
def test_batches(make_data, device_map, tmp_path):
    plain, spread = make_data(), make_data(device_map=device_map, cache_dir=str(tmp_path))
    for stage, index in (("train", 0), ("train", 30), ("val", 1)):
        assert torch.equal(spread.batch(stage, index).x, plain.batch(stage, index).x)
    if device_map is SPREAD:
        assert {p.device.type for p in spread.harvester._model.parameters()} == {"cpu", "meta"}
        assert list((tmp_path / "offloaded").iterdir())
    spread.teardown("fit")


def test_a_map_that_leaves_modules_out(make_data):
    with pytest.raises(UserError, match=r"data\.device_map: .*; expected auto, or a device for each of embed_tokens, layers"):
        make_data(device_map={"layers": "cpu"}).setup("fit")
