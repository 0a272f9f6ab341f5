"""A toy of one's own: one new file with a Firing, found by its class path."""

import sys

import pytest
import torch

from hedgelab.cli import main
from hedgelab.data.toy import ToyDataModule

SOURCE = '''
"""Features that fire in turn."""

import torch

from hedgelab.data.toy import Firing


class Turns(Firing):
    """Exactly one of the features fires.

    Args:
        n_features: How many there are.
    """

    def __init__(self, n_features: int = 4) -> None:
        self.n_features = n_features

    @property
    def n(self) -> int:
        """Number of features."""
        return self.n_features

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Firing patterns."""
        which = torch.randint(self.n, (count, 1), generator=generator)
        return torch.zeros(count, self.n, dtype=torch.bool).scatter_(1, which, True)
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_toys.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_toys", None)


def test_it_trains_by_its_class_path(module, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "data: {class_path: ToyDataModule, init_args: {d_in: 6, firing: {class_path: my_toys.Turns}}}\n"
        "model: {class_path: TopKSAE, init_args: {d_sae: 4, k: 1}}\n"
        "trainer: {max_steps: 10, accelerator: cpu, enable_progress_bar: false, logger: false, enable_checkpointing: false}\n"
    )
    assert main(["fit", "--config", "own.yaml"]) == 0


def test_it_makes_batches(module):
    from my_toys import Turns

    data = ToyDataModule(Turns(4), d_in=6, seed=0, batch_size=100)
    batch = data.batch("train", 3)
    assert torch.equal(batch.features.sum(1), torch.ones(100))
    torch.testing.assert_close(batch.x, batch.features @ data.feature_directions)
