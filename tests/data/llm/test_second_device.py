"""Activations of a model on another device than the CPU: nothing of the two devices is ever mixed."""

import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from hedgelab.data.llm.cache_writing import write_cache
from hedgelab.data.llm.hook import SplicedModel
from hedgelab.data.llm.model import ModelFiles

sys.path.insert(0, str(Path(__file__).parents[2]))
from second_device import DEVICE, SecondDevice


class Inline:
    """Does at once, in the same thread, what a pool would do later: a dispatch mode belongs to a thread."""

    def submit(self, work, *args):
        done = Future()
        done.set_result(work(*args))
        return done

    def map(self, work, *iterables):
        return map(work, *iterables)

    def shutdown(self, **options):
        pass


@pytest.fixture
def second(monkeypatch):
    """Data on the second device, and the same data on the CPU."""
    monkeypatch.setattr("hedgelab.data.llm.datamodule.ThreadPoolExecutor", lambda *args: Inline())
    monkeypatch.setattr("hedgelab.data.llm.stream._single_threaded_pool", lambda workers: Inline())

    def without_modes(plain):
        def run(*args):
            with _disable_current_modes():
                return plain(*args)

        return run

    for name in ("causal_lm", "skeleton"):  # transformers uses the device meta itself
        monkeypatch.setattr(ModelFiles, name, without_modes(getattr(ModelFiles, name)))
    with SecondDevice():
        yield


@pytest.mark.parametrize(
    "options", [{"normalisation": "unit_norm", "max_norm_ratio": 3.0}, {"normalisation": "centred"}]
)
@pytest.mark.parametrize("cached", [False, True])
def test_batches(make_data, tmp_path, second, options, cached):
    if cached:
        options = options | {"cache": str(tmp_path / "cache")}
        write_cache(make_data(device="meta"), str(tmp_path / "cache"))
    plain, other = make_data(**options), make_data(device="meta", **options)
    for stage, index in (("train", 3), ("train", 40), ("val", 1)):
        x = other.batch(stage, index).x
        assert x.device == DEVICE
        torch.testing.assert_close(x.cpu(), plain.batch(stage, index).x)
    assert other.source().scale == pytest.approx(plain.source().scale)
    assert other.describe() == pytest.approx(plain.describe())


def test_replacing_activations(make_data, second):
    data = make_data()
    tokens = data.contexts.tokens[:3]
    plain = SplicedModel(data.files.causal_lm(), data.hook_path)
    other = SplicedModel(data.files.causal_lm().to(DEVICE), data.hook_path)
    expected = plain.logits(tokens, lambda rows: rows * 2)
    logits = other.logits(tokens, lambda rows: rows * 2)
    assert logits.device == DEVICE
    torch.testing.assert_close(logits.cpu(), expected)
    torch.testing.assert_close(other.activations(tokens).cpu(), plain.activations(tokens))


def test_devices_do_mix_where_nobody_looks(second):
    """The second device is one: this is what a mistake looks like."""
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        torch.ones(3, device=DEVICE) + torch.ones(3)
    assert (torch.ones(3, device=DEVICE) + 1).sum().item() == 6
